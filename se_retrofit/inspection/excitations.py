"""The gates of a retrofitted network over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batches import batches_of, inputs_and_labels
from ..errors import RetrofitError
from ..models import IMAGES
from ..surgery.record.copying import check_values
from ..tables import aligned
from .gates import SiteGates, gated_modules, gates_over

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Excitations", "excitations"]


@dataclass(frozen=True, eq=False)
class Excitations:
    """What ``excitations`` found. ``str`` is a table.

    Attributes:
        sites: in the order of the plan.
        inputs: how many there were.
        missed: the SE modules that were never called.
        classes: their names, where a fine-tuned network or the loader's data set (``loader.dataset.classes``) tells them.
    """

    sites: tuple[SiteGates, ...]
    inputs: int
    missed: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def notes(self) -> dict[str, str]:
        """What stands out, by the path of the SE module."""
        notes = {site.path: site.note for site in self.sites if site.note}
        return notes | dict.fromkeys(self.missed, "never called on these inputs")

    @property
    def stages(self) -> list[list[SiteGates]]:
        """The sites in groups: neighbours whose feature maps have the same size."""
        return [list(group) for _, group in groupby(self.sites, key=lambda site: site.size)]

    def __str__(self) -> str:
        rows = [["site", "map", "channels", "mean", "lowest", "highest", "std over inputs", "std over classes"]]
        for site in self.sites:
            numbers = (float(site.mean.mean()), site.low, site.high, site.variation, site.class_spread)
            texts = ("" if number is None else f"{number:.4f}" for number in numbers)
            rows.append([site.path, site.size, f"{len(site.mean):,}", *texts])
        lines = [*aligned(rows, rule=True), f"gates over {self.inputs:,} inputs"]
        paths: dict[str, list[str]] = {}
        for path, note in self.notes.items():
            paths.setdefault(note, []).append(path)
        for note, noted in paths.items():
            lines.append(f"note: {'all sites' if len(noted) == len(self.sites) else ', '.join(noted)}: {note}")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """A figure with a row a stage: on the left each site's gates, averaged over the inputs, as a box over its
        channels; on the right the stage's last site, channel by channel, with lines for up to five classes where labels
        were given.

        Args:
            path: where to save it, as an image of any format that matplotlib writes; None not to.

        Raises:
            RetrofitError: the folder does not exist, matplotlib writes no such format or is not installed.
        """
        from .gate_plots import plot_stages

        return plot_stages(self.stages, self.classes, path)


def excitations(
    model: nn.Module, data: Any, *, max_batches: int | None = None, keys: Sequence[str] | None = None
) -> Excitations:
    """Run a retrofitted model over data in eval mode and gather what its gates do.

    The model is not changed: its training flags are put back, its norms' statistics are not updated, and the hooks that
    listen are taken off again, also if the run fails.

    Args:
        model: a model that ``add_se`` has retrofitted.
        data: what ``finetune`` takes, or another iterable of batches: tensors, tuples or lists of inputs and labels (and more, which
            is ignored), or dicts of them. A Dataset comes in batches of 32, its PIL images prepared as for a validation. Integer
            labels, one for each input, give statistics by class.
        max_batches: stop after so many.
        keys: of inputs and labels in dicts; None for usual ones, such as ``"image"`` and ``"label"``.

    Raises:
        RetrofitError: the model has no SE that ``add_se`` put in, modules without gates for each channel (CBAM), or no values (on
            the meta device, or of fake tensors); or the data yields nothing.
        TypeError: the model is none, or a batch is neither a tensor nor begins with one.

    Example:
        >>> import timm, torch
        >>> from se_retrofit import add_se
        >>> from se_retrofit.inspection import excitations
        >>> model = add_se(timm.create_model("resnet18"))
        >>> found = excitations(model, [torch.randn(2, 3, 64, 64)])
        >>> len(found.sites), found.sites[0].low, found.sites[0].high
        (8, 1.0, 1.0)
    """
    ses = gated_modules(model)
    check_values(model.named_parameters())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = 0

    def labelled() -> Iterable[tuple[Tensor, Tensor | None]]:
        nonlocal inputs
        for batch in islice(batches_of(model, data, keys or ()), max_batches):
            images, labels = inputs_and_labels(batch, keys or ())
            inputs += len(images)
            yield images.to(device), labels

    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]):
            found = gates_over(model, ses, labelled())
    finally:
        for module, flag in training:
            module.training = flag
    if not inputs:
        raise RetrofitError("the data yields no batch, so there are no gates to look at")
    missed = tuple(path for path in ses if path not in found)
    return Excitations(tuple(found.values()), inputs, missed, _class_names(model, data))


def _class_names(model: nn.Module, data: Any) -> tuple[str, ...]:
    """The names of the classes, where the network or the data set tells them."""
    names = vars(model).get(IMAGES, {}).get("classes") or getattr(getattr(data, "dataset", data), "classes", ())
    return tuple(map(str, names))
