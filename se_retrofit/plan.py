"""What a retrofit does, as data: the sites where SE goes and the blocks that are skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from .errors import RetrofitError, brief
from .tables import aligned

__all__ = ["FOLDED", "Plan", "Site", "Skipped"]

T = TypeVar("T")
FOLDED = "folded"  # why fold_se leaves out a block, or one site of a block that keeps others


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
        hidden: width of the excitation's bottleneck.
        parameters: how many parameters the SE module has.
        channel_dim: which dim of the value holds the channels, counted from the end.

    Example:
        >>> import timm
        >>> from se_retrofit import plan_se
        >>> site = plan_se(timm.create_model("resnet18"), reduction=16).sites[-1]
        >>> site.path, site.kind, site.channels, site.hidden, site.parameters
        ('layer4.1.se_attention', 'residual', 512, 32, 32768)
    """

    path: str
    block: str
    kind: str
    after: str
    channels: int
    hidden: int
    parameters: int
    channel_dim: int


@dataclass(frozen=True)
class Skipped:
    """A block that gets no SE, and why; after folding, also the path of a site that its block no longer has.

    Example:
        >>> import torchvision
        >>> from se_retrofit import plan_se
        >>> plan_se(torchvision.models.mobilenet_v3_small()).skipped[0]
        Skipped(block='features.1', reason='has channel attention already')
    """

    block: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What ``add_se`` would do: ``sites``, ``skipped``, and the ``options`` with which it was made.

    ``inputs`` are the shapes with which the model was recorded, as plain data; None if they can't be written that
    way.

    Example:
        >>> import timm
        >>> from se_retrofit import plan_se
        >>> print(plan_se(timm.create_model("resnet18"), include="layer1.*"))  # doctest: +ELLIPSIS
        block     kind      after  channels  hidden  parameters
        --------  --------  -----  --------  ------  ----------
        layer1.0  residual  bn2          64       8       1,024
        layer1.1  residual  bn2          64       8       1,024
        2 SE modules, 2,048 parameters
        skipped:
          layer2.0: not included
        ...
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None

    @property
    def parameters(self) -> int:
        """Parameters that the retrofit adds."""
        return sum(site.parameters for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, fit for JSON."""
        return {
            "sites": [asdict(site) for site in self.sites],
            "skipped": [asdict(skip) for skip in self.skipped],
            "options": dict(self.options),
            "inputs": self.inputs,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote.

        Raises:
            RetrofitError: a field is missing, unknown or of another type.
        """
        if not isinstance(data, dict) or data.keys() != {"sites", "skipped", "options", "inputs"}:
            raise RetrofitError(f"a plan must have sites, skipped, options and inputs, got {brief(data)}")
        if not (
            isinstance(data["sites"], list) and isinstance(data["skipped"], list) and isinstance(data["options"], dict)
        ):
            raise RetrofitError("a plan must have lists of sites and of skipped blocks, and options by name")
        return cls(
            tuple(_made(Site, "site", site) for site in data["sites"]),
            tuple(_made(Skipped, "skipped block", skip) for skip in data["skipped"]),
            dict(data["options"]),
            data["inputs"],
        )

    def __str__(self) -> str:
        header = ("block", "kind", "after", "channels", "hidden", "parameters")
        rows = [
            (
                site.block or "(model)",
                site.kind,
                site.after,
                f"{site.channels:,}",
                f"{site.hidden:,}",
                f"{site.parameters:,}",
            )
            for site in self.sites
        ]
        lines = aligned([header, *rows], left=3, rule=True)
        lines.append(f"{len(self.sites)} SE modules, {self.parameters:,} parameters")
        if self.skipped:
            lines.append("skipped:")
            lines += [f"  {skip.block or '(model)'}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)


def _made(cls: type[T], what: str, data: Any) -> T:
    """A site or a skipped block from plain data."""
    types = {field.name: field.type for field in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(data, dict) or {name: type(value).__name__ for name, value in data.items()} != types:
        expected = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise RetrofitError(f"a {what} of the plan is broken: it must have {expected}, got {brief(data)}")
    return cls(**data)
