"""A retrofit as data: the sites where SE goes, the edits that call it there, and the blocks that are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .attention import name_of
from .plaindata import parse_json, read_as
from .tables import aligned, as_html, counted, few

FOLDED = "folded"  # the reason why fold_se skips a block, or one of its sites


@dataclass(frozen=True)
class Edit:
    """A change by which a module of the network, the holder, calls SE.

    Attributes:
        holder: path of the module that gets the SE module as a child.
        form: ``"splice"`` (an additional call in the source of a method), ``"graph"`` (an additional node in the graph
            of a GraphModule), ``"append"`` (SE is the last child of an ``nn.Sequential``) or ``"return"`` (SE scales
            the holder's return value).
        owner: for a splice, the class that defines the method, as ``"module:qualname"``; a base of the holder's class.
        method: for a splice, the name of the method.
        span: first line, last line (both counted from the method's first line), first and end column of the change.
        statement: ``"wrap"`` if an expression becomes the argument of the call; ``"after"`` or ``"before"`` if a
            separate statement on the same line passes ``target`` through it.
        target: the variable of such a statement.
        node: for a graph, the name of the node after which SE goes.
        users: for a graph, the names of the nodes that get SE's output; None for all.
        digest: digest of the source that the edit was made for: the method; for ``"return"``, the forward (empty if it
            is not available); for ``"graph"``, the graph's generated code.
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
    """A place where SE goes.

    Attributes:
        path: path of the SE module in the model, e.g. ``layer1.0.se_attention``.
        block: path of the block that it recalibrates, e.g. ``layer1.0``.
        kind: kind of the block: ``"residual"``, ``"inverted"``, ``"dense"``, ``"multi-branch"``, ``"rep-sum"`` or
            ``"chain"``.
        after: the node of the block's graph whose value SE scales, e.g. ``bn3``.
        channels: number of channels of that value.
        parameters: number of parameters of the inserted module.
        channel_dim: the channel dim of the value, counted from the end.
        attention: the inserted attention: a name such as ``"se"``, or the qualified name of a class or factory.
        shape: shape of the value in the run that was recorded for the plan.
        inplace: whether SE may scale the value in place if no gradient is needed, because nothing else uses it.
        dtype: dtype of the value, for instance ``"float32"``; None if it is that of the block's parameters.
        edits: the changes that call SE here; several if the code takes another branch in training.

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
    """A block that gets no SE, or a convolution outside all blocks, with the reason; after folding, also a site that
    its block no longer has.

    Attributes:
        block: path of the block, convolution or site.
        reason: the reason why it gets no SE.
        convolutions: paths of the spatial convolutions (with a kernel larger than 1 in some dim) in it.

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
    """A plan of what ``add_se`` does: ``sites``, ``skipped``, and the ``options`` that it was made with.

    ``inputs`` holds the shapes with which the model was recorded, as plain data; None if they can't be represented that
    way. ``structure`` is a digest of the model's modules, their classes, and the shapes of their parameters and buffers.

    ``add_se(model, plan=plan)`` carries it out. You can remove sites first:
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # it does not change, and each inserted module has it

    @property
    def parameters(self) -> int:
        """Number of parameters that the retrofit adds."""
        return sum(site.parameters for site in self.sites)

    @property
    def what(self) -> str:
        """The inserted attention in few words: ``"SE"``, ``"eca"``, ``"CoordAttn"``."""
        names = dict.fromkeys(site.attention.rpartition(".")[2] for site in self.sites)
        return " and ".join("SE" if name == "se" else name for name in names)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data that JSON can hold; of a class or factory for the attention, only the name."""
        return asdict(replace(self, options=noted_options(self.options)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Build a plan from the result of ``to_dict``, of this or an older version. Nothing in it is imported or run.

        Raises:
            RetrofitError: If the data is not that of a plan; the message says what is wrong.
        """
        return read_as(_as_now(data), cls, "plan")

    def to_json(self) -> str:
        """Return the plan as JSON text.

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
        """Read a plan from the result of ``to_json``.

        Raises:
            RetrofitError: As for ``from_dict``, or if the text is not valid JSON.
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
    """Group what was skipped by reason: the names of the first blocks with the number of others, and the reason."""
    by_reason: dict[str, list[str]] = {}
    for skip in skipped:
        by_reason.setdefault(skip.reason, []).append(skip.block or "(model)")
    return [(few(blocks), reason) for reason, blocks in by_reason.items()]


def noted_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options as plain data; of a class or factory for the attention, only the name, for information."""
    attention = options.get("attention", "se")
    return {**options, "attention": {"callable": name_of(attention)} if callable(attention) else attention}


def _as_now(data: Any) -> Any:
    """Convert the data of older versions, in which SE was the only attention, and a static factor was one of its gates,
    or a site with a hidden width of 0."""
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
