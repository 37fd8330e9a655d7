"""What a retrofit does, as data: the sites where SE goes, how it comes to be called there, and the blocks that are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .attention import name_of
from .errors import RetrofitError, brief
from .plaindata import parse_json
from .tables import aligned, as_html, counted, few

__all__ = ["FOLDED", "Edit", "Plan", "Site", "Skipped", "folded", "noted_options"]

FOLDED = "folded"  # why fold_se leaves out a block, or one site of a block that keeps others


@dataclass(frozen=True)
class Edit:
    """One way in which a module of the network, the holder, comes to call SE.

    Attributes:
        holder: path of the module that gets the SE module as a child.
        form: ``"splice"`` (one more call in the source of a method), ``"graph"`` (one more node in the graph of a GraphModule),
            ``"append"`` (SE is the last child of an ``nn.Sequential``) or ``"return"`` (SE scales what the holder returns).
        owner: of a splice, the class that defines the method, as ``"module:qualname"``: one of those that the holder's class
            is derived from.
        method: its name there.
        span: first line, last line (both counted from the method's first), first column and end column of what is changed.
        statement: ``"wrap"``: an expression becomes the argument of the call; ``"after"``, ``"before"``: a statement of its own on
            the same line passes ``target`` through it.
        target: for such a statement, the variable.
        node: of a graph, the node behind which SE goes, by name.
        users: the nodes that get its output, by name; None for all.
        digest: of the source that the edit was made for: the method's, of ``"return"`` that of the forward (empty if it
            is not at hand), of ``"graph"`` the graph's generated code.
    """

    holder: str
    form: str
    owner: str = ""
    method: str = ""
    span: tuple[int, ...] = ()
    statement: str = ""
    target: str = ""
    node: str = ""
    users: tuple[str, ...] | None = None
    digest: str = ""


@dataclass(frozen=True)
class Site:
    """One place where SE goes.

    Attributes:
        path: where the SE module will be in the model, e.g. ``layer1.0.se_attention``.
        block: path of the block that it recalibrates, e.g. ``layer1.0``.
        kind: what the block is: ``"residual"``, ``"inverted"``, ``"dense"``, ``"multi-branch"``, ``"rep-sum"`` or
            ``"chain"``.
        after: the node of the block's graph whose value it scales, e.g. ``bn3``.
        channels: number of channels of that value.
        parameters: how many parameters the inserted module has.
        channel_dim: which dim of the value holds the channels, counted from the end.
        attention: what goes there: a name such as ``"se"``, or the qualified name of a class or factory.
        shape: of the value, in the run by which the plan was made.
        inplace: whether SE may scale the value in place where no gradient is needed, because nothing else uses it.
        dtype: of the value, ``"float32"`` for instance; None where it is that of the block's parameters.
        edits: how the network comes to call SE here; several where its code takes another way in training.

    Example:
        >>> import timm
        >>> from se_retrofit import plan_se
        >>> site = plan_se(timm.create_model("resnet18"), reduction=16).sites[-1]
        >>> site.path, site.kind, site.channels, site.parameters
        ('layer4.1.se_attention', 'residual', 512, 32768)
    """

    path: str
    block: str
    kind: str
    after: str
    channels: int
    parameters: int
    channel_dim: int
    attention: str = "se"
    shape: tuple[int, ...] = ()
    inplace: bool = False
    dtype: str | None = None
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A block that gets no SE, or a convolution in no block, and why; after folding, also the path of a site that its block no
    longer has.

    Attributes:
        block: its path.
        reason: why it gets no SE.
        convolutions: the paths of the convolutions over space (with a kernel larger than 1 in some dim) that it holds.

    Example:
        >>> import timm
        >>> from se_retrofit import plan_se
        >>> plan_se(timm.create_model("resnet18")).skipped
        (Skipped(block='conv1', reason='a plain chain beside other blocks: name it in include', convolutions=('conv1',)),)
    """

    block: str
    reason: str
    convolutions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What ``add_se`` would do: ``sites``, ``skipped``, and the ``options`` with which it was made.

    ``inputs`` are the shapes with which the model was recorded, as plain data; None if they can't be written that
    way. ``structure`` is a digest of the model's modules, their classes, and the shapes of their parameters and buffers.

    ``add_se(model, plan=plan)`` carries it out. Sites may be taken out of it before:
    ``dataclasses.replace(plan, sites=plan.sites[1:])``.

    Example:
        >>> import timm
        >>> from se_retrofit import plan_se
        >>> print(plan_se(timm.create_model("resnet18"), include="layer1.*"))
        block     kind      after  channels  parameters
        --------  --------  -----  --------  ----------
        layer1.0  residual  bn2          64       1,024
        layer1.1  residual  bn2          64       1,024
        2 SE modules, 2,048 parameters
        skipped:
          conv1: a plain chain beside other blocks: name it in include
          layer2.0, layer2.1, layer3.0 and 3 more: not included
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None
    structure: str = ""

    @property
    def parameters(self) -> int:
        """Parameters that the retrofit adds."""
        return sum(site.parameters for site in self.sites)

    @property
    def what(self) -> str:
        """What is inserted, in few words: ``"SE"``, ``"eca"``, ``"CoordAttn"``."""
        names = dict.fromkeys(site.attention.rpartition(".")[2] for site in self.sites)
        return " and ".join("SE" if name == "se" else name for name in names)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, fit for JSON: of an attention that is a class or a factory, the name alone."""
        return asdict(replace(self, options=noted_options(self.options)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote, of this version or an older one. Nothing is imported, and nothing of it is run.

        Raises:
            RetrofitError: it is no such data; the message names what is wrong.
        """
        plan: Plan = _read(_as_now(data), cls, "plan")
        return plan

    def to_json(self) -> str:
        """The plan as text.

        Example:
            >>> import timm
            >>> from se_retrofit import Plan, add_se, plan_se
            >>> model = timm.create_model("resnet18")
            >>> text = plan_se(model).to_json()
            >>> type(add_se(model, plan=Plan.from_json(text)).layer1[0]).__name__
            'SEBasicBlock'
        """
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that ``to_json`` wrote.

        Raises:
            RetrofitError: as for ``from_dict``; or it is no JSON.
        """
        return cls.from_dict(parse_json(text, "the plan"))

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            ("block", "kind", "after", "channels", "parameters"),
            *((s.block or "(model)", s.kind, s.after, f"{s.channels:,}", f"{s.parameters:,}") for s in self.sites),
        ]

    def _notes(self) -> list[str]:
        lines = [f"{counted(len(self.sites), f'{self.what} module')}, {counted(self.parameters, 'parameter')}"]
        if self.skipped:
            lines += ["skipped:", *(f"  {blocks}: {reason}" for blocks, reason in folded(self.skipped))]
        return lines

    def __str__(self) -> str:
        return "\n".join([*aligned(self._rows(), left=3, rule=True), *self._notes()])

    def _repr_html_(self) -> str:
        return as_html(self._rows(), left=3, below=self._notes())


def folded(skipped: Iterable[Skipped]) -> list[tuple[str, str]]:
    """What was skipped, with one line for each reason: the names of the first blocks and how many there are more, and the reason."""
    by_reason: dict[str, list[str]] = {}
    for skip in skipped:
        by_reason.setdefault(skip.reason, []).append(skip.block or "(model)")
    return [(few(blocks), reason) for reason, blocks in by_reason.items()]


def noted_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options as plain data: of a class or factory that was given for the attention, the name alone, as information."""
    attention = options.get("attention", "se")
    return {**options, "attention": {"callable": name_of(attention)} if callable(attention) else attention}


# Reading --------------------------------------------------------------------------------------------------------------


def _as_now(data: Any) -> Any:
    """What older versions wrote as this one writes it: SE was the only attention, a static factor one of its gates, or a site of
    a hidden width of 0."""
    if not isinstance(data, dict) or not isinstance(data.get("options"), dict) or "attention" in data["options"]:
        return data
    static = data["options"].get("gate") == "static"
    options = {**data["options"], "attention": "static" if static else "se"}
    if static:
        options["gate"] = "identity"
    sites = data.get("sites")
    if isinstance(sites, (list, tuple)):
        sites = [_site_as_now(site) if isinstance(site, dict) else site for site in sites]
    return {**data, "options": options, "sites": sites}


def _site_as_now(site: dict[str, Any]) -> dict[str, Any]:
    attention = "static" if site.get("hidden") == 0 else "se"
    return {"attention": attention, **{key: value for key, value in site.items() if key != "hidden"}}


def _read(value: Any, kind: Any, where: str) -> Any:
    """A value of the type that a field is annotated with, from plain data."""
    inner = get_args(kind)
    if kind is Any or (value is None and type(None) in inner):
        return value
    if is_dataclass(kind) and isinstance(value, dict):
        return _read_fields(value, kind, where)
    if get_origin(kind) is UnionType:
        return _read(value, inner[0], where)
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        return tuple(_read(item, inner[0], f"{where}[{index}]") for index, item in enumerate(value))
    if type(value) is (get_origin(kind) or kind):
        return value
    expected = {tuple: "a list", int: "an int", str: "a string", bool: "true or false"}
    raise RetrofitError(
        f"{where} is broken: it must be {expected.get(get_origin(kind) or kind, 'a mapping')}, got {brief(value)}"
    )


def _read_fields(data: dict[str, Any], cls: Any, where: str) -> Any:
    kinds = get_type_hints(cls)
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    missing, unknown = sorted(needed - data.keys()), sorted(map(str, data.keys() - kinds.keys()))
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        raise RetrofitError(f"{where} is broken, or of a newer version of se-retrofit; {'; '.join(parts)}")
    return cls(**{name: _read(value, kinds[name], f"{where}.{name}") for name, value in data.items()})
