"""Setup of a run: check its job, build it, and restore it if it is resumed."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from ..errors import RetrofitError, brief
from ..locks import alone_in
from ..saving.base import base_of
from ..saving.networks import without_name
from ..surgery.record.copying import in_mode
from ..tables import counted
from .callbacks import Callbacks
from .checkpoint import Folder, check_folder, has_checkpoint, load_optimizer
from .config import FinetuneConfig
from .criteria import Criterion, Losses, check_criterion, criterion_of
from .data import Stream, stream
from .engine import TrainingForm, engine, gpu_of, recomputing, share
from .experiment import describe_run
from .learning import learning, length_of, rates_in_words, try_out
from .log import Log
from .parts import (
    as_found,
    check_network,
    choose_trainable,
    count,
    head_size,
    new_head,
    se_modules,
    structure_kept,
    to_device,
    trained_in,
    trained_parts,
)
from .randomness import EPOCH, kept_randomness, seed_all
from .run import Run
from .transforms import note_images, other_classes, transforms_for


@dataclass(frozen=True)
class Job:
    """The arguments of ``finetune``, where they are documented."""

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

    @property
    def folder(self) -> Path | None:
        return None if self.output_dir is None else Path(self.output_dir)


def check(job: Job) -> None:
    """Raise an error if the arguments can't be right. Nothing is changed, except that the output folder is created."""
    check_network(job.model)
    check_config(job.config)
    check_criterion(job.criterion, job.teacher, job.distillation, job.model)
    if not isinstance(job.callbacks, Callbacks):
        raise TypeError(f"callbacks must be Callbacks(after_epoch=..., ...), got {brief(job.callbacks)}")
    if not callable(getattr(job.stop, "is_set", None)):
        raise TypeError(f"stop must be an event, such as threading.Event(), got {brief(job.stop)}")
    try_out(job.config)
    trained_parts(job.model, job.config.trainable)
    if job.config.patience is not None and job.val_data is None:
        raise RetrofitError("patience needs validation data")
    if job.folder is not None:
        check_folder(job.folder, job.resume)
    elif job.resume:
        raise RetrofitError("resume=True needs the output_dir of the run to resume")


def check_config(config: Any) -> None:
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"config must be a FinetuneConfig, got {brief(config)} of type {type(config).__name__}")


@contextlib.contextmanager
def started(job: Job) -> Iterator[Run]:
    """Provide a run before its first step, or where it resumes; clean up afterwards, and restore the caller's state."""
    taught = contextlib.nullcontext() if job.teacher is None else as_found(job.teacher)
    folder = None if job.folder is None else str(job.folder)
    with (
        as_found(job.model) as wanted, taught, kept_randomness(), gpu_of(job.model, job.config),
        engine(job.config, folder) as accelerator,
        alone_in(job.folder if accelerator.is_main_process else None),
        recomputing(job.model, job.config.grad_checkpointing),
    ):  # fmt: skip
        # on the CPU, from which it is moved, whatever the caller's default device
        with structure_kept(job.model), torch.device("cpu"):
            run, remark = build(job, accelerator, wanted)
            resumed = run.folder is not None and job.resume and has_checkpoint(run.folder.path)
            resumed = broadcast_object_list([resumed])[0]  # a process that can't see the folder of the main one fails
            if resumed:
                restore(run)
            run.begin_with()
            if run.folder is not None and run.rank == 0:
                run.folder.begin(job.command, resumed=resumed)
            run.log.resume(run.progress.updates)
        val = contextlib.nullcontext() if run.val is None else contextlib.closing(run.val)
        with run.log, trackers(accelerator, job.config), contextlib.closing(run.train), val:
            introduce(run, remark)
            yield run


def build(job: Job, accelerator: Accelerator, wanted: dict[str, bool]) -> tuple[Run, str]:
    """Build the run, and return it with a remark on the network's head."""
    model, config, device = job.model, job.config, accelerator.device
    experiment = describe_run(model, job.train_data, job.val_data, job.criterion, job.teacher, job.distillation)
    train = batches_of("train_data", job.train_data, model, config, accelerator)
    val = None
    if job.val_data is not None:
        val = batches_of("val_data", job.val_data, model, config, accelerator)
    classes, remark = fit_head(model, job.train_data, config)
    note_images(model, job.train_data, config)
    # Everything that is ever trained is in the optimizer from the start; frozen parameters have no gradient and are
    # skipped. This includes what this run does not get to, because it may be extended.
    choose_trainable(model, trained_in(config, None), wanted)
    to_device(model, device)
    if accelerator.num_processes > 1:
        share(model.state_dict().values())  # the processes may have drawn different initial weights
    criterion = criterion_of(config, job.criterion, job.train_data, classes)
    for moved in (criterion, job.teacher):
        if isinstance(moved, nn.Module):
            moved.to(device)
    teacher = None if job.teacher is None else in_mode(job.teacher, False)
    learned = learning(model, config, len(train), classes)
    experiment |= {
        "processes": accelerator.num_processes,
        "parameter groups": groups_told(learned.optimizer.param_groups),
    }
    folder = None
    if job.folder is not None:
        # that of the main process, because the others may have drawn different initial weights
        folder = Folder(job.folder, config, broadcast_object_list([experiment])[0])
    each = math.ceil(len(train) / config.grad_accum_steps)
    epochs, updates = length_of(config, each)
    log = Log(
        job.folder, accelerator, quiet=job.quiet, epochs=epochs, updates=min(each, updates),
        best_metric=None if val is None else config.best_metric,
    )  # fmt: skip
    losses = Losses(criterion, teacher, job.distillation, config.multi_label)
    form = TrainingForm(model, config.compile)
    run = Run(
        model, config, accelerator, wanted, train, val, learned, losses, form, folder, log, job.callbacks, job.stop
    )
    return run, remark


def batches_of(name: str, data: Any, model: nn.Module, config: FinetuneConfig, accelerator: Accelerator) -> Stream:
    """Return this process's batches of ``train_data``, or of data to evaluate on."""
    train = name == "train_data"
    return stream(
        data, config, transforms_for(model, config, train=train), name=name, train=train, rank=accelerator.process_index,
        world=accelerator.num_processes, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip


def fit_head(model: nn.Module, train_data: Any, config: FinetuneConfig) -> tuple[int | None, str]:
    """Give the network the head that the config asks for; return its number of classes, if known, and a remark."""
    seed_all(config.seed, EPOCH)
    classes = head_size(model)
    remark = other_classes(model, train_data, config.keys)
    if config.num_classes is not None and (config.num_classes != classes or remark):
        new_head(model, config.num_classes)
    if remark and config.num_classes is None:
        remark += ": the head is kept, its numbers mean other classes now; num_classes=... gives a new one"
    elif remark:
        remark += ": the head is new"
    return config.num_classes or classes, remark


def groups_told(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Return the number of tensors per learning-rate factor, because the optimizer's state depends on their order in
    the groups, and another version of this package may group them differently."""
    told: dict[str, int] = {}
    for group in groups:
        name = f"{group['name']} at {group['lr_scale']:.4g} lr, decay {group['weight_decay']:.4g}"
        told[name] = told.get(name, 0) + len(group["params"])
    return told


def restore(run: Run) -> None:
    """Restore a run from its checkpoint. timm's schedules have no state: they only depend on the number of updates."""
    assert run.folder is not None
    run.progress, saved = run.folder.load(run.model)
    run.choose(trained_in(run.config, min(run.progress.epoch, run.epochs - 1)))
    ema, scaler = run.learning.ema, run.accelerator.scaler
    try:
        load_optimizer(run.learning.optimizer, saved["optimizer"])
        if ema is not None:
            ema.module.load_state_dict(saved["ema"])
        if scaler is not None and "scaler" in saved:
            scaler.load_state_dict(saved["scaler"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RetrofitError(
            f"the state in {run.folder.last} is not that of this run, it may have been edited: {error!r}; restart in "
            "another folder"
        ) from error
    if run.progress.best is not None:
        run.best_weights = run.folder.load_best()


def introduce(run: Run, remark: str) -> None:
    model, config, progress = run.model, run.config, run.progress
    modules = len(se_modules(model))
    se = counted(modules, "SE module") if modules else "no SE modules: it is trained as it is"
    run.log.note(f"{type(model).__name__}, {se}; {count(model):,} parameters, {count(model, True):,} of them trained")
    precision = {"no": "fp32"}.get(run.accelerator.mixed_precision, run.accelerator.mixed_precision)
    processes = f", {run.world} processes" if run.world > 1 else ""
    ends = "" if config.max_updates is None else f", {run.updates:,} updates in all"
    run.log.note(
        f"{run.device}, {precision}{processes}; {len(run.train)} batches of {config.batch_size} an epoch{ends}"
    )
    run.log.note(rates_in_words(run.learning.optimizer.param_groups, config.lr))
    if remark:
        run.log.note(remark)
    if run.folder is not None and not progress.updates and not run.log.console.quiet:
        base, note = base_of(model)
        if base is None:
            run.log.note(without_name(note))
    if progress.updates:
        run.log.note(f"resumed in epoch {min(progress.epoch + 1, run.epochs)}, after update {progress.updates}")


@contextlib.contextmanager
def trackers(accelerator: Accelerator, config: FinetuneConfig) -> Iterator[None]:
    """Start the config's trackers, and finish them on exit."""
    if config.trackers:
        flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in config.to_dict().items()}
        accelerator.init_trackers("se-retrofit", config=flat)
    try:
        yield
    finally:
        for tracker in accelerator.trackers if config.trackers and accelerator.is_main_process else ():
            tracker.finish()
