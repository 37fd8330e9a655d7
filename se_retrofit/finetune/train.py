"""The training loop, top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from ..errors import RetrofitError
from ..models import Base
from . import setup
from .callbacks import Callbacks, checked_callbacks
from .config import FinetuneConfig
from .criteria import Criterion, checked_criterion, checked_loss, distillation_loss
from .data import Batch
from .engine import called, logits_of
from .evaluation import check_targets, hits, measure
from .freezing import set_modes, trained_in
from .gates import listening, log_gates, news_of_saturation, saturated_sites
from .parts import count
from .randomness import UPDATE, seed_all
from .result import FinetuneResult
from .run import Run, share

__all__ = ["finetune"]

AUXILIARY_WEIGHT = 0.3  # of GoogLeNet's and Inception's auxiliary losses, as in the papers


def finetune(
    model: nn.Module,
    train_data: Any,
    val_data: Any = None,
    *,
    config: FinetuneConfig | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    base: Base | None = None,
    command: dict[str, Any] | None = None,
    quiet: bool = False,
    criterion: Criterion | None = None,
    teacher: nn.Module | None = None,
    callbacks: Callbacks | None = None,
) -> FinetuneResult:
    """Fine-tune a classifier, retrofitted or not, in place.

    Args:
        model: the network; it ends on the device that it was trained on.
        train_data: a Dataset of (image, class) pairs, or a DataLoader. A class is a number, or a vector: soft labels, or
            0 and 1 with the config's ``multi_label``. A Dataset's PIL images get the transforms of the
            network's own config (size, mean, std, interpolation); tensors are taken as they are.
        val_data: the same, for validation; without it the last epoch is the result.
        config: the recipe.
        output_dir: folder for checkpoints, result, metrics and curves; None writes nothing.
        resume: go on from the checkpoint in ``output_dir``; where there is none yet, start. The network with its
            starting weights, its SE, the data and the config must be those that the run began with.
        base: where the network came from before the retrofit, for the saved recipe; timm's networks tell it themselves.
        command: what ``run.yaml`` is to hold besides, as plain data; the command line writes its options there.
        quiet: print nothing.
        criterion: a loss of your own, a function or module of ``(logits, targets)`` that returns the mean; None for the
            config's. It must not have parameters. The validation loss is cross-entropy (binary with ``multi_label``) all
            the same.
        teacher: a network for the same classes, whose answers to the same images are learned, too, by the config's
            ``distillation_weight``. It is moved to the device and not changed.
        callbacks: functions of yours, called after each update, evaluation and epoch; not part of the experiment.

    Returns:
        The network and its history.

    Raises:
        RetrofitError: config, data and network don't fit together; a folder can't be written or holds another run
            (the message names what differs); an image can't be read; the loss is no longer finite.
        TypeError: an argument is of the wrong type.
        KeyboardInterrupt: Ctrl-C; a checkpoint has been written.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.finetune import FinetuneConfig, finetune, load_data
        >>> model = add_se(timm.create_model("resnet10t", num_classes=10))
        >>> data = load_data("digits", image_size=8)
        >>> result = finetune(model, data.val, data.val, config=FinetuneConfig(epochs=1), quiet=True)
        >>> len(result.history)
        2
    """
    config = FinetuneConfig() if config is None else config
    checked_criterion(criterion, teacher, model)
    callbacks = checked_callbacks(callbacks)
    output = setup.checked(model, config, output_dir, resume)
    if config.patience is not None and val_data is None:
        raise RetrofitError("patience needs validation data")
    with torch.inference_mode(False), torch.enable_grad(), setup.start_run(
        model, train_data, val_data, config, output, resume=resume, base=base, command=command, quiet=quiet,
        criterion=criterion, teacher=teacher, callbacks=callbacks,
    ) as run:  # fmt: skip
        evaluate_before_training(run)
        for epoch in range(run.progress.epoch, config.epochs if run.progress.finished is None else 0):
            train_epoch(run, epoch)
            finish_epoch(run, epoch)
            if run.progress.finished is not None:
                break
        return finish(run)


def evaluate_before_training(run: Run) -> None:
    """Row 0 of the history: before any step, a retrofitted network is the one that it was made from."""
    run.log.header()
    if run.val is None or run.progress.history:
        return
    measured = validate(run)
    run.progress.history.append({"epoch": 0, **measured})
    run.log.row(run.progress.history[0])
    run.log.history(run.progress.history)
    run.tell(run.callbacks.after_evaluation, 0)


def train_epoch(run: Run, epoch: int) -> None:
    """All updates of an epoch that have not been made yet."""
    begin_epoch(run, epoch)
    start = run.progress.step * run.config.grad_accum_steps
    for batches in windows(run.train.batches(epoch, start), run.config.grad_accum_steps):
        last = run.progress.step == run.updates_per_epoch - 1
        unheard = run.val is None and not run.config.compile  # compiled code would not be heard
        tally = update_and_listen(run, batches) if last and unheard else update(run, batches)
        run.pending.append(tally)
        run.tell(run.callbacks.after_update, epoch + 1, tally[0] / tally[2])
        if is_time_to_look(run):
            look(run, epoch)


def update_and_listen(run: Run, batches: list[Batch]) -> Tensor:
    """The last update of an epoch that no validation follows: what saturated gates there are is found in it."""
    with listening(run.model) as gates:
        tally = update(run, batches)
    run.saturated = saturated_sites(gates)
    return tally


def begin_epoch(run: Run, epoch: int) -> None:
    trained = trained_in(run.config, epoch)
    if trained != run.trained:
        run.choose(trained)
        run.log.note(f"epoch {epoch + 1}: all {count(run.model, True):,} parameters are trained from here on")
    set_modes(run.model, trained, run.config.freeze_bn)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    run.began = run.looked = time.perf_counter()
    run.seen_before = run.progress.seen
    run.pending = []


def windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one update, and the next, ..."""
    while window := list(itertools.islice(batches, size)):
        yield window


def update(run: Run, batches: list[Batch]) -> Tensor:
    """One change of the weights; loss, correct and seen, summed over the batches, still on the device."""
    seed_all(run.config.seed, UPDATE, run.rank, run.progress.updates)
    run.optimizer.zero_grad(set_to_none=True)
    tally = torch.zeros(3, device=run.device)
    for number, batch in enumerate(batches):
        run.log.complain(batch)
        last = number == len(batches) - 1
        # The form ends with each step: a checkpoint, an evaluation or a caller's hook finds the network's own classes
        with run.form, contextlib.nullcontext() if last else run.accelerator.no_sync(run.network):
            loss, correct = loss_of(run, batch)
            run.accelerator.backward(loss / len(batches))
        seen = torch.full_like(correct, len(batch.targets))
        tally += torch.stack([loss.detach() * len(batch.targets), correct, seen])
    if run.config.clip_grad is not None:
        run.accelerator.clip_grad_norm_(run.network.parameters(), run.config.clip_grad)
    run.optimizer.step()
    run.progress.step += 1
    run.progress.updates += 1
    if run.schedule is not None:
        run.schedule.step_update(run.progress.updates)
    if run.ema is not None:
        run.ema.update(run.model, step=run.progress.updates)
    return tally


def loss_of(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and how many of its images were classified correctly."""
    images, targets = run.place(batch)
    inputs, labels = images, targets
    if run.mixup is not None:
        check_targets(batch, run.mixup.num_classes)
        if targets.dim() != 1:
            raise RetrofitError("mixup and cutmix need class numbers as targets, and these are vectors")
        inputs, labels = mixed(run.mixup, images, targets)
    logits, auxiliary = called(run.network, inputs)
    check_targets(batch, logits.shape[1], run.config.multi_label)
    loss = checked_loss(run.criterion(logits, labels))
    for more in auxiliary:
        loss = loss + AUXILIARY_WEIGHT * checked_loss(run.criterion(more, labels))
    if run.teacher is not None:
        with torch.no_grad(), run.accelerator.autocast():
            taught, _ = logits_of(run.teacher(inputs))
        part = run.config.distillation_weight
        loss = (1 - part) * loss + part * distillation_loss(logits, taught, run.config)
    return loss, hits(logits.detach(), targets, run.config.multi_label).sum()


def mixed(mixup: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images and their soft labels. timm mixes pairs: the last image of an odd batch stays as it is."""
    if images.dim() < 4 and mixup.cutmix_alpha:
        raise RetrofitError(
            f"cutmix cuts rectangles out of images of two dimensions or more, got inputs of shape {tuple(images.shape)}; "
            "set cutmix=0, mixup takes inputs of every shape"
        )
    pairs = len(targets) // 2 * 2
    parts = []
    if pairs:
        some = images[:pairs].clone()  # timm works in place
        # and cuts the first two dimensions after the channels, where the area that it counts is the last two's
        flat, labels = mixup(some.flatten(1, -3) if some.dim() > 4 else some, targets[:pairs])
        parts.append((flat.view_as(some), labels))
    if pairs < len(targets):
        labels = mixup_target(targets[pairs:].repeat(2), mixup.num_classes, 1.0, mixup.label_smoothing)[:1]
        parts.append((images[pairs:], labels))
    inputs, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return inputs, labels


def is_time_to_look(run: Run) -> bool:
    told = run.interrupt.signal is not None and run.world == 1  # several processes stop together, at a look
    return told or run.progress.step % run.config.log_every == 0 or run.progress.step >= run.updates_per_epoch


def look(run: Run, epoch: int) -> None:
    """Log the last updates and stop or write a checkpoint where that is due: the only place where the loop waits for the
    device and for the other processes."""
    progress = run.progress
    due = time.monotonic() - run.saved_at >= 60 * run.config.checkpoint_minutes
    sums, stop, due = agree(run, due)
    run.check_losses([loss for loss, _, _ in sums])
    for loss, correct, seen in sums:
        progress.loss += loss
        progress.correct += correct
        progress.seen += seen
    now = time.perf_counter()
    images = sum(seen for _, _, seen in sums)
    if progress.step > run.config.log_every:  # the first look of an epoch includes the loaders' start
        run.step_times.append((now - run.looked) / len(sums))
    entry = {
        "update": progress.updates,
        "epoch": epoch + 1,
        "loss": sum(loss for loss, _, _ in sums) / images,
        "lr": run.lr,
        "images_per_second": images / (now - run.looked),
    }
    run.log.update(epoch + 1, progress.step, entry, progress.correct / progress.seen)
    run.accelerator.log({"train/loss": entry["loss"], "train/lr": entry["lr"]}, step=progress.updates)
    run.looked, run.pending = now, []
    if run.train.resumes_within and (stop or (due and progress.step < run.updates_per_epoch)):
        run.keep_checkpoint()
        run.looked = time.perf_counter()
    if stop:
        run.leave(stop)


def agree(run: Run, due: bool) -> tuple[list[tuple[float, float, float]], int, bool]:
    """The sums of the last updates over all processes, and what all agree on: the signal to stop on, or 0, and whether to
    write a checkpoint."""
    number = run.interrupt.signal
    terminated, interrupted = float(number == signal.SIGTERM), float(number == signal.SIGINT)
    flags = torch.tensor([terminated, interrupted, float(due and run.rank == 0)], device=run.device)
    *sums, flags = run.accelerator.reduce(torch.stack([*run.pending, flags]), "sum").tolist()
    terminated, interrupted, wanted = flags
    stop = signal.SIGINT if interrupted else signal.SIGTERM if terminated else 0
    return [(loss, correct, seen) for loss, correct, seen in sums], int(stop), wanted > 0


def validate(run: Run) -> dict[str, Any]:
    """Scores on the validation data, and what the gates did there. A signal ends it, after a checkpoint of the last update:
    what is resumed begins with the evaluation."""
    assert run.val is not None
    network = run.network if run.ema is None else run.ema.module
    with listening(run.tested) as gates:
        found = measure(network, run.val, run.accelerator, run.config, run.log, stop=run.interrupt.event)
    if found is None:
        if run.train.resumes_within:
            run.keep_checkpoint()
        run.leave(run.interrupt.signal)
    scores = {f"val_{name}": value for name, value in found.scores().items()}
    if f"val_{run.config.best_metric}" not in scores:
        raise RetrofitError(
            f"best_metric={run.config.best_metric!r} needs more than 5 classes, got {len(found.classes)}"
        )
    if gates is None:
        return scores
    run.saturated = saturated_sites(gates)
    return {**scores, "gates": log_gates(gates, run.accelerator.trackers, run.progress.updates)}


def finish_epoch(run: Run, epoch: int) -> None:
    """Evaluate, keep what is best, write a checkpoint."""
    if run.world > 1:
        # running statistics differ between the processes; what is evaluated must be what is saved
        share([*run.model.buffers(), *(run.ema.module.buffers() if run.ema is not None else ())])
    row = training_row(run, epoch)
    if run.val is not None:
        row.update(validate(run))
    row.update({"saturated": run.saturated} if run.saturated else {})
    take_note(run, row)
    run.check_weights()
    # best before last: after a kill between the two, the epoch's end is done again and gives the same
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
        run.tell(run.callbacks.after_evaluation, epoch + 1)
    run.tell(run.callbacks.after_epoch, epoch + 1)
    if run.progress.finished is None:
        # Processes may have been told at different moments: all leave together or none does
        _, stop, _ = agree(run, False)
        if stop:
            run.leave(stop)


def training_row(run: Run, epoch: int) -> dict[str, Any]:
    progress, seconds = run.progress, time.perf_counter() - run.began
    row = {
        "epoch": epoch + 1,
        "train_loss": progress.loss / progress.seen,
        "train_accuracy": progress.correct / progress.seen,
        "lr": run.lr,
        "images_per_second": (progress.seen - run.seen_before) / seconds,
        "seconds": seconds,
    }
    if run.device.type == "cuda":
        row["peak_memory_mb"] = torch.cuda.max_memory_allocated(run.device) / 2**20
    return row


def take_note(run: Run, row: dict[str, Any]) -> None:
    """Add an epoch to the history, and see whether it was the best, and the last."""
    progress, config = run.progress, run.config
    progress.history.append(row)
    run.note_pace()
    if run.val is not None:
        score = row[f"val_{config.best_metric}"]
        sign = -1 if config.best_metric == "loss" else 1
        # NaN, of a loss that overflows, is worse than any number
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
    if progress.epoch == config.epochs:
        progress.finished = "epochs"
    elif config.patience is not None and progress.stale >= config.patience:
        progress.finished = "early stop"


def finish(run: Run) -> FinetuneResult:
    """The result, after its last files and words."""
    result = run.result()
    run.log.history(run.progress.history)
    run.log.pictures(run.progress.history)
    run.log.summarise(result)
    run.tell(run.callbacks.after_training, run.progress.epoch)
    run.heed_signal()
    return result
