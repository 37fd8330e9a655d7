"""Devices, precision and processes, by means of Accelerate; and the form that a network has during a training step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast, broadcast_object_list
from torch import Tensor, nn

from ..errors import RetrofitError
from ..fusion import fuse_se, plan_fusion, unfuse_se
from ..precision import tf32
from ..retrofit import has_se
from .config import FinetuneConfig
from .data import Batch
from .parts import layout_of

BACKEND = "inductor"  # for torch.compile
SWITCH = "grad_checkpointing"  # the attribute that switches gradient checkpointing on in timm's networks


@contextlib.contextmanager
def engine(config: FinetuneConfig, project_dir: str | None = None) -> Iterator[Accelerator]:
    """Provide an Accelerator for a run. Under ``torchrun`` and ``accelerate launch`` it joins the other processes."""
    # Without a GPU, Accelerate must be told that it runs on the CPU, or it overlooks torchrun.
    cpu = config.cpu or not torch.accelerator.is_available()
    ours = not AcceleratorState._shared_state  # the caller may have an Accelerator of their own
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=_precision(config.precision, cpu),
            log_with=list(config.trackers) or None,
            project_dir=project_dir,
            dynamo_backend=BACKEND if config.compile else None,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)],
        )
    except (ValueError, ImportError) as error:
        hint = "; trackers need output_dir=..." if config.trackers and project_dir is None else ""
        raise RetrofitError(f"Accelerate can't set up this run: {error}{hint}") from error
    try:
        missing = set(config.trackers) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
        if missing:
            raise RetrofitError(f"trackers not available: {', '.join(sorted(missing))}; are they installed?")
        kind = accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise RetrofitError(
                f"finetune runs on one device or with DistributedDataParallel, not with {kind.value}: each process needs "
                "the whole network. Start it with torchrun, or with accelerate launch --multi_gpu"
            )
        with fast_math(config.precision) if accelerator.device.type == "cuda" else contextlib.nullcontext():
            yield accelerator
    except torch.OutOfMemoryError as error:
        error.add_note(
            "Less memory is needed with a smaller batch_size (with grad_accum_steps, an update sees as many images), and "
            "with grad_checkpointing=True"
        )
        raise
    finally:
        accelerator.free_memory()
        if ours:
            # Accelerate has one state per process; the next run may want another precision. The process group stays.
            GradientState._reset_state()
            AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)


def gpu_of(model: nn.Module, config: FinetuneConfig) -> torch.accelerator.device_index:
    """Return a context in which the GPU that a network is on is the current one, on which a single process runs. Of
    several processes, each has its own."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    stays = device.type == "cuda" and processes()[1] == 1 and not config.cpu
    return torch.accelerator.device_index(device.index if stays else None)


def _precision(precision: str, cpu: bool) -> str | None:
    if precision in ("fp32", "tf32"):
        return "no"
    if precision != "auto":
        return precision
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None  # set by accelerate launch
    if cpu or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextlib.contextmanager
def fast_math(precision: str) -> Iterator[None]:
    """Enable TF32 and cuDNN's search for the fastest kernels for the duration of a run on a GPU."""
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with tf32(precision != "fp32"):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def processes() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, without joining them."""
    if PartialState._shared_state:
        state = PartialState()
        return state.process_index, state.num_processes
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def in_any(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether a flag is set in any process; all of them must ask at the same point."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum") > 0)


def by_main_process(accelerator: Accelerator, write: Callable[[], None]) -> None:
    """Let the main process write files while the others wait; all raise its error if it can't."""
    error = None
    if accelerator.is_main_process:
        try:
            write()
        except RetrofitError as failure:
            error = failure
    if (error := broadcast_object_list([error])[0]) is not None:
        raise error


@torch.no_grad()
def share(tensors: Iterable[Any]) -> None:
    """Copy the values of the main process's tensors to all others."""
    for tensor in tensors:
        if isinstance(tensor, Tensor):  # extra state may be anything, and must be the same anyway
            # NCCL takes no other layouts, such as that of a transposed weight
            tensor.copy_(broadcast(tensor.clone(memory_format=torch.contiguous_format)))


def placed(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the images and targets of a batch on the device."""
    images = batch.images.to(device, non_blocking=True, memory_format=layout_of(batch.images, device))
    targets = batch.targets if batch.targets.dim() == 1 else batch.targets.float()
    return images, targets.to(device, non_blocking=True)


class Forward(nn.Module):
    """What Accelerate wraps and patches (``forward``, for autocast) in place of the caller's network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


def logits_of(output: Any) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and auxiliary logits (of GoogLeNet and Inception in training mode) in a network's output."""
    auxiliary: list[Tensor] = []
    if isinstance(output, tuple) and hasattr(output, "logits"):
        auxiliary = [t for name, t in output._asdict().items() if name != "logits" and t is not None]  # type: ignore[attr-defined]
        output = output.logits
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise RetrofitError(f"finetune is for classifiers, which return logits of shape (N, classes); got {got}")
    return output, auxiliary


def called(network: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Call the network and return the ``logits_of`` its output."""
    try:
        return logits_of(network(images))
    except (RuntimeError, ValueError) as error:
        if type(error) not in (RuntimeError, ValueError) or "gloo" in str(error):
            raise  # out of memory, an error of a compiler, or another process that has ended
        batch = f"a batch of shape {tuple(images.shape)}, {images.dtype}"
        if "more than 1 value per channel" in str(error):
            raise RetrofitError(
                f"a batch norm gets a single value for each channel from {batch}; use a larger batch_size (a DataLoader "
                "of your own needs drop_last=True), larger images, or freeze_bn=True"
            ) from error
        raise RetrofitError(
            f"the network fails on {batch}: {error}; compare the images with what the network expects (channels first, "
            "their number, size and dtype)"
        ) from error


class TrainingForm:
    """A context manager for a training step, in which the modules that ``fuse_se`` changes have their fused classes.

    Outside it, the network is as the caller built it, so it can be evaluated, averaged and saved without conversion.
    """

    def __init__(self, model: nn.Module, fused: bool) -> None:
        self.classes: list[tuple[nn.Module, type, type]] = []
        if fused and has_se(model) and plan_fusion(model).fused:
            own = [(module, type(module)) for module in model.modules()]
            fuse_se(model, inplace=True)
            self.classes = [(module, cls, type(module)) for module, cls in own if type(module) is not cls]
            unfuse_se(model, inplace=True)

    def __enter__(self) -> None:
        for module, _, fused in self.classes:
            object.__setattr__(module, "__class__", fused)

    def __exit__(self, *error: object) -> None:
        for module, own, _ in self.classes:
            object.__setattr__(module, "__class__", own)


@contextlib.contextmanager
def recomputing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Enable the network's own gradient checkpointing (timm's ``set_grad_checkpointing``) within the context."""

    def on() -> bool:
        return any(getattr(module, SWITCH, False) is True for module in model.modules())

    if not wanted or on():
        yield
        return
    switch: Any = getattr(model, "set_grad_checkpointing", lambda enable: None)
    with contextlib.suppress(AssertionError):  # raised by timm if the network doesn't support it
        switch(True)
    if not on():
        raise RetrofitError(
            f"grad_checkpointing=True: {type(model).__name__} has no set_grad_checkpointing like timm's; leave it out, "
            "or use a smaller batch_size with grad_accum_steps"
        )
    try:
        yield
    finally:
        switch(False)
