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
from .engine import Interrupt, engine, fast_math, logits_of
from .log import Log
from .parts import as_found, to_device
from .randomness import kept_randomness
from .run import placed, uses_channels_last
from .transforms import transforms_for

__all__ = ["answers", "check_targets", "evaluate", "measure"]

MOST_LIKELY = 5  # classes of each image that are kept


def evaluate(
    model: nn.Module, data: Any, *, config: FinetuneConfig | None = None, base: Base | None = None
) -> dict[str, float]:
    """Loss and accuracy of a classifier on a Dataset or a DataLoader, as the fine-tune measures them.

    Args:
        model: the network; it is moved to the device where it is run, and stays there.
        data: as for ``finetune``.
        config: for batch size, image size, precision and the like.
        base: as for ``finetune``; tells the transforms of torchvision's networks.

    Returns:
        ``{"val_loss": ..., "val_accuracy": ...}``

    Raises:
        RetrofitError: data and network don't fit together.
        TypeError: an argument is of the wrong type.
    """
    return answers(model, data, config=config, base=base)[0]


def answers(
    model: nn.Module, data: Any, *, config: FinetuneConfig | None = None, base: Base | None = None
) -> tuple[dict[str, float], Tensor]:
    """What ``evaluate`` gives, and for each image its class and the classes that the network takes for the most likely,
    the first first: ``(images, 1 + 5)``, fewer where there are fewer classes, in the same order for each network.

    Arguments and errors are those of ``evaluate``.
    """
    config = FinetuneConfig() if config is None else config
    setup.checked(model, config, None, False)
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
        found: list[Tensor] = []
        measured = measure(model, batches, accelerator, channels_last, log, found=found)
        assert measured is not None  # only an Interrupt ends it early
        return measured, torch.cat(found)


@torch.no_grad()
def measure(
    network: nn.Module,
    data: Stream,
    accelerator: Accelerator,
    channels_last: bool,
    log: Log,
    interrupt: Interrupt | None = None,
    found: list[Tensor] | None = None,
) -> dict[str, float] | None:
    """Loss and accuracy over all processes; each image counts once.

    None where ``interrupt`` ended it. Several processes, which must leave together, go through with it.
    ``found`` gets, batch by batch, the rows of ``answers``.
    """
    network.eval()
    totals = torch.zeros(3, dtype=torch.float32, device=accelerator.device)
    for batch in data.batches(0):
        if interrupt is not None and interrupt.signal is not None and accelerator.num_processes == 1:
            return None
        log.complain(batch)
        images, targets = placed(batch, accelerator.device, channels_last)
        with accelerator.autocast():
            logits, _ = logits_of(network(images))
        check_targets(batch, logits.shape[1])
        counts = batch.counts.to(accelerator.device, non_blocking=True)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        right = (logits.argmax(1) == targets) & counts
        # Not losses[counts], whose size the host would have to wait for
        totals += torch.stack([losses.where(counts, losses.new_zeros(())).sum(), right.sum(), counts.sum()])
        if found is not None:
            likely = logits.topk(min(MOST_LIKELY, logits.shape[1]), dim=1).indices
            likely[:, 0] = logits.argmax(1)  # which of equals comes first must not depend on how many are asked for
            rows = torch.cat([torch.where(counts, targets, -1)[:, None], likely], dim=1)
            rows = accelerator.gather(accelerator.pad_across_processes(rows, pad_index=-1)).cpu()
            found.append(rows[rows[:, 0] >= 0])
    loss, correct, seen = accelerator.reduce(totals, "sum").tolist()
    return {"val_loss": loss / max(seen, 1), "val_accuracy": correct / max(seen, 1)}


def check_targets(batch: Batch, classes: int) -> None:
    """On the CPU: the same mistake found by a CUDA kernel ends the process."""
    targets = batch.targets
    if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex():
        raise RetrofitError(f"targets must be class numbers, got {targets.dtype} of shape {tuple(targets.shape)}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= classes:
        raise RetrofitError(
            f"the data has class {low if low < 0 else high}, and the network has classes 0 to {classes - 1}; "
            "num_classes=... in the config gives it a new head"
        )
