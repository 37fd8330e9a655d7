"""What a retrofit does, as data: the sites where SE goes and the blocks that are skipped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .attention import name_of
from .tables import aligned

__all__ = ["FOLDED", "Plan", "Site", "Skipped", "current_options", "current_site", "noted_options"]

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
        parameters: how many parameters the inserted module has.
        channel_dim: which dim of the value holds the channels, counted from the end.
        attention: what goes there: a name such as ``"se"``, or the qualified name of a class or factory.

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
        block     kind      after  channels  parameters
        --------  --------  -----  --------  ----------
        layer1.0  residual  bn2          64       1,024
        layer1.1  residual  bn2          64       1,024
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

    @property
    def what(self) -> str:
        """What is inserted, in few words: ``"SE"``, ``"eca"``, ``"CoordAttn"``."""
        names = dict.fromkeys(site.attention.rpartition(".")[2] for site in self.sites)
        return " and ".join("SE" if name == "se" else name for name in names)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, fit for JSON: of an attention that is a class or a factory, the name alone."""
        return {
            "sites": [asdict(site) for site in self.sites],
            "skipped": [asdict(skip) for skip in self.skipped],
            "options": noted_options(self.options),
            "inputs": self.inputs,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote, of this version or an older one."""
        return cls(
            tuple(Site(**current_site(site)) for site in data["sites"]),
            tuple(Skipped(**skip) for skip in data["skipped"]),
            current_options(data["options"]),
            data["inputs"],
        )

    def __str__(self) -> str:
        header = ("block", "kind", "after", "channels", "parameters")
        rows = [
            (
                site.block or "(model)",
                site.kind,
                site.after,
                f"{site.channels:,}",
                f"{site.parameters:,}",
            )
            for site in self.sites
        ]
        lines = aligned([header, *rows], left=3, rule=True)
        lines.append(f"{len(self.sites)} {self.what} modules, {self.parameters:,} parameters")
        if self.skipped:
            lines.append("skipped:")
            lines += [f"  {skip.block or '(model)'}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)


# As data -----------------------------------------------------------------------------------------------------------------


def noted_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options as plain data: of a class or factory that was given for the attention, the name alone, as information."""
    attention = options.get("attention", "se")
    return {**options, "attention": {"callable": name_of(attention)} if callable(attention) else attention}


def current_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options that this version or an older one wrote: SE was the only attention, and a static factor one of its gates."""
    if options.get("gate") == "static":
        return {**options, "gate": "identity", "attention": "static"}
    return {"attention": "se", **options}


def current_site(site: dict[str, Any]) -> dict[str, Any]:
    """A site that this version or an older one wrote: of a static factor, the hidden width was 0."""
    rest = {key: value for key, value in site.items() if key != "hidden"}
    return {"attention": "static" if site.get("hidden") == 0 else "se", **rest}
