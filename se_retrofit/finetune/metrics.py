"""Loss and accuracy of a classifier over a data set, each image counted once, whatever the number of processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import RetrofitError
from ..models import Base
from . import setup
from .config import FinetuneConfig
from .data import Batch, Stream, stream
from .engine import Interrupt, called, engine, fast_math
from .log import Log
from .parts import as_found, to_device
from .randomness import kept_randomness
from .run import placed, uses_channels_last
from .scores import Answers, scores_of
from .splits import opened
from .transforms import check_classes, transforms_for

__all__ = ["answers", "check_targets", "evaluate", "hits", "measure"]

MOST_LIKELY = 5  # classes of each image that are kept


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    split: str | None = None,
    config: FinetuneConfig | None = None,
    base: Base | None = None,
) -> dict[str, float]:
    """Loss, accuracy and the other scores of a classifier on images, as the fine-tune measures them.

    Args:
        model: the network; it is moved to the device where it is run, and stays there.
        data: a Dataset or a DataLoader, as for ``finetune``, which is measured whole; a name of data, such as a folder, as
            ``load_split`` takes; or what ``load_split`` gave.
        split: which images of data that is given by name; None for all of a folder of classes, and ``"val"`` elsewhere, or
            ``"test"`` where there is no ``"val"``.
        config: for batch size, image size, precision, ``multi_label`` and the like.
        base: as for ``finetune``; tells the transforms of torchvision's networks.

    Returns:
        ``val_loss``, ``val_accuracy``, ``val_precision``, ``val_recall``, ``val_f1`` (means over the classes), with more
        than five classes ``val_top5``; with ``multi_label`` ``val_map`` instead.

    Raises:
        RetrofitError: data and network don't fit together; the data has no such split.
        TypeError: an argument is of the wrong type.
    """
    config = FinetuneConfig() if config is None else config
    return scores_of(answers(model, opened(data, split, model, config).data, config=config, base=base))


def answers(model: nn.Module, data: Any, *, config: FinetuneConfig | None = None, base: Base | None = None) -> Answers:
    """What a classifier says about each image, in the same order for each network.

    Arguments and errors are those of ``evaluate``, but for data by name.
    """
    config = FinetuneConfig() if config is None else config
    setup.checked(model, config, None, False)
    check_classes(model, data)
    with as_found(model), kept_randomness(), fast_math(config), engine(config) as accelerator:
        batches = stream(
            data, name="data", train=False, batch_size=config.batch_size, bad_images=config.bad_images,
            transform=transforms_for(model, config, train=False, base=base), seed=config.seed, workers=config.workers,
            rank=accelerator.process_index, world=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        channels_last = uses_channels_last(config, accelerator.device)
        to_device(model, accelerator.device, channels_last)
        log = Log(None, epochs=0, updates=0, columns=[], rank=accelerator.process_index)
        found = measure(model, batches, accelerator, channels_last, log, config.multi_label)
        assert found is not None  # only an Interrupt ends it early
        return found


@torch.no_grad()
def measure(
    network: nn.Module,
    data: Stream,
    accelerator: Accelerator,
    channels_last: bool,
    log: Log,
    multi_label: bool,
    interrupt: Interrupt | None = None,
) -> Answers | None:
    """What a network says about each image of all processes; each image counts once.

    None where ``interrupt`` ended it. Several processes, which must leave together, go through with it.
    """
    network.eval()
    totals = torch.zeros(3, dtype=torch.float32, device=accelerator.device)
    said: list[tuple[Tensor, ...]] = []
    classes = 0
    for batch in data.batches(0):
        if interrupt is not None and interrupt.signal is not None and accelerator.num_processes == 1:
            return None
        log.complain(batch)
        images, targets = placed(batch, accelerator.device, channels_last)
        with accelerator.autocast():
            logits, _ = called(network, images)
        classes = logits.shape[1]
        check_targets(batch, classes, multi_label)
        counts = batch.counts.to(accelerator.device, non_blocking=True)
        losses = losses_of(logits.float(), targets, multi_label)
        right = hits(logits, targets, multi_label) * counts
        # Not losses[counts], whose size the host would have to wait for
        totals += torch.stack([losses.where(counts, losses.new_zeros(())).sum(), right.sum(), counts.sum()])
        said.append((counts, *answer(logits.float(), targets, multi_label)))
    loss, right_count, seen = accelerator.reduce(totals, "sum").tolist()
    counts, found, targets = (gathered(list(part), accelerator) for part in zip(*said, strict=True))
    accuracy = right_count / max(seen, 1)
    return Answers(loss / max(seen, 1), accuracy, classes, multi_label, found[counts], targets[counts])


def losses_of(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Of each image, (N,)."""
    if multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return F.cross_entropy(logits, targets, reduction="none")


def hits(logits: Tensor, targets: Tensor, multi_label: bool) -> Tensor:
    """Whether the class of each image is right, or the share of its labels that are, (N,)."""
    if multi_label:
        return ((logits > 0) == (targets > 0.5)).float().mean(1)
    return logits.argmax(1) == (targets if targets.dim() == 1 else targets.argmax(1))


def answer(logits: Tensor, targets: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    """What is kept of each image: little, as there may be many images and classes."""
    if multi_label:
        return logits.sigmoid(), targets
    likely = logits.topk(min(MOST_LIKELY, logits.shape[1]), dim=1).indices
    likely[:, 0] = logits.argmax(1)  # which of equals comes first must not depend on how many are asked for
    return likely, targets if targets.dim() == 1 else targets.argmax(1)


def gathered(parts: list[Tensor], accelerator: Accelerator) -> Tensor:
    """The values of all processes, on the CPU; where they have unequal many, followed by zeros (which don't count)."""
    whole = torch.cat(parts)
    if accelerator.num_processes > 1:
        whole = accelerator.gather(accelerator.pad_across_processes(whole))
    return whole.cpu()


def check_targets(batch: Batch, classes: int, multi_label: bool = False) -> None:
    """On the CPU: the same mistake found by a CUDA kernel ends the process."""
    targets = batch.targets
    got = f"{targets.dtype} of shape {tuple(targets.shape)}"
    if multi_label or (targets.dim() == 2 and targets.is_floating_point()):
        if tuple(targets.shape) != (len(batch.images), classes) or targets.is_complex():
            raise RetrofitError(f"targets must be vectors of {classes} labels, one for each class, got {got}")
        if not bool(((targets >= 0) & (targets <= 1)).all()):
            raise RetrofitError("the labels of an image must be from 0 to 1")
        return
    if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex():
        hint = "; for several labels an image set multi_label=True in the config" if targets.dim() == 2 else ""
        raise RetrofitError(f"targets must be class numbers, got {got}{hint}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise RetrofitError(
            f"the data has class {low if low < 0 else high}, and the network has classes 0 to {classes - 1}; "
            "num_classes=... in the config gives it a new head"
        )
