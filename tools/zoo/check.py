"""One network of the zoo: retrofit it, check it, and say how it went. No data is needed, so no memory either."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from se_retrofit.attention import Inserted
from se_retrofit.errors import RetrofitError
from se_retrofit.plan import Plan
from se_retrofit.retrofit import add_se, plan_of, remove_se
from se_retrofit.surgery.record.graph import Record
from se_retrofit.surgery.record.inputs import described_inputs
from se_retrofit.surgery.record.runs import record
from se_retrofit.surgery.splice.undo import is_retrofitted

from .names import Entry

CONVERTED = "converted"
NO_BLOCKS = "refused: no convolutional blocks"
HAS_ATTENTION = "refused: has channel attention already"
FAILED = "failed: "

KINDS = ("residual", "inverted", "dense", "multi-branch", "rep-sum", "chain")


@dataclass
class Row:
    """What became of one network.

    Attributes:
        name, family: as in ``Entry``.
        verdict: ``"converted"``, ``"refused: no convolutional blocks"``, ``"refused: has channel attention already"``
            or ``"failed: "`` and why.
        parameters: of the network as it was.
        extra: parameters that SE adds.
        kinds: number of SE modules by kind of block.
        classes: the classes of the blocks that have got SE.
        skipped: reasons why blocks were left out, with the number of blocks.
        seconds: that building and checking took.
    """

    name: str
    family: str
    verdict: str
    parameters: int = 0
    extra: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sites(self) -> int:
        """How many SE modules went in."""
        return sum(self.kinds.values())


class CheckFailed(Exception):
    """A promise that the retrofit did not keep."""


def check(entry: Entry) -> Row:
    """Build a network, retrofit it, and check all that needs no data.

    That is: the SE modules are those of the plan; every original key, shape and class is still there; the retrofitted
    network runs, on the shapes that it was recorded with, and returns the same shapes; ``remove_se`` restores the
    classes and keys. Whatever goes wrong, even a bug, is the row's verdict.

    Example:
        >>> from tools.zoo import check, entries
        >>> row = check(entries(["torchvision/resnet18"])[0])
        >>> row.verdict, row.kinds
        ('converted', {'residual': 8})
    """
    started = time.perf_counter()
    row = Row(entry.name, entry.family, FAILED + "it was not checked")
    try:
        model = entry.build()
        row.parameters = sum(p.numel() for p in model.parameters())
        inspect_model(model, row)
    except Exception as error:
        row.verdict = f"{FAILED}{type(error).__name__}: {_first_line(error)}"
    row.seconds = time.perf_counter() - started
    return row


def inspect_model(model: nn.Module, row: Row) -> None:
    """Retrofit a model in place, check the result, undo it, check that too, and write the findings into the row.

    Args:
        model: it is given back as it was.
        row: for the findings.

    Raises:
        CheckFailed: the retrofit broke a promise.
    """
    before = _structure(model)
    classes = {path: type(module).__name__ for path, module in model.named_modules()}
    try:
        add_se(model, inplace=True)
    except RetrofitError as refusal:
        if _structure(model) != before:
            raise CheckFailed("add_se raised and left the model changed") from refusal
        row.verdict = _refusal(str(refusal))
        return
    plan = plan_of(model)
    _check_retrofitted(model, plan, before)
    inputs = described_inputs(plan.inputs, model)
    retrofitted = record(model, inputs)
    remove_se(model, inplace=True)
    if _structure(model) != before:
        raise CheckFailed("remove_se does not restore the classes and keys")
    if _shapes(retrofitted) != _shapes(record(model, inputs)):
        raise CheckFailed("the retrofitted network returns other shapes than the original")
    row.verdict = CONVERTED
    row.extra = plan.parameters
    counts = Counter(site.kind for site in plan.sites)
    row.kinds = {kind: counts[kind] for kind in KINDS if counts[kind]}
    row.classes = sorted({classes.get(site.block, "(graph)") for site in plan.sites})
    row.skipped = dict(Counter(skip.reason for skip in plan.skipped))


def _refusal(message: str) -> str:
    if "has channel attention already" in message:
        return HAS_ATTENTION
    if "has no convolutional blocks" in message or "has no convolution," in message:
        return NO_BLOCKS
    return f"{FAILED}{message}"


Structure = tuple[dict[str, type], dict[str, tuple[int, ...]]]


def _structure(model: nn.Module) -> Structure:
    """The class of each module and the shape of each entry of the state dict, in order."""
    return (
        {path: type(module) for path, module in model.named_modules()},
        {key: tuple(value.shape) for key, value in model.state_dict().items() if isinstance(value, Tensor)},
    )


def _check_retrofitted(model: nn.Module, plan: Plan, before: Structure) -> None:
    ses = {path: module for path, module in model.named_modules() if is_retrofitted(module)}
    if set(ses) != {site.path for site in plan.sites}:
        raise CheckFailed("the SE modules are not where the plan says")
    for site in plan.sites:
        se = ses[site.path]
        assert isinstance(se, Inserted)
        if se.channel != site.channels or sum(p.numel() for p in se.parameters()) != site.parameters:
            raise CheckFailed(f"{site.path} is not as large as the plan says")
    classes, keys = _structure(model)
    for path, cls in before[0].items():
        if not issubclass(classes.get(path, type(None)), cls):
            raise CheckFailed(f"{path} is no {cls.__name__} any more")
    # a module that stands in several places has its keys under each of its paths
    inside = tuple(f"{p}." for p, module in model.named_modules(remove_duplicate=False) if is_retrofitted(module))
    if {key: shape for key, shape in keys.items() if not key.startswith(inside)} != before[1]:
        raise CheckFailed("the original keys of the state dict are not as they were")


def _shapes(record: Record) -> list[torch.Size]:
    return [op.shape for op in record.calls[0].outputs]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
