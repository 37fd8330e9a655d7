"""A fine-tune that is under way: all that its loop, its evaluation and its checkpoints share."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import RetrofitError
from ..models import Base
from . import checkpoint as disk
from .callbacks import Callback, Callbacks, Facts
from .checkpoint import Progress
from .config import FinetuneConfig
from .criteria import Criterion
from .data import Batch, Stream
from .engine import Forward, Interrupt
from .form import TrainingForm
from .freezing import choose_trainable
from .groups import group_summary
from .log import Log
from .parts import count, kept_state, layout_of
from .result import FinetuneResult

__all__ = ["Run", "share"]


@dataclass
class Run:
    """The state of a fine-tune.

    Attributes:
        model: the caller's network; ``network`` is what is called in training, wrapped for devices and processes.
        wanted: the network's own ``requires_grad`` flags.
        output: the run's folder, None for none; ``base`` and ``experiment`` are written into it.
        train, val: this process's batches.
        form: the classes that modules have during a training step.
        raw_optimizer: holds the state; ``optimizer`` is the same one wrapped by Accelerate.
        trained: the part that is trained now.
        best_weights: the state dict of the best epoch so far, on the CPU.
        pending: loss, correct and seen of updates that have not been looked at yet, on the device.
        saturated: the sites whose gates were last seen to be saturated, with the share.
        looked, began: when the last look and the epoch began; ``seen_before`` is what had been seen then.
    """

    model: nn.Module
    config: FinetuneConfig
    accelerator: Accelerator
    interrupt: Interrupt
    wanted: dict[str, bool]
    output: Path | None
    base: Base | None
    experiment: dict[str, Any]
    train: Stream
    val: Stream | None
    progress: Progress
    raw_optimizer: torch.optim.Optimizer
    schedule: Any
    ema: ModelEmaV3 | None
    criterion: Criterion
    teacher: nn.Module | None
    mixup: Mixup | None
    form: TrainingForm
    log: Log
    callbacks: Callbacks
    trained: str = ""
    best_weights: dict[str, Tensor] | None = None
    saved_at: float = field(default_factory=time.monotonic)
    pending: list[Tensor] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    saturated: dict[str, float] = field(default_factory=dict)
    began: float = 0.0
    looked: float = 0.0
    seen_before: float = 0.0

    def __post_init__(self) -> None:
        self.device: torch.device = self.accelerator.device
        self.world: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.channels_last = uses_channels_last(self.config, self.device)
        self.updates_per_epoch = math.ceil(len(self.train) / self.config.grad_accum_steps)

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated and kept: the average of the weights, where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def lr(self) -> float:
        """The learning rate without the scales of SE and head."""
        group = self.raw_optimizer.param_groups[0]
        scale = group.get("lr_scale", 1.0)
        return float(group["lr"]) / scale if scale else 0.0

    def choose(self, trained: str) -> None:
        """Train this part of the network from here on. The wrappers are made anew: DDP must know what is trained."""
        self.trained = trained
        choose_trainable(self.model, trained, self.wanted)
        self.accelerator.free_memory()
        self.network, self.optimizer = self.accelerator.prepare(Forward(self.model), self.raw_optimizer)

    def place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images and targets of a batch on the device."""
        return placed(batch, self.device, self.channels_last)

    # On disk

    def keep_checkpoint(self) -> None:
        """Write ``last/``, once all weights are seen to be finite."""
        if self.output is not None:
            self.check_weights()
            if self.rank == 0:
                with self.interrupt.held():
                    disk.save_training(
                        self.output, self.model, self.progress, self.config.to_dict(), self.experiment, self._states(),
                        world=self.world, base=self.base,
                    )  # fmt: skip
            self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _states(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"optimizer": self.raw_optimizer.state_dict()}
        if self.ema is not None:
            kept["ema"] = self.ema.module.state_dict()
        if self.accelerator.scaler is not None:
            kept["scaler"] = self.accelerator.scaler.state_dict()
        return kept

    def keep_best(self) -> None:
        """Write ``best/``, and keep its weights in memory."""
        self.best_weights = kept_state(self.tested)
        if self.output is not None and self.rank == 0:
            with self.interrupt.held():
                disk.write_best(self.output, self.tested, base=self.base)

    # What ends it

    def heed_signal(self) -> None:
        """End on a signal that came when the run was over."""
        if self.interrupt.signal is not None:
            self.log.note("the run is complete")
            self._end(self.interrupt.signal)

    def leave(self, number: int | None) -> NoReturn:
        """End the run on a signal, after its checkpoint."""
        there = self.output is not None and disk.has_checkpoint(self.output)
        complete = f"; the checkpoint in {self.output}/{disk.LAST} is complete; rerun with resume to go on from it"
        self.log.note("stopped" + (complete if there else ""))
        self._end(number)

    def _end(self, number: int | None) -> NoReturn:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (number or 0))

    def check_losses(self, losses: list[float]) -> None:
        """Raise where one of the last updates had a loss that is not finite."""
        for behind, loss in enumerate(reversed(losses)):
            if not math.isfinite(loss):
                self._diverged(f"the loss became {loss}", behind)

    def check_weights(self) -> None:
        """Raise where a weight is no longer finite: a loss can be, and its gradient not; what is written must be good."""
        for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                self._diverged(f"{name} is no longer finite", 0)

    def _diverged(self, what: str, behind: int) -> NoReturn:
        progress, step = self.progress, self.progress.step - behind
        kept = ""
        if self.output is not None and disk.has_checkpoint(self.output):
            kept = f" The last good checkpoint is {self.output / disk.LAST}."
        raise RetrofitError(
            f"{what} in epoch {progress.epoch + 1 if step else progress.epoch}, update {progress.updates - behind}"
            f"{f' (number {step} of the epoch)' if step else ''}. "
            f"Try a lower lr, clip_grad, a longer warmup, or precision fp32.{kept}"
        )

    def tell(self, callback: Callback | None, epoch: int, loss: Tensor | None = None) -> None:
        """Call the caller's function for an event, where there is one."""
        if callback is None:
            return
        rows = tuple(MappingProxyType(dict(row)) for row in self.progress.history)
        callback(
            Facts(
                self.model, self.tested, epoch, self.config.epochs, self.progress.updates, self.lr, loss, rows, self.output,
                self.rank,
            )
        )  # fmt: skip

    def result(self) -> FinetuneResult:
        """The network with its best weights, and what is told of the run."""
        if self.best_weights is None and self.output is not None:
            self.best_weights = disk.load_best(self.output)
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        progress = self.progress
        best_row = next((row for row in progress.history if row["epoch"] == progress.best_epoch), {})
        return FinetuneResult(
            model=self.model,
            history=progress.history,
            best_accuracy=best_row.get("val_accuracy"),
            best_score=progress.best,
            best_epoch=progress.best_epoch,
            stopped=progress.finished or "epochs",
            directory=None if self.output is None else self.output / disk.BEST,
            updates=progress.updates,
            step_seconds=progress.step_seconds,
            parameters=count(self.model),
            trained_parameters=count(self.model, trainable=True),
            groups=group_summary(self.raw_optimizer.param_groups),
        )

    def note_pace(self) -> None:
        """The median time of an update so far, for the result."""
        if self.step_times:
            self.progress.step_seconds = statistics.median(self.step_times)


def uses_channels_last(config: FinetuneConfig, device: torch.device) -> bool:
    return device.type == "cuda" if config.channels_last is None else config.channels_last


def placed(batch: Batch, device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor]:
    layout = layout_of(batch.images) if channels_last else torch.preserve_format
    images = batch.images.to(device, non_blocking=True, memory_format=layout)
    targets = batch.targets if batch.targets.dim() == 1 else batch.targets.float()
    return images, targets.to(device, non_blocking=True)


@torch.no_grad()
def share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that the main one has."""
    for tensor in tensors:
        tensor.copy_(broadcast(tensor.clone()))
