"""The training loop, from top to bottom."""

from __future__ import annotations

import itertools
import math
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError
from .callbacks import Callbacks
from .config import FinetuneConfig
from .criteria import Criterion
from .data import Batch, Stream
from .engine import called, in_any, logits_of, placed, share
from .evaluation import check_targets, hits, measure
from .learning import mixed
from .log import listening, log_gates, news_of_saturation, saturated_sites
from .parts import count, set_modes, trained_in
from .pictures import draw_hardest
from .randomness import UPDATE, seed_all
from .run import Epoch, FinetuneResult, Run
from .setup import Job, check, started


def finetune(
    model: nn.Module,
    train_data: Any,
    val_data: Any = None,
    *,
    config: FinetuneConfig | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    command: dict[str, Any] | None = None,
    quiet: bool = False,
    criterion: Criterion | None = None,
    teacher: nn.Module | None = None,
    distillation: tuple[float, float] = (0.5, 4.0),
    callbacks: Callbacks | None = None,
    stop: threading.Event | None = None,
) -> FinetuneResult:
    """Fine-tune a classifier, retrofitted or not, in place.

    Args:
        model: the network. On a GPU, it is trained there; otherwise on the current GPU, if any, where it stays.
        train_data: a Dataset of (image, class) pairs, or a DataLoader; a class is a number or a vector. PIL images of a
            Dataset get the transforms of the network's own config; tensors are used as they are.
        val_data: the same, for validation; without it, the last epoch is the result.
        config: the recipe.
        output_dir: folder for checkpoints, result, metrics and curves; None writes nothing.
        resume: whether to resume from the checkpoint in ``output_dir``, if any, with the same network, data and config.
        command: plain data to write into ``run.yaml`` in addition.
        quiet: whether to print nothing.
        criterion: a loss function of your own of ``(logits, targets)``, which returns the mean; the validation loss is
            cross-entropy in any case.
        teacher: a network for the same classes, from whose outputs the network also learns; it is not changed.
        distillation: the teacher's share of the loss, and the temperature by which the logits of both are divided.
        callbacks: functions that are called during the run; they are not part of the experiment.
        stop: an event; once it is set, the run finishes the current update, writes a checkpoint and raises ``Stopped``.

    Raises:
        RetrofitError: If config, data and network don't fit together; a folder can't be written or holds another run
            (the message says what differs); an image can't be read; or the loss is no longer finite.
        TypeError: If an argument is of the wrong type.
        Stopped: If ``stop`` was set.
    """
    job = Job(
        model, train_data, val_data, FinetuneConfig() if config is None else config, output_dir, resume, command, quiet,
        criterion, teacher, distillation, callbacks or Callbacks(), stop or threading.Event(),
    )  # fmt: skip
    check(job)
    with torch.inference_mode(False), torch.enable_grad(), started(job) as run:
        evaluate_before_training(run)
        for number in range(run.progress.epoch, run.epochs):
            if run.progress.finished is not None:
                break
            epoch = begin_epoch(run, number)
            train_epoch(run, epoch)
            finish_epoch(run, epoch)
        return finish(run)


def evaluate_before_training(run: Run) -> None:
    """Add row 0 of the history. Before any step, a retrofitted network computes what the original computed."""
    run.log.header()
    if run.val is None or run.progress.history:
        return
    measured, _ = validate(run, run.val)
    run.progress.history.append({"epoch": 0, **measured})
    run.log.row(run.progress.history[0])
    run.log.history(run.progress.history)
    run.tell(run.callbacks.after_evaluation, 0)


def begin_epoch(run: Run, number: int) -> Epoch:
    trained = trained_in(run.config, number)
    if trained != run.trained:
        run.choose(trained)
        run.log.note(f"epoch {number + 1}: all {count(run.model, True):,} parameters are trained from here on")
    set_modes(run.model, trained, run.config.freeze_bn)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    return Epoch(number, run.progress.seen)


def train_epoch(run: Run, epoch: Epoch) -> None:
    """Make the remaining updates of an epoch."""
    start = run.progress.step * run.config.grad_accum_steps
    every = windows(run.train.batches(epoch.number, start), run.config.grad_accum_steps)
    for batches in itertools.islice(every, run.updates_in_epoch - run.progress.step):
        last = run.progress.step == run.updates_in_epoch - 1
        unheard = run.val is None and not run.config.compile  # no hooks in compiled code
        with listening(run.model, last and unheard) as gates:
            tally = update(run, batches)
        if gates is not None:  # without validation, the last update shows which gates are saturated
            epoch.saturated = saturated_sites(gates)
        epoch.pending.append(tally)
        if run.callbacks.after_update is not None:
            run.tell(run.callbacks.after_update, epoch.number + 1, tally[0] / tally[2])
        told = run.stop.is_set() and run.world == 1  # several processes stop together, in ``look``
        if told or last or run.progress.step % run.config.log_every == 0:
            look(run, epoch)


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield the batches of one update after the other."""
    while window := list(itertools.islice(batches, size)):
        yield window


def update(run: Run, batches: list[Batch]) -> Tensor:
    """Update the weights once; return sums over the batches: loss, correct, seen, batches with non-finite images."""
    seed_all(run.config.seed, UPDATE, run.rank, run.progress.updates)
    run.optimizer.zero_grad(set_to_none=True)
    tally = torch.zeros(4, device=run.device)
    for number, batch in enumerate(batches):
        run.log.complain(batch)
        last = number == len(batches) - 1
        # The form ends with each step: a checkpoint, an evaluation or a caller's hook sees the network's own classes
        with run.form, run.accelerator.no_sync(run.network) if not last else nullcontext():
            loss, correct, broken = loss_of(run, batch)
            run.accelerator.backward(loss / len(batches))
        seen = torch.full_like(correct, len(batch.targets))
        tally += torch.stack([loss.detach() * len(batch.targets), correct, seen, broken])
    if run.config.clip_grad is not None:
        run.accelerator.clip_grad_norm_(run.network.parameters(), run.config.clip_grad)
    run.optimizer.step()
    run.progress.step += 1
    run.progress.updates += 1
    if run.learning.schedule is not None:
        run.learning.schedule.step_update(run.progress.updates)
    if run.learning.ema is not None:
        run.learning.ema.update(run.model, step=run.progress.updates)
    return tally


def loss_of(run: Run, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of a batch, the number of correct images, and whether a value in the images is not finite."""
    images, targets = placed(batch, run.device)
    inputs, labels = images, targets
    if run.learning.mixup is not None:
        check_targets(batch, run.learning.mixup.num_classes)
        if targets.dim() != 1:
            raise RetrofitError("mixup and cutmix need class numbers as targets, and these are vectors")
        inputs, labels = mixed(run.learning.mixup, images, targets)
    logits, auxiliary = called(run.network, inputs)
    check_targets(batch, logits.shape[1], run.config.multi_label)
    taught = None
    if run.losses.teacher is not None:
        with torch.no_grad(), run.accelerator.autocast():
            taught, _ = logits_of(run.losses.teacher(inputs))
    loss = run.losses(logits, auxiliary, labels, taught)
    return loss, hits(logits.detach(), targets, run.config.multi_label).sum(), ~images.isfinite().all()


def look(run: Run, epoch: Epoch) -> None:
    """Log the last updates, and stop or write a checkpoint if due. Only here does the loop wait for the device."""
    progress = run.progress
    due = time.monotonic() - run.saved_at >= 60 * run.config.checkpoint_minutes
    sums, stop, due = agree(run, epoch, due)
    run.check_losses(sums)
    for loss, correct, seen, _ in sums:
        progress.loss += loss
        progress.correct += correct
        progress.seen += seen
    now = time.perf_counter()
    images = sum(seen for _, _, seen, _ in sums)
    if progress.step > run.config.log_every:  # the first interval of an epoch includes the start of the loaders
        run.step_times.append((now - epoch.looked) / len(sums))
    entry = {
        "update": progress.updates,
        "epoch": epoch.number + 1,
        "loss": sum(loss for loss, *_ in sums) / images,
        "lr": run.lr,
        "images_per_second": images / (now - epoch.looked),
    }
    run.log.update(epoch.number + 1, progress.step, entry, progress.correct / progress.seen)
    run.accelerator.log({"train/loss": entry["loss"], "train/lr": entry["lr"]}, step=progress.updates)
    epoch.pending = []
    if stop:
        run.leave()
    if due and run.train.resumes_within and progress.step < run.updates_in_epoch:
        run.keep_checkpoint()
        now = time.perf_counter()
    epoch.looked = now


def agree(run: Run, epoch: Epoch, due: bool) -> tuple[list[list[float]], bool, bool]:
    """Return the last updates' sums over all processes, and whether to stop and to write a checkpoint."""
    flags = torch.tensor([float(run.stop.is_set()), float(due and run.rank == 0), 0.0, 0.0], device=run.device)
    *sums, flags = run.accelerator.reduce(torch.stack([*epoch.pending, flags]), "sum").tolist()
    return sums, flags[0] > 0, flags[1] > 0


def validate(run: Run, data: Stream) -> tuple[dict[str, Any], dict[str, float]]:
    """Return scores and gate statistics on the validation data, and the saturated sites; on ``stop``, leave the run."""
    network = run.network if run.learning.ema is None else run.learning.ema.module
    with listening(run.tested) as gates:
        found = measure(network, data, run.accelerator, run.config.multi_label, run.log, stop=run.stop)
    if found is None:
        run.leave()
    scores: dict[str, Any] = {f"val_{name}": value for name, value in found.scores().items()}
    if f"val_{run.config.best_metric}" not in scores:
        raise RetrofitError(
            f"best_metric={run.config.best_metric!r} needs more than 5 classes, got {len(found.classes)}"
        )
    scores["hardest"] = found.hardest()
    if gates is not None:
        scores["gates"] = log_gates(gates, run.accelerator.trackers, run.progress.updates)
    return scores, saturated_sites(gates)


def finish_epoch(run: Run, epoch: Epoch) -> None:
    """Evaluate the network, save it if it is the best so far, and write a checkpoint."""
    ema, number = run.learning.ema, epoch.number + 1
    if run.world > 1:
        # running statistics differ between processes, but the network that is evaluated must be the one that is saved
        share([*run.model.buffers(), *(ema.module.buffers() if ema is not None else ())])
    row = training_row(run, epoch)
    if run.val is not None:
        measured, epoch.saturated = validate(run, run.val)
        row.update(measured)
    row.update({"saturated": epoch.saturated} if epoch.saturated else {})
    take_note(run, row)
    run.check_weights()
    # best before last: after a kill between the two, the end of the epoch is repeated with the same result
    if run.progress.stale == 0 and (run.val is not None or run.progress.finished is not None):
        run.keep_best()
    run.keep_checkpoint()
    run.log.row(row)
    if news := news_of_saturation(run.tested, run.progress.history):
        run.log.note(news)
    run.log.history(run.progress.history)
    figures = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    run.accelerator.log(figures, step=run.progress.updates)
    if run.val is not None:
        run.tell(run.callbacks.after_evaluation, number)
    run.tell(run.callbacks.after_epoch, number)
    # Processes may have been stopped at different moments: all leave together or none does
    if run.progress.finished is None and in_any(run.accelerator, run.stop.is_set()):
        run.leave(with_checkpoint=False)


def training_row(run: Run, epoch: Epoch) -> dict[str, Any]:
    progress, seconds = run.progress, time.perf_counter() - epoch.began
    row = {
        "epoch": epoch.number + 1,
        "train_loss": progress.loss / progress.seen,
        "train_accuracy": progress.correct / progress.seen,
        "lr": run.lr,
        "images_per_second": (progress.seen - epoch.seen_before) / seconds,
        "seconds": seconds,
    }
    if run.device.type == "cuda":
        row["peak_memory_mb"] = torch.cuda.max_memory_allocated(run.device) / 2**20
    return row


def take_note(run: Run, row: dict[str, Any]) -> None:
    """Add an epoch to the history, and check whether it was the best, and whether it is the last."""
    progress, config = run.progress, run.config
    progress.history.append(row)
    if run.step_times:
        progress.step_seconds = statistics.median(run.step_times)
    if run.val is not None:
        score = row[f"val_{config.best_metric}"]
        sign = -1 if config.best_metric == "loss" else 1
        # NaN, from a loss that overflows, is worse than any number
        improved = (
            progress.best is None
            or sign * score > sign * progress.best
            or (score == score and math.isnan(progress.best))
        )
        if improved:
            progress.best, progress.best_epoch = score, row["epoch"]
        progress.stale = 0 if improved else progress.stale + 1
    progress.epoch, progress.step = row["epoch"], 0
    progress.loss = progress.correct = progress.seen = 0.0
    if progress.epoch == run.epochs:
        progress.finished = "epochs" if run.updates == config.epochs * run.updates_per_epoch else "updates"
    elif config.patience is not None and progress.stale >= config.patience:
        progress.finished = "early stop"


def finish(run: Run) -> FinetuneResult:
    """Write the last files, print the result and return it."""
    result = run.result()
    run.log.history(run.progress.history)
    run.log.pictures(run.progress.history, partial(draw_hardest, run))
    for line in str(result).splitlines():
        run.log.note(line)
    run.tell(run.callbacks.after_training, run.progress.epoch)
    return result
