"""Setup: the checks, the network, the optimizer and its schedule, the state of a run that is resumed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data import Mixup
from timm.optim import get_optimizer_class, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import RetrofitError, brief, check_module
from ..models import Base
from ..plaindata import parse_yaml
from ..retrofit import warn_of_lost_sites
from ..saving.atomic import replaced_file
from ..saving.base import check_base
from ..surgery.record.copying import in_mode
from . import checkpoint as disk
from .callbacks import Callbacks
from .checkpoint import Progress
from .config import FinetuneConfig
from .criteria import Criterion, criterion_of, describe_criterion
from .data import Stream, stream
from .engine import Interrupt, engine, fast_math, refuse_sharding
from .experiment import describe_run, plain
from .form import TrainingForm, recomputing
from .freezing import choose_trainable, trained_ever, trained_in, trained_parts
from .groups import group_summary, groups_of, learning_rates_in_words
from .lock import alone_in
from .log import Log
from .optimizing import optimizer, schedule, try_optimizer, try_schedule
from .parts import (
    as_found,
    count,
    head_size,
    new_head,
    se_modules,
    set_drop_path,
    structure_of,
    to_device,
)
from .randomness import EPOCH, kept_randomness, seed_all
from .run import Run, share, uses_channels_last
from .transforms import note_images, other_classes, transforms_for

__all__ = ["checked", "start_run"]

T = TypeVar("T")

# These may be other than in the run that is resumed; all other fields decide the result.
FREE_FIELDS = {"workers", "checkpoint_minutes", "trackers", "bad_images"}
RUN = "run.yaml"


def checked(model: Any, config: Any, output_dir: Any, resume: bool) -> Path | None:
    """The output folder, after the arguments were looked at; nothing has been changed yet."""
    check_module(model)
    warn_of_lost_sites(model)
    if not isinstance(config, FinetuneConfig):
        raise TypeError(f"config must be a FinetuneConfig, got {brief(config)} of type {type(config).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        raise RetrofitError(
            f"finetune wraps and compiles the network itself; give the bare one, not a {type(model).__name__}"
        )
    if any(type(value).__name__ == "DTensor" for value in (*model.parameters(), *model.buffers())):
        raise RetrofitError(
            "the model's parameters are spread over processes (fully_shard); finetune needs the whole network in each "
            "process: give the model as it was before, and start it with torchrun for DistributedDataParallel"
        )
    unmade = [name for name, value in model.named_parameters() if is_lazy(value) or value.is_meta]
    if unmade:
        raise RetrofitError(
            f"{unmade[0]} has no values yet; call the network once on an input where it is lazy, or load its weights where it is "
            "on the meta device"
        )
    try:
        get_optimizer_class(config.optimizer, bind_defaults=False)
    except ValueError as error:
        raise RetrofitError(
            f"timm knows no optimizer {config.optimizer!r}; there are {', '.join(map(str, list_optimizers()))}"
        ) from error
    try_schedule(config)
    try_optimizer(config)
    trained_parts(model, config.trainable)
    if output_dir is None:
        if resume:
            raise RetrofitError("resume=True needs the output_dir of the run that is to go on")
        return None
    output = Path(output_dir)
    if disk.has_checkpoint(output) and not resume:
        raise RetrofitError(f"{output} holds a run already; go on with it (resume=True), or give another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RetrofitError(f"{output} can't be made: {error.strerror or error}") from error
    disk.check_folders(output)
    return output


@contextlib.contextmanager
def start_run(
    model: nn.Module,
    train_data: Any,
    val_data: Any,
    config: FinetuneConfig,
    output: Path | None,
    *,
    resume: bool,
    base: Base | None,
    command: dict[str, Any] | None,
    quiet: bool,
    criterion: Criterion | None = None,
    teacher: nn.Module | None = None,
    callbacks: Callbacks,
) -> Iterator[Run]:
    """All that a fine-tune needs before its first step, put away again at the end.

    Whatever is found wrong on the way leaves the network with the structure that it had.
    """
    with contextlib.ExitStack() as stack:
        wanted = stack.enter_context(as_found(model))
        if teacher is not None:
            stack.enter_context(as_found(teacher))
        stack.enter_context(kept_randomness())
        stack.enter_context(fast_math(config))
        interrupt = stack.enter_context(Interrupt(quiet))
        accelerator = stack.enter_context(checked_engine(model, config, output))
        described = describe_run(model, train_data, val_data, base) | describe_criterion(criterion, teacher)
        experiment = same_on_all(plain(described), accelerator)
        train = batches_of(train_data, "train_data", model, config, base, accelerator)
        val = None if val_data is None else batches_of(val_data, "val_data", model, config, base, accelerator)
        stack.enter_context(recomputing(model, config.grad_checkpointing))
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(structure_of(model))
        classes, remark = fit_head(model, train_data, config, wanted)
        note_images(model, train_data, config, base)
        # All that is ever trained is in the optimizer from the start; what is frozen has no gradient and is passed over.
        # That holds for what this run does not reach, too: it may be extended.
        choose_trainable(model, trained_ever(config), wanted)
        progress, saved = load_saved(output if resume else None, model, config, experiment, accelerator)
        if base is not None:
            check_base(model, base)  # rather now than when the first epoch is to be saved
        place(model, config, accelerator)
        run = Run(
            model, config, accelerator, interrupt, wanted, output, base, experiment, train, val, progress,
            **learning(model, config, len(train), classes, fused=accelerator.device.type == "cuda"),
            criterion=on_device(criterion_of(config, criterion, train_data, classes), accelerator.device),
            teacher=None if teacher is None else in_mode(on_device(teacher, accelerator.device), False),
            form=TrainingForm(model, config.compile), callbacks=callbacks,
            log=log_of(config, output, len(train), val is not None, accelerator, quiet),
        )  # fmt: skip
        run.choose(trained_in(config, min(progress.epoch, config.epochs - 1)))
        if saved:
            restore(run, saved)
        stack.enter_context(run.log)
        if output is not None and run.rank == 0:
            prepare_folder(run, output, command, resumed=bool(saved))
        undo.pop_all()
        introduce(run, remark)
        for tracker in start_trackers(accelerator, config):
            stack.callback(tracker.finish)
        yield run


@contextlib.contextmanager
def checked_engine(model: nn.Module, config: FinetuneConfig, output: Path | None) -> Iterator[Accelerator]:
    """The Accelerator of a run, which suits the network and the config."""
    with engine(config, None if output is None else str(output)) as accelerator:
        refuse_sharding(accelerator)
        with alone_in(output) if output is not None and accelerator.is_main_process else contextlib.nullcontext():
            yield accelerator


def place(model: nn.Module, config: FinetuneConfig, accelerator: Accelerator) -> None:
    """Put the network on the device, with the same weights in all processes."""
    to_device(model, accelerator.device, uses_channels_last(config, accelerator.device))
    if accelerator.num_processes > 1:
        share(model.state_dict().values())  # the processes may have drawn other first weights


def load_saved(
    output: Path | None, model: nn.Module, config: FinetuneConfig, experiment: dict[str, Any], accelerator: Accelerator
) -> tuple[Progress, dict[str, Any]]:
    """How far the run in ``output`` has come, and its state dicts; the weights go into ``model``."""
    if output is None or not disk.has_checkpoint(output):
        return Progress(), {}
    world, groups = accelerator.num_processes, group_summary(groups_of(model, config))
    return disk.load_training(output, model, config.to_dict(), experiment, groups, world=world, free=FREE_FIELDS)


def learning(
    model: nn.Module, config: FinetuneConfig, batches: int, classes: int | None, *, fused: bool
) -> dict[str, Any]:
    """The parts of a run by which the network learns."""
    raw_optimizer = optimizer(groups_of(model, config), config, fused)
    return {
        "raw_optimizer": raw_optimizer,
        "schedule": schedule(raw_optimizer, config, math.ceil(batches / config.grad_accum_steps)),
        "ema": ModelEmaV3(model, config.ema_decay, use_warmup=True) if config.ema_decay is not None else None,
        "mixup": mixup_of(config, classes),
    }


def on_device(value: T, device: torch.device) -> T:
    """A network or a loss, moved if it is a module; what its own ``to`` returns is not looked at."""
    if isinstance(value, nn.Module):
        value.to(device)
    return value


def log_of(
    config: FinetuneConfig, output: Path | None, batches: int, validates: bool, accelerator: Accelerator, quiet: bool
) -> Log:
    chosen_by = [f"val_{config.best_metric}"] if config.best_metric not in ("loss", "accuracy") else []
    measured = ["val_loss", "val_accuracy", *chosen_by] if validates else []
    memory = ["peak_memory_mb"] if accelerator.device.type == "cuda" else []
    columns = ["epoch", "train_loss", "train_accuracy", *measured, "lr", "images_per_second", "seconds", *memory]
    updates = math.ceil(batches / config.grad_accum_steps)
    return Log(
        output, epochs=config.epochs, updates=updates, columns=columns, rank=accelerator.process_index, quiet=quiet
    )


def batches_of(
    data: Any, name: str, model: nn.Module, config: FinetuneConfig, base: Base | None, accelerator: Accelerator
) -> Stream:
    train = name == "train_data"
    return stream(
        data, name=name, train=train, batch_size=config.batch_size, bad_images=config.bad_images,
        balanced=config.sampling == "balanced",
        transform=transforms_for(model, config, train=train, base=base), seed=config.seed, workers=config.workers,
        rank=accelerator.process_index, world=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip


def fit_head(
    model: nn.Module, train_data: Any, config: FinetuneConfig, wanted: dict[str, bool]
) -> tuple[int | None, str]:
    """Give the network the head and the stochastic depth of the config; the number of classes, where it is known, and
    what is to be said of it."""
    seed_all(config.seed, EPOCH)
    classes = head_size(model)
    remark = other_classes(model, train_data)
    if config.num_classes is not None and (config.num_classes != classes or remark):
        new_head(model, config.num_classes)
        wanted.update({name: True for name, _ in model.named_parameters() if name not in wanted})
    if config.drop_path is not None:
        set_drop_path(model, config.drop_path)
    if remark:
        kept = (
            "its numbers mean other classes now; num_classes=... gives a new one" if config.num_classes is None else ""
        )
        remark += f": the head is kept, {kept}" if kept else ": the head is new"
    return config.num_classes or classes, remark


def mixup_of(config: FinetuneConfig, classes: int | None) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    if classes is None:
        raise RetrofitError("mixup and cutmix need the number of classes: num_classes=...")
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Put the saved state dicts back in place. timm's schedules have none: they go by the number of updates."""
    try:
        disk.load_optimizer(run.raw_optimizer, saved["optimizer"])
        if run.ema is not None:
            run.ema.module.load_state_dict(saved["ema"])
        if run.accelerator.scaler is not None and "scaler" in saved:
            run.accelerator.scaler.load_state_dict(saved["scaler"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RetrofitError(
            f"the state in {run.output}/{disk.LAST} is not that of this run, it may have been edited: {error!r}; start anew in "
            "another folder"
        ) from error
    if run.progress.best is not None and run.output is not None:
        run.best_weights = disk.load_best(run.output)


def prepare_folder(run: Run, output: Path, command: dict[str, Any] | None, *, resumed: bool) -> None:
    """Write what a run's folder holds from the start. ``run.yaml`` is enough to repeat the run."""
    disk.check_space(output, run.model, run.config)
    with replaced_file(output / "config.yaml") as fresh:
        run.config.to_yaml(fresh)
    file = output / RUN
    content = {"command": command, "experiment": run.experiment, "config": run.config.to_dict()}
    if resumed:  # with the command that began it; it may have been extended
        content = {**content, **written(file), "config": run.config.to_dict()}
    with replaced_file(file) as fresh:
        fresh.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    run.log.resume(run.progress.updates)


def written(file: Path) -> dict[str, Any]:
    """What a ``run.yaml`` holds; nothing where it is missing or broken."""
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"), file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
    run.log.note(learning_rates_in_words(run.raw_optimizer.param_groups, config.lr))
    if remark:
        run.log.note(remark)
    if progress.updates:
        run.log.note(f"resumed in epoch {min(progress.epoch + 1, config.epochs)}, after update {progress.updates}")


def start_trackers(accelerator: Accelerator, config: FinetuneConfig) -> list[Any]:
    if not config.trackers:
        return []
    flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in config.to_dict().items()}
    accelerator.init_trackers("se-retrofit", config=flat)
    return list(accelerator.trackers) if accelerator.is_main_process else []
