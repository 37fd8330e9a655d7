"""Setup of a run: its job is checked, the run is built, and restored where it is resumed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from ..errors import RetrofitError, brief
from ..surgery.record.copying import in_mode
from .callbacks import Callbacks, checked_callbacks
from .checkpoint import Folder, checked_folder, load_optimizer
from .config import FinetuneConfig
from .criteria import Criterion, checked_criterion, criterion_of, describe_criterion
from .data import Stream, stream
from .engine import engine, fast_math, refuse_sharding
from .experiment import describe_run, plain
from .form import TrainingForm, recomputing
from .freezing import choose_trainable, trained_ever, trained_in, trained_parts
from .groups import learning_rates_in_words
from .lock import alone_in
from .log import Log
from .optimizing import learning, try_optimizer, try_schedule
from .parts import (
    as_found,
    check_network,
    count,
    head_size,
    new_head,
    se_modules,
    structure_kept,
    to_device,
)
from .randomness import EPOCH, kept_randomness, seed_all
from .run import Run, share
from .transforms import note_images, other_classes, transforms_for

__all__ = ["Job", "check", "started"]


@dataclass(frozen=True)
class Job:
    """What ``finetune`` was asked for; see there."""

    model: nn.Module
    train_data: Any
    val_data: Any
    config: FinetuneConfig
    output_dir: str | Path | None = None
    resume: bool = False
    command: dict[str, Any] | None = None
    quiet: bool = False
    criterion: Criterion | None = None
    teacher: nn.Module | None = None
    distillation: tuple[float, float] = (0.5, 4.0)
    callbacks: Callbacks = field(default_factory=Callbacks)
    stop: threading.Event = field(default_factory=threading.Event)


def check(job: Job) -> None:
    """Raise where the arguments can't be right; nothing has been changed yet, but that the output folder is there."""
    model, config = job.model, job.config
    check_network(model)
    check_config(config)
    checked_criterion(job.criterion, job.teacher, job.distillation, model)
    checked_callbacks(job.callbacks)
    try_optimizer(config)
    try_schedule(config)
    trained_parts(model, config.trainable)
    if config.patience is not None and job.val_data is None:
        raise RetrofitError("patience needs validation data")
    if job.output_dir is not None:
        checked_folder(Path(job.output_dir), job.resume)
    elif job.resume:
        raise RetrofitError("resume=True needs the output_dir of the run that is to go on")


def check_config(config: Any) -> None:
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"config must be a FinetuneConfig, got {brief(config)} of type {type(config).__name__}")


@contextlib.contextmanager
def started(job: Job) -> Iterator[Run]:
    """A run before its first step, or where it had come to; all that is around it is put away again at the end.

    Whatever is found wrong on the way leaves the network with the structure that it had.
    """
    with surroundings(job) as (accelerator, wanted), recomputing(job.model, job.config.grad_checkpointing):
        with structure_kept(job.model):
            run, remark = build(job, accelerator, wanted)
            resumed = job.resume and run.folder is not None and run.folder.has_checkpoint()
            if resumed:
                restore(run)
            if run.folder is not None and run.rank == 0:
                weights = sum(v.numel() * v.element_size() for v in run.model.state_dict().values())
                run.folder.begin(job.command, weights, resumed=resumed)
                run.log.resume(run.progress.updates)
        with run.log, trackers(accelerator, job.config):
            introduce(run, remark)
            yield run


@contextlib.contextmanager
def surroundings(job: Job) -> Iterator[tuple[Accelerator, dict[str, bool]]]:
    """The Accelerator of a run, alone in its folder, and the network's own ``requires_grad`` flags. Afterwards flags, modes, global
    settings and generators are as they were."""
    taught = contextlib.nullcontext() if job.teacher is None else as_found(job.teacher)
    folder = None if job.output_dir is None else Path(job.output_dir)
    with (
        as_found(job.model) as wanted, taught, kept_randomness(), fast_math(job.config),
        engine(job.config, None if folder is None else str(folder)) as accelerator,
    ):  # fmt: skip
        refuse_sharding(accelerator)
        with alone_in(folder) if folder is not None and accelerator.is_main_process else contextlib.nullcontext():
            yield accelerator, wanted


def build(job: Job, accelerator: Accelerator, wanted: dict[str, bool]) -> tuple[Run, str]:
    """The run, and what is to be said of the network's head."""
    model, config, device = job.model, job.config, accelerator.device
    described = describe_run(model, job.train_data, job.val_data)
    experiment = same_on_all(
        plain(described | describe_criterion(job.criterion, job.teacher, job.distillation)), accelerator
    )
    train = batches_of(job, "train_data", accelerator)
    val = None if job.val_data is None else batches_of(job, "val_data", accelerator)
    classes, remark = fit_head(model, job.train_data, config)
    note_images(model, job.train_data, config)
    # All that is ever trained is in the optimizer from the start; what is frozen has no gradient and is passed over.
    # That holds for what this run does not reach, too: it may be extended.
    choose_trainable(model, trained_ever(config), wanted)
    to_device(model, device)
    if accelerator.num_processes > 1:
        share(model.state_dict().values())  # the processes may have drawn other first weights
    criterion = criterion_of(config, job.criterion, job.train_data, classes)
    for moved in (criterion, job.teacher):
        if isinstance(moved, nn.Module):
            moved.to(device)
    teacher = None if job.teacher is None else in_mode(job.teacher, False)
    run = Run(
        model, config, accelerator, wanted, train, val,
        learning(model, config, criterion, teacher, job.distillation, len(train), classes),
        TrainingForm(model, config.compile), folder_of(job, experiment, accelerator),
        Log.of(job.output_dir, config, len(train), val is not None, accelerator, job.quiet), job.callbacks, job.stop,
    )  # fmt: skip
    return run, remark


def folder_of(job: Job, experiment: dict[str, Any], accelerator: Accelerator) -> Folder | None:
    if job.output_dir is None:
        return None
    return Folder(Path(job.output_dir), job.config, experiment, accelerator.num_processes)


def restore(run: Run) -> None:
    """Put the checkpoint in its folder back in place. timm's schedules have no state: they go by the number of updates."""
    assert run.folder is not None
    run.progress, saved = run.folder.load(run.model, run.learning.optimizer)
    run.choose(trained_in(run.config, min(run.progress.epoch, run.config.epochs - 1)))
    ema, scaler = run.learning.ema, run.accelerator.scaler
    try:
        load_optimizer(run.learning.optimizer, saved["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(saved["ema"])
        if scaler is not None and "scaler" in saved:
            scaler.load_state_dict(saved["scaler"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RetrofitError(
            f"the state in {run.folder.last} is not that of this run, it may have been edited: {error!r}; start anew in "
            "another folder"
        ) from error
    if run.progress.best is not None:
        run.best_weights = run.folder.load_best()


def batches_of(job: Job, name: str, accelerator: Accelerator) -> Stream:
    config, train = job.config, name == "train_data"
    return stream(
        getattr(job, name), name=name, train=train, batch_size=config.batch_size, bad_images=config.bad_images,
        balanced=config.balance == "sampling",
        transform=transforms_for(job.model, config, train=train), seed=config.seed,
        workers=config.workers, rank=accelerator.process_index, world=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip


def fit_head(model: nn.Module, train_data: Any, config: FinetuneConfig) -> tuple[int | None, str]:
    """Give the network the head of the config; the number of classes, where it is known, and what is to be said of it."""
    seed_all(config.seed, EPOCH)
    classes = head_size(model)
    remark = other_classes(model, train_data)
    if config.num_classes is not None and (config.num_classes != classes or remark):
        new_head(model, config.num_classes)
    if remark and config.num_classes is None:
        remark += ": the head is kept, its numbers mean other classes now; num_classes=... gives a new one"
    elif remark:
        remark += ": the head is new"
    return config.num_classes or classes, remark


def same_on_all(value: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """What the main process says: the others may have drawn other first weights."""
    if accelerator.num_processes == 1:
        return value
    said: dict[str, Any] = broadcast_object_list([value])[0]
    return said


def introduce(run: Run, remark: str) -> None:
    model, config, progress = run.model, run.config, run.progress
    modules = len(se_modules(model))
    se = f"{modules} SE modules" if modules else "no SE modules: it is trained as it is"
    run.log.note(f"{type(model).__name__}, {se}; {count(model):,} parameters, {count(model, True):,} of them trained")
    precision = {"no": "fp32"}.get(run.accelerator.mixed_precision, run.accelerator.mixed_precision)
    processes = f", {run.world} processes" if run.world > 1 else ""
    run.log.note(f"{run.device}, {precision}{processes}; {len(run.train)} batches of {config.batch_size} an epoch")
    run.log.note(learning_rates_in_words(run.learning.optimizer.param_groups, config.lr))
    if remark:
        run.log.note(remark)
    if progress.updates:
        run.log.note(f"resumed in epoch {min(progress.epoch + 1, config.epochs)}, after update {progress.updates}")


@contextlib.contextmanager
def trackers(accelerator: Accelerator, config: FinetuneConfig) -> Iterator[None]:
    """The config's trackers follow the run."""
    if config.trackers:
        flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in config.to_dict().items()}
        accelerator.init_trackers("se-retrofit", config=flat)
    try:
        yield
    finally:
        for tracker in accelerator.trackers if config.trackers and accelerator.is_main_process else ():
            tracker.finish()
