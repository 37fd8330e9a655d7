"""The gates of a retrofitted network over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..batches import as_taken_by, batches_of, inputs_and_labels
from ..errors import RetrofitError, check_positive
from ..models import IMAGES
from ..surgery.record.copying import check_values, in_mode, modes_kept
from ..tables import aligned
from .gate_plots import plot_stages
from .gates import SiteGates, gated_modules, gates_over

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Excitations:
    """The result of ``excitations``; ``str`` is a table.

    Attributes:
        sites: the gates of each site, in the order of the plan.
        inputs: number of inputs.
        missed: the SE modules that were never called.
        classes: names of the classes, if a fine-tuned network or the loader (``loader.dataset.classes``) has them.
    """

    sites: tuple[SiteGates, ...]
    inputs: int
    missed: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def notes(self) -> dict[str, str]:
        """Return remarks on what stands out, by the path of the SE module."""
        notes = {site.path: site.note for site in self.sites if site.note}
        return notes | dict.fromkeys(self.missed, "never called on these inputs")

    @property
    def stages(self) -> list[list[SiteGates]]:
        """Return the sites in groups of neighbours whose feature maps have the same size."""
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
        """Plot a row for each stage: on the left, a box plot over the channels of each site's gates, averaged over the
        inputs; on the right, the gates of the stage's last site channel by channel, with lines for up to five classes
        if labels were given.

        Args:
            path: where to save the figure, in any format that matplotlib supports; None to not save it.

        Raises:
            RetrofitError: If the folder does not exist, or matplotlib doesn't support the format or is not installed.
        """
        return plot_stages(self.stages, self.classes, path)


def excitations(
    model: nn.Module, data: Any, *, max_batches: int | None = None, keys: Sequence[str] | None = None
) -> Excitations:
    """Run a retrofitted model over data in eval mode, and collect statistics of its gates.

    The model is not changed: its training flags are restored, its norms' statistics are not updated, and the hooks are
    removed, even if the run fails.

    Args:
        model: a model from ``add_se``.
        data: data as for ``finetune``, or another iterable of batches: tensors, tuples or lists of inputs and labels
            (anything else is ignored), or dicts of them. A Dataset is used in batches of 32, with PIL images prepared
            as for validation. Integer labels, one per input, give statistics by class.
        max_batches: stop after this many batches.
        keys: keys of inputs and labels in dicts; None for common ones, such as ``"image"`` and ``"label"``.

    Raises:
        RetrofitError: If the model has no SE from ``add_se``, has modules without gates for each channel (CBAM), or has
            no values (on the meta device, or of fake tensors); or if the data yields nothing.
        TypeError: If ``model`` is not an nn.Module, or a batch is neither a tensor nor starts with one.

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
    if max_batches is not None:
        check_positive("max_batches", max_batches)
    inputs = 0

    def labelled() -> Iterable[tuple[Tensor, Tensor | None]]:
        nonlocal inputs
        for batch in islice(batches_of(model, data, keys or ()), max_batches):
            images, labels = inputs_and_labels(batch, keys or ())
            inputs += len(images)
            yield as_taken_by(images, model), labels

    with modes_kept(model), torch.random.fork_rng(devices=[]):
        found = gates_over(in_mode(model, False), ses, labelled())
    if not inputs:
        raise RetrofitError("the data yields no batch, so there are no gates to inspect")
    missed = tuple(path for path in ses if path not in found)
    names = vars(model).get(IMAGES, {}).get("classes") or getattr(getattr(data, "dataset", data), "classes", ())
    return Excitations(tuple(found.values()), inputs, missed, tuple(map(str, names)))
