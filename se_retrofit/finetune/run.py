"""The state of a fine-tune that its loop, evaluation and checkpoints share; and its result."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import RetrofitError
from ..tables import as_html
from .callbacks import Callback, Callbacks, Facts
from .checkpoint import Folder, Progress, has_checkpoint
from .config import FinetuneConfig
from .criteria import Losses
from .data import Stream
from .engine import Forward, TrainingForm, by_main_process
from .learning import Learning, length_of
from .log import Log
from .parts import choose_trainable, count, trained_in

RATES = "Try a lower lr, clip_grad, a longer warmup, or precision fp32."
PIXELS = "Look for NaN and infinities in the data, and for divisions in its transforms."


class Stopped(Exception):
    """Raised when a fine-tune ends early because its ``stop`` was set."""


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tune.

    Attributes:
        model: the network that was given, with the weights of the best epoch (the last one, without validation data).
        history: a row for each epoch, as in ``metrics.jsonl``; row 0 is the evaluation before any step.
        best_epoch: the best epoch by the config's ``best_metric``, from 1; None without validation data.
        best_score: the value of that metric in the best epoch.
        best_accuracy: the validation accuracy in the best epoch.
        stopped: ``"epochs"`` after all epochs, ``"updates"`` after ``max_updates``, ``"early stop"`` by ``patience``.
        directory: ``output_dir/best``, which ``load_retrofitted`` loads; None if nothing was written.
        updates: number of updates of the weights.
        step_seconds: median time of an update, including data loading; None if the run is too short to measure it.
        parameters: number of the network's parameters.
        trained_parameters: number of the parameters that were trained in the end.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best_accuracy: float | None
    best_score: float | None
    best_epoch: int | None
    stopped: str
    directory: Path | None
    updates: int
    step_seconds: float | None
    parameters: int
    trained_parameters: int

    def _repr_html_(self) -> str:
        names = dict.fromkeys(k for row in self.history for k, value in row.items() if isinstance(value, (int, float)))
        rows = [["" if name not in row else f"{row[name]:.4g}" for name in names] for row in self.history]
        return as_html(
            [list(names), *rows], left=0, above=f"{type(self.model).__name__}, fine-tuned", below=[str(self)]
        )

    def __str__(self) -> str:
        """The best accuracy, and where the result is."""
        lines = []
        if self.best_accuracy is not None:
            first = self.history[0].get("val_accuracy") if self.history[0]["epoch"] == 0 else None
            before = f" (before training {first:.2%})" if first is not None else ""
            lines.append(f"best validation accuracy {self.best_accuracy:.2%} in epoch {self.best_epoch}{before}")
        if self.stopped == "early stop":
            lines.append(f"stopped early, after epoch {self.history[-1]['epoch']}")
        if self.directory is not None:
            lines.append(f"result: {self.directory} (load_retrofitted), curves and metrics beside it")
        return "\n".join(lines)


@dataclass
class Epoch:
    """The current epoch."""

    number: int  # from 0
    seen_before: float  # number of its images that were seen before the run was resumed
    began: float = field(default_factory=time.perf_counter)
    looked: float = field(default_factory=time.perf_counter)  # when the loss was last logged
    pending: list[Tensor] = field(default_factory=list)  # results of ``update`` that have not been logged yet
    saturated: dict[str, float] = field(default_factory=dict)  # sites with the fraction of their gates


@dataclass
class Run:
    """The state of a fine-tune. ``network`` and ``optimizer`` are the model and the optimizer of ``learning``, wrapped by
    Accelerate for devices and processes."""

    model: nn.Module
    config: FinetuneConfig
    accelerator: Accelerator
    wanted: dict[str, bool]  # the network's own ``requires_grad`` flags
    train: Stream
    val: Stream | None
    learning: Learning
    losses: Losses
    form: TrainingForm  # the classes that modules have during a training step
    folder: Folder | None
    log: Log
    callbacks: Callbacks
    stop: threading.Event  # once this is set, the run ends after a checkpoint
    progress: Progress = field(default_factory=Progress)
    first_weights: dict[str, Tensor] = field(default_factory=dict)  # before the first update, on the CPU
    best_weights: dict[str, Tensor] | None = None  # of the best epoch so far, on the CPU
    saved_at: float = field(default_factory=time.monotonic)
    step_times: list[float] = field(default_factory=list)  # seconds per update, each time that the loss was logged

    def __post_init__(self) -> None:
        self.device: torch.device = self.accelerator.device
        self.world: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.updates_per_epoch = math.ceil(len(self.train) / self.config.grad_accum_steps)
        self.epochs, self.updates = length_of(self.config, self.updates_per_epoch)
        self.choose(trained_in(self.config, 0))

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated and saved: the one with averaged weights, if there is one."""
        return self.model if self.learning.ema is None else self.learning.ema.module

    @property
    def updates_in_epoch(self) -> int:
        """Number of updates in the current epoch, which may be cut short."""
        return min(self.updates_per_epoch, self.updates - self.progress.epoch * self.updates_per_epoch)

    @property
    def lr(self) -> float:
        """The learning rate, without the factors for SE and head."""
        group = self.learning.optimizer.param_groups[0]
        scale = group.get("lr_scale", 1.0)
        return float(group["lr"]) / scale if scale else 0.0

    def choose(self, trained: str) -> None:
        """Train this part of the network from now on. It is wrapped again, because DDP must know what is trained."""
        self.trained = trained
        choose_trainable(self.model, trained, self.wanted)
        if hasattr(self, "network"):
            self.accelerator.free_memory()
        self.network, self.optimizer = self.accelerator.prepare(Forward(self.model), self.learning.optimizer)

    def keep_checkpoint(self) -> None:
        """Write ``last/``, after checking that all weights are finite."""
        if self.folder is not None:
            self.check_weights()
            parts: dict[str, Any] = {"optimizer": self.learning.optimizer.state_dict()}
            if self.learning.ema is not None:
                parts["ema"] = self.learning.ema.module.state_dict()
            if self.accelerator.scaler is not None:
                parts["scaler"] = self.accelerator.scaler.state_dict()
            by_main_process(self.accelerator, partial(self.folder.save, self.model, self.progress, parts))
        self.saved_at = time.monotonic()

    def keep_best(self) -> None:
        """Write ``best/``, and keep its weights in memory."""
        self.best_weights = weights_of(self.tested)
        if self.folder is not None:
            by_main_process(self.accelerator, partial(self.folder.save_best, self.tested))

    def result(self) -> FinetuneResult:
        """Load the best weights into the network, and return the result of the run."""
        if self.best_weights is None and self.folder is not None:
            self.best_weights = self.folder.load_best()
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
            directory=None if self.folder is None else self.folder.best,
            updates=progress.updates,
            step_seconds=progress.step_seconds,
            parameters=count(self.model),
            trained_parameters=count(self.model, trainable=True),
        )

    def leave(self, *, with_checkpoint: bool = True) -> NoReturn:
        """End the run because ``stop`` was set, with a checkpoint if its data can resume within an epoch."""
        if with_checkpoint and self.train.resumes_within:
            self.keep_checkpoint()
        said = f"stopped{self._kept('; {} is complete, and resume goes on from it')}"
        self.log.note(said)
        raise Stopped(said)

    def check_losses(self, sums: Sequence[Sequence[float]]) -> None:
        """Raise an error for the first of the last updates whose loss is not finite."""
        for number, (loss, _, seen, broken) in enumerate(sums, 1):
            if not math.isfinite(loss):
                what = "the images hold values that are not finite" if broken else f"the loss became {loss / seen}"
                self._diverged(what, len(sums) - number, PIXELS if broken else RATES)

    def begin_with(self) -> None:
        """Keep the initial weights, and raise an error if they are not usable."""
        self.first_weights = weights_of(self.model)
        parameters = dict(self.model.named_parameters())
        for name in not_finite(self.model):
            if name in parameters or self.first_weights[name].isnan().any():
                raise RetrofitError(f"{name} of the network is not finite before any training: check its weights")

    def check_weights(self) -> None:
        """Raise an error if a weight is no longer finite, which must not be saved. The loss may be finite even so."""
        for name in not_finite(self.model):
            before = self.first_weights.get(name)
            if before is None or before.isfinite().all():  # a mask may hold infinities from the start
                self._diverged(f"{name} is no longer finite", 0, RATES)

    def _diverged(self, what: str, behind: int, cure: str) -> NoReturn:
        """Restore the last weights that are known to be good, and raise an error."""
        self.model.load_state_dict(self.best_weights or self.first_weights)
        back = "the weights of its best epoch" if self.best_weights else "the weights that it began with"
        progress, step = self.progress, self.progress.step - behind
        raise RetrofitError(
            f"{what} in epoch {progress.epoch + 1 if step else progress.epoch}, update {progress.updates - behind}"
            f"{f' (number {step} of the epoch)' if step else ''}. {cure} The network has {back}."
            f"{self._kept(' The last good checkpoint is {}.')}"
        )

    def _kept(self, sentence: str) -> str:
        """Return the sentence with the checkpoint's folder filled in; empty if there is no checkpoint."""
        folder = self.folder
        return sentence.format(folder.last) if folder is not None and has_checkpoint(folder.path) else ""

    def tell(self, callback: Callback | None, epoch: int, loss: Tensor | None = None) -> None:
        """Call the caller's function for an event, if there is one."""
        if callback is None:
            return
        rows = tuple(MappingProxyType(dict(row)) for row in self.progress.history)
        output = None if self.folder is None else self.folder.path
        facts = Facts(
            self.model, self.tested, epoch, self.epochs, self.progress.updates, self.lr, loss, rows, output,
            self.rank,
        )  # fmt: skip
        callback(facts)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the state dict to the CPU, including the extra state of modules, which may be of any type."""
    state = model.state_dict().items()
    return {key: v.detach().to("cpu", copy=True) if isinstance(v, Tensor) else copy.deepcopy(v) for key, v in state}


def not_finite(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers in the state dict that hold NaN or infinities."""
    floating = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor) and t.is_floating_point()}
    return [name for name, t in floating.items() if not bool(torch.isfinite(t).all())]
