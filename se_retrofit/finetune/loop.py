"""The training loop, top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..errors import RetrofitError
from ..models import Base
from ..saving.atomic import replaced_file
from ..saving.base import check_base
from . import checkpoint as disk
from . import setup
from .checkpoint import Progress
from .config import FinetuneConfig
from .data import Batch, Stream, stream
from .datasets import transforms_for
from .engine import Forward, Interrupt, engine, fast_math, logits_of, refuse_sharding
from .experiment import describe_run, plain
from .log import Log
from .parts import (
    as_found,
    choose_trainable,
    count,
    head_size,
    kept_state,
    layout_of,
    new_head,
    param_groups,
    se_modules,
    set_drop_path,
    set_modes,
    structure_of,
    to_device,
)
from .randomness import EPOCH, UPDATE, kept_randomness, seed_all

__all__ = ["FinetuneResult", "evaluate", "finetune"]

# These may be other than in the run that is resumed; all other fields decide the result.
FREE_FIELDS = {"workers", "checkpoint_minutes", "trackers", "bad_images"}
RUN = "run.yaml"
AUXILIARY_WEIGHT = 0.3  # of GoogLeNet's and Inception's auxiliary losses, as in the papers


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tune came to.

    Attributes:
        model: the network that was given, with the weights of the best epoch (the last, without validation data).
        history: a row for each epoch, as in ``metrics.jsonl``; row 0 is the evaluation before any step.
        best_accuracy: the best validation accuracy, and ``best_epoch`` where it was reached, from 1; None without
            validation data.
        stopped: ``"epochs"`` when all were run, ``"early stop"`` when accuracy no longer rose.
        directory: ``output_dir/best``, which ``load_retrofitted`` loads; None where nothing was written.
        updates: how often the weights changed.
        step_seconds: median time of an update, loading included; None for runs too short to tell.
        parameters: of the network.
        trained_parameters: those of them that were trained in the end.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    best_accuracy: float | None
    best_epoch: int | None
    stopped: str
    directory: Path | None
    updates: int
    step_seconds: float | None
    parameters: int
    trained_parameters: int


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
) -> FinetuneResult:
    """Fine-tune a classifier, retrofitted or not, in place.

    Args:
        model: the network; it ends on the device that it was trained on.
        train_data: a Dataset of (image, class) pairs, or a DataLoader. A Dataset's PIL images get the transforms of the
            network's own config (size, mean, std, interpolation); tensors are taken as they are.
        val_data: the same, for validation; without it the last epoch is the result.
        config: the recipe.
        output_dir: folder for checkpoints, result, metrics and curves; None writes nothing.
        resume: go on from the checkpoint in ``output_dir``; where there is none yet, start. The network with its
            starting weights, its SE, the data and the config must be those that the run began with.
        base: where the network came from before the retrofit, for the saved recipe; timm's networks tell it themselves.
        command: what ``run.yaml`` is to hold besides, as plain data; the command line writes its options there.
        quiet: print nothing.

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
    output = setup.checked(model, config, output_dir, resume)
    if config.early_stop is not None and val_data is None:
        raise RetrofitError("early_stop needs validation data")
    with contextlib.ExitStack() as stack:
        wanted = stack.enter_context(as_found(model))
        stack.enter_context(kept_randomness())
        stack.enter_context(fast_math(config))
        interrupt = stack.enter_context(Interrupt(quiet))
        accelerator = stack.enter_context(engine(config, None if output is None else str(output)))
        rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        refuse_sharding(accelerator)
        experiment = _same_on_all(plain(describe_run(model, train_data, val_data, base)), accelerator)

        # Data

        def batches(data: Any, name: str, train: bool) -> Stream:
            return stream(
                data, name=name, train=train, batch_size=config.batch_size, bad_images=config.bad_images,
                transform=transforms_for(model, config, train=train, base=base), seed=config.seed,
                workers=config.workers, rank=rank, world=world, pin_memory=device.type == "cuda",
            )  # fmt: skip

        train = batches(train_data, "train_data", train=True)
        val = None if val_data is None else batches(val_data, "val_data", train=False)
        updates_per_epoch = math.ceil(len(train) / config.accumulate)

        # Network

        undo = stack.enter_context(contextlib.ExitStack())  # whatever is found wrong from here on to the first step
        undo.callback(structure_of(model))
        seed_all(config.seed, EPOCH)
        classes = head_size(model)
        if config.num_classes is not None and config.num_classes != classes:
            new_head(model, config.num_classes)
            wanted.update({name: True for name, _ in model.named_parameters() if name not in wanted})
        if config.drop_path is not None:
            set_drop_path(model, config.drop_path)
        progress = Progress()
        saved: dict[str, Any] = {}
        if resume and output is not None and disk.has_checkpoint(output):
            progress, saved = disk.load_training(
                output, model, config.to_dict(), experiment, world=world, free=FREE_FIELDS
            )
        if base is not None:
            check_base(model, base)  # rather now than when the first epoch is to be saved
        channels_last = device.type == "cuda" if config.channels_last is None else config.channels_last
        to_device(model, device, channels_last)
        if world > 1:
            _share(model.state_dict().values())  # the processes may have drawn other first weights
        ema = ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay is not None else None
        tested = model if ema is None else ema.module

        # Optimizer and schedule. All that is ever trained is in the optimizer from the start; what is frozen has no
        # gradient and is passed over.

        choose_trainable(model, setup.part(config, config.epochs - 1), wanted)
        raw_optimizer = setup.optimizer(param_groups(
            model, weight_decay=config.weight_decay, se_lr_scale=config.se_lr_scale, head_lr_scale=config.head_lr_scale,
        ), config, fused=device.type == "cuda")  # fmt: skip
        schedule = setup.schedule(raw_optimizer, config, updates_per_epoch)
        mixup = None
        if config.mixup or config.cutmix:
            mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=config.label_smoothing,
                num_classes=config.num_classes or setup.classes(classes),
            )  # fmt: skip
        criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else config.label_smoothing)

        def begin(part: str) -> tuple[nn.Module, Any]:
            """(Re-)wrap the network for a phase: DDP must know what is trained when it is made."""
            choose_trainable(model, part, wanted)
            accelerator.free_memory()
            prepared: tuple[nn.Module, Any] = accelerator.prepare(Forward(model), raw_optimizer)
            return prepared

        part = setup.part(config, progress.epoch)
        network, optimizer = begin(part)
        if saved:
            setup.load_parts(saved, raw_optimizer, ema, accelerator)
        best_weights: dict[str, Tensor] | None = None
        if progress.best is not None and output is not None:
            best_weights = disk.load_best(output)

        # What is kept on disk

        def parts() -> dict[str, Any]:
            kept: dict[str, Any] = {"optimizer": raw_optimizer.state_dict()}
            if ema is not None:
                kept["ema"] = ema.module.state_dict()
            if accelerator.scaler is not None:
                kept["scaler"] = accelerator.scaler.state_dict()
            return kept

        def keep_checkpoint() -> None:
            if output is None:
                return
            _check_weights(model, progress, output)
            if rank == 0:
                with interrupt.held():
                    disk.save_training(
                        output, model, progress, config.to_dict(), experiment, parts(), world=world, base=base
                    )
            accelerator.wait_for_everyone()

        def keep_best() -> None:
            nonlocal best_weights
            best_weights = kept_state(tested)
            if output is not None and rank == 0:
                with interrupt.held():
                    disk.write_best(output, tested, base=base)

        columns = ["epoch", "train_loss", "train_accuracy", *(["val_loss", "val_accuracy"] if val else []), "lr",
                   "images_per_second", "seconds", *(["peak_memory_mb"] if device.type == "cuda" else [])]  # fmt: skip
        log = stack.enter_context(Log(
            output, epochs=config.epochs, updates=updates_per_epoch, columns=columns, rank=rank, quiet=quiet,
        ))  # fmt: skip
        if output is not None and rank == 0:
            disk.check_space(output, model, config)
            config.to_yaml(output / "config.yaml")
            if not saved:
                _describe(output, command, experiment, config)
            log.resume(progress.updates)
        undo.pop_all()
        _introduce(log, model, config, accelerator, len(train), progress)
        for tracker in _start_trackers(accelerator, config):
            stack.callback(tracker.finish)

        # The first evaluation: before any step, a retrofitted network is the one that it was made from

        log.header()
        if val is not None and not progress.history:
            before = _measure(network, val, accelerator, channels_last, log, interrupt)
            if before is None:
                keep_checkpoint()
                _leave(interrupt.signal, log, output)
            progress.history.append({"epoch": 0, **before})
            log.row(progress.history[0])
            log.history(progress.history)

        # Training

        saved_at = time.monotonic()
        step_times: list[float] = []
        for epoch in range(progress.epoch, config.epochs if progress.finished is None else 0):
            if setup.part(config, epoch) != part:
                part = setup.part(config, epoch)
                network, optimizer = begin(part)
                log.note(
                    f"epoch {epoch + 1}: all of the network is trained from here on, {count(model, True):,} parameters"
                )
            set_modes(model, part, config.freeze_bn)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = looked = time.perf_counter()
            seen_before = progress.seen
            pending: list[Tensor] = []
            for window in _windows(train.batches(epoch, progress.step * config.accumulate), config.accumulate):
                seed_all(config.seed, UPDATE, rank, progress.updates)
                optimizer.zero_grad(set_to_none=True)
                tally = torch.zeros(3, device=device)  # loss, correct, seen
                for number, batch in enumerate(window):
                    _tell(batch, log)
                    images, targets = _on_device(batch, device, channels_last)
                    inputs, labels = images, targets
                    if mixup is not None:
                        _check_targets(batch, mixup.num_classes)
                        inputs, labels = _mixed(mixup, images, targets)
                    last = number == len(window) - 1
                    with contextlib.nullcontext() if last else accelerator.no_sync(network):
                        logits, auxiliary = logits_of(network(inputs))
                        _check_targets(batch, logits.shape[1])
                        loss = criterion(logits, labels)
                        for more in auxiliary:
                            loss = loss + AUXILIARY_WEIGHT * criterion(more, labels)
                        accelerator.backward(loss / len(window))
                    correct = (logits.detach().argmax(1) == targets).sum()
                    tally += torch.stack(
                        [loss.detach() * len(targets), correct, torch.full_like(correct, len(targets))]
                    )
                if config.clip_grad is not None:
                    accelerator.clip_grad_norm_(network.parameters(), config.clip_grad)
                optimizer.step()
                progress.step += 1
                progress.updates += 1
                if schedule is not None:
                    schedule.step_update(progress.updates)
                if ema is not None:
                    ema.update(model, step=progress.updates)
                pending.append(tally)
                told = interrupt.signal is not None and world == 1  # several processes stop together, at a look
                if progress.step % config.log_every and progress.step < updates_per_epoch and not told:
                    continue

                # A look at the loss: the only place where the loop waits for the device and for the other processes
                due = time.monotonic() - saved_at >= 60 * config.checkpoint_minutes
                sums, stop, due = _look(pending, interrupt.signal, due, accelerator)
                _check_losses(sums, progress, raw_optimizer, output, model)
                for loss_sum, correct_sum, images_sum in sums:
                    progress.loss += loss_sum
                    progress.correct += correct_sum
                    progress.seen += images_sum
                now = time.perf_counter()
                images_looked = sum(images_sum for _, _, images_sum in sums)
                if progress.step > config.log_every:  # the first look of an epoch includes the loaders' start
                    step_times.append((now - looked) / len(sums))
                entry = {
                    "update": progress.updates,
                    "epoch": epoch + 1,
                    "loss": sum(loss_sum for loss_sum, _, _ in sums) / images_looked,
                    "lr": setup.body_lr(raw_optimizer),
                    "images_per_second": images_looked / (now - looked),
                }
                log.update(epoch + 1, progress.step, entry, progress.correct / progress.seen)
                accelerator.log({"train/loss": entry["loss"], "train/lr": entry["lr"]}, step=progress.updates)
                looked, pending = now, []
                if stop or (due and progress.step < updates_per_epoch):
                    keep_checkpoint()
                    saved_at = time.monotonic()
                    looked = time.perf_counter()
                if stop:
                    _leave(stop, log, output)

            # The end of an epoch: evaluate, keep what is best, write a checkpoint
            if world > 1:
                # running statistics differ between the processes; what is evaluated must be what is saved
                _share([*model.buffers(), *(ema.module.buffers() if ema is not None else ())])
            seconds = time.perf_counter() - began
            row = {
                "epoch": epoch + 1,
                "train_loss": progress.loss / progress.seen,
                "train_accuracy": progress.correct / progress.seen,
                "lr": setup.body_lr(raw_optimizer),
                "images_per_second": (progress.seen - seen_before) / seconds,
                "seconds": seconds,
            }
            if device.type == "cuda":
                row["peak_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
            if val is not None:
                measured = _measure(
                    network if ema is None else ema.module, val, accelerator, channels_last, log, interrupt
                )
                if measured is None:
                    keep_checkpoint()  # of the epoch's last update: what is resumed begins with the evaluation
                    _leave(interrupt.signal, log, output)
                row.update(measured)
            progress.history.append(row)
            if step_times:
                progress.step_seconds = statistics.median(step_times)
            if val is not None:
                improved = progress.best is None or row["val_accuracy"] > progress.best
                if improved:
                    progress.best, progress.best_epoch = row["val_accuracy"], epoch + 1
                progress.stale = 0 if improved else progress.stale + 1
            progress.epoch, progress.step = epoch + 1, 0
            progress.loss = progress.correct = progress.seen = 0.0
            if progress.epoch == config.epochs:
                progress.finished = "epochs"
            elif config.early_stop is not None and progress.stale >= config.early_stop:
                progress.finished = "early stop"
            _check_weights(model, progress, output)
            # best before last: after a kill between the two, the epoch's end is done again and gives the same
            if progress.stale == 0 and (val is not None or progress.finished is not None):
                keep_best()
            keep_checkpoint()
            saved_at = time.monotonic()
            log.row(row)
            log.history(progress.history)
            accelerator.log({k: v for k, v in row.items() if v is not None}, step=progress.updates)
            if progress.finished is not None:
                break
            # Processes may have been told at different moments: all leave together or none does
            _, stop, _ = _look([], interrupt.signal, False, accelerator)
            if stop:
                _leave(stop, log, output)

        # The result

        if best_weights is None and output is not None:
            best_weights = disk.load_best(output)
        if best_weights is not None:
            model.load_state_dict(best_weights)
        result = FinetuneResult(
            model=model,
            history=progress.history,
            best_accuracy=progress.best,
            best_epoch=progress.best_epoch,
            stopped=progress.finished or "epochs",
            directory=None if output is None else output / disk.BEST,
            updates=progress.updates,
            step_seconds=progress.step_seconds,
            parameters=count(model),
            trained_parameters=count(model, trainable=True),
        )
        log.history(progress.history)
        log.curves(progress.history)
        _summarise(log, result)
        return result


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
    return _evaluated(model, data, config, base)[0]


def right_answers(
    model: nn.Module, data: Any, *, config: FinetuneConfig | None = None, base: Base | None = None
) -> Tensor:
    """Which images a classifier gets right, a bool tensor (images,), in the same order for each network.

    Arguments and errors are those of ``evaluate``.
    """
    return _evaluated(model, data, config, base)[1]


def _evaluated(
    model: nn.Module, data: Any, config: FinetuneConfig | None, base: Base | None
) -> tuple[dict[str, float], Tensor]:
    config = FinetuneConfig() if config is None else config
    setup.checked(model, config, None, False)
    with as_found(model), kept_randomness(), fast_math(config), engine(config) as accelerator:
        channels_last = config.channels_last or (config.channels_last is None and accelerator.device.type == "cuda")
        batches = stream(
            data, name="data", train=False, batch_size=config.batch_size, bad_images=config.bad_images,
            transform=transforms_for(model, config, train=False, base=base), seed=config.seed, workers=config.workers,
            rank=accelerator.process_index, world=accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        to_device(model, accelerator.device, channels_last)
        log = Log(None, epochs=0, updates=0, columns=[], rank=accelerator.process_index)
        right: list[Tensor] = []
        measured = _measure(model, batches, accelerator, channels_last, log, right_images=right)
        assert measured is not None  # only an Interrupt ends it early
        return measured, torch.cat(right)


# Steps of the loop


def _windows(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one update, and the next, ..."""
    while window := list(itertools.islice(batches, size)):
        yield window


def _on_device(batch: Batch, device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor]:
    images = batch.images
    layout = layout_of(images) if channels_last else torch.preserve_format
    images = images.to(device, non_blocking=True, memory_format=layout)
    return images, batch.targets.to(device, non_blocking=True)


def _tell(batch: Batch, log: Log) -> None:
    for complaint in batch.complaints:
        log.warn(f"skipped an image that can't be read: {complaint}")


def _mixed(mixup: Mixup, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images and their soft labels. timm mixes pairs: the last image of an odd batch stays as it is."""
    pairs = len(targets) // 2 * 2
    parts = []
    if pairs:
        parts.append(mixup(images[:pairs].clone(), targets[:pairs]))  # works in place
    if pairs < len(targets):
        labels = mixup_target(targets[pairs:].repeat(2), mixup.num_classes, 1.0, mixup.label_smoothing)[:1]
        parts.append((images[pairs:], labels))
    inputs, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return inputs, labels


def _check_targets(batch: Batch, classes: int) -> None:
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


@torch.no_grad()
def _measure(
    network: nn.Module,
    data: Stream,
    accelerator: Accelerator,
    channels_last: bool,
    log: Log,
    interrupt: Interrupt | None = None,
    right_images: list[Tensor] | None = None,
) -> dict[str, float] | None:
    """Loss and accuracy over all processes; each image counts once.

    None where ``interrupt`` ended it. Several processes, which must leave together, go through with it.
    ``right_images`` gets, batch by batch, whether each image was classified correctly.
    """
    network.eval()
    totals = torch.zeros(3, dtype=torch.float32, device=accelerator.device)
    for batch in data.batches(0):
        if interrupt is not None and interrupt.signal is not None and accelerator.num_processes == 1:
            return None
        _tell(batch, log)
        images, targets = _on_device(batch, accelerator.device, channels_last)
        with accelerator.autocast():
            logits, _ = logits_of(network(images))
        _check_targets(batch, logits.shape[1])
        counts = batch.counts.to(accelerator.device, non_blocking=True)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        right = (logits.argmax(1) == targets) & counts
        # Not losses[counts], whose size the host would have to wait for
        totals += torch.stack([losses.where(counts, losses.new_zeros(())).sum(), right.sum(), counts.sum()])
        if right_images is not None:
            answers = accelerator.pad_across_processes(torch.where(counts, right.int(), -1), pad_index=-1)
            answers = accelerator.gather(answers).cpu()
            right_images.append(answers[answers >= 0].bool())
    loss, correct, seen = accelerator.reduce(totals, "sum").tolist()
    return {"val_loss": loss / max(seen, 1), "val_accuracy": correct / max(seen, 1)}


def _look(
    pending: list[Tensor], signaled: int | None, due: bool, accelerator: Accelerator
) -> tuple[list[tuple[float, float, float]], int, bool]:
    """The sums of the last updates over all processes, and what all agree on: to stop, to write a checkpoint."""
    told = 0.0 if signaled is None else 1.0 if signaled == signal.SIGTERM else 1024.0
    flags = torch.tensor([told, float(due and accelerator.is_main_process), 0.0], device=accelerator.device)
    *sums, (told, wanted, _) = accelerator.reduce(torch.stack([*pending, flags]), "sum").tolist()
    stop = signal.SIGINT if told >= 1024 else signal.SIGTERM if told else 0
    return [(loss, correct, seen) for loss, correct, seen in sums], int(stop), wanted > 0


def _check_losses(
    sums: list[tuple[float, float, float]],
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    output: Path | None,
    model: nn.Module,
) -> None:
    for number, (loss, _, _) in enumerate(sums):
        if not math.isfinite(loss):
            behind = len(sums) - number - 1
            _diverged(f"the loss became {loss}", progress, progress.updates - behind, progress.step - behind, output)


def _check_weights(model: nn.Module, progress: Progress, output: Path | None) -> None:
    """A loss can be finite and its gradient not: what is written must be good."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            _diverged(f"{name} is no longer finite", progress, progress.updates, progress.step, output)


def _diverged(what: str, progress: Progress, update: int, step: int, output: Path | None) -> None:
    kept = ""
    if output is not None and disk.has_checkpoint(output):
        kept = f" The last good checkpoint is {output / disk.LAST}."
    raise RetrofitError(
        f"{what} in epoch {progress.epoch + 1 if step else progress.epoch}, update {update}"
        f"{f' (number {step} of the epoch)' if step else ''}. "
        f"Try a lower lr, clip_grad, more warmup, or precision fp32.{kept}"
    )


def _leave(number: int | None, log: Log, output: Path | None) -> NoReturn:
    where = f"; the checkpoint in {output / disk.LAST} is complete, resume goes on from it" if output else ""
    log.note(f"stopped{where}")
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + (number or 0))


@torch.no_grad()
def _share(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that the main one has."""
    for tensor in tensors:
        tensor.copy_(broadcast(tensor.clone()))


def _same_on_all(value: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """What the main process says: the others may have drawn other first weights."""
    if accelerator.num_processes == 1:
        return value
    said: dict[str, Any] = broadcast_object_list([value])[0]
    return said


def _describe(output: Path, command: dict[str, Any] | None, experiment: dict[str, Any], config: FinetuneConfig) -> None:
    """Write ``run.yaml``: enough to repeat the run."""
    content = {"command": command, "experiment": experiment, "config": config.to_dict()}
    with replaced_file(output / RUN) as fresh:
        fresh.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


# What is said


def _introduce(
    log: Log, model: nn.Module, config: FinetuneConfig, accelerator: Accelerator, batches: int, progress: Progress
) -> None:
    modules = len(se_modules(model))
    se = f"{modules} SE modules" if modules else "no SE modules: it is trained as it is"
    log.note(f"{type(model).__name__}, {se}; {count(model):,} parameters, {count(model, True):,} of them trained")
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    log.note(f"{accelerator.device}, {precision}{processes}; {batches} batches of {config.batch_size} an epoch")
    if progress.updates:
        log.note(f"resumed in epoch {min(progress.epoch + 1, config.epochs)}, after update {progress.updates}")


def _start_trackers(accelerator: Accelerator, config: FinetuneConfig) -> list[Any]:
    if not config.trackers:
        return []
    flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in config.to_dict().items()}
    accelerator.init_trackers("se-retrofit", config=flat)
    return list(accelerator.trackers) if accelerator.is_main_process else []


def _summarise(log: Log, result: FinetuneResult) -> None:
    if result.best_accuracy is not None:
        first = result.history[0].get("val_accuracy") if result.history[0]["epoch"] == 0 else None
        before = f" (before training {first:.2%})" if first is not None else ""
        log.note(f"best validation accuracy {result.best_accuracy:.2%} in epoch {result.best_epoch}{before}")
    if result.stopped == "early stop":
        log.note(f"stopped early, after epoch {result.history[-1]['epoch']}")
    if result.directory is not None:
        log.note(f"result: {result.directory} (load_retrofitted), curves and metrics beside it")
