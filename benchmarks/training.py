"""What SE costs in a training step: ``python benchmarks/training.py``, or ``--quick`` for ResNet-50 through torch.compile alone.

The plain network, the same after ``add_se``, that after ``fuse_se``, and timm's own with native SE take turns, step by step,
for each network, eager and compiled, in each precision and layout. Beside the time of forward and backward stand the bytes
that autograd keeps for the backward (without parameters, each storage once) and, on CUDA, the peak of the memory.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from timing import LAYOUTS, autocast, interleaved, machine, milliseconds, peak, ratio, table
from torch import Tensor, nn

from se_retrofit import add_se, fuse_se
from se_retrofit.fusion import plan_fusion

# timm's networks; where timm has one with "se" before its name, that is measured as well
NETWORKS = ["resnet50", "resnext50_32x4d", "mobilenetv2_100", "convnext_tiny"]


def variants(name: str) -> tuple[dict[str, nn.Module], str]:
    """The networks to be compared, and a remark on what is not among them."""
    torch.manual_seed(0)
    plain = timm.create_model(name)
    models = {"plain": plain, "retrofitted": add_se(plain, reduction=16)}
    fusion, remark = plan_fusion(models["retrofitted"]), ""
    if fusion.fused:
        models["fused"] = fuse_se(models["retrofitted"])
    else:
        remark = f"{name} has no SE that can be fused: {fusion.skipped[0].reason}."
    native = f"se{name}"
    if timm.is_model(native):
        models["native SE"] = timm.create_model(native)
    return models, remark


def forward_backward(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    model.train()

    def step() -> None:
        with autocast(x, dtype):
            output = model(x)
        output.float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a training step keeps for its backward, other than those of parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no address is counted for two

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def measure(
    models: dict[str, nn.Module], compiled: bool, dtype: torch.dtype, layout: str, options: argparse.Namespace
) -> list[list[object]]:
    """The rows of one table."""
    torch.compiler.reset()
    device = options.device
    x = torch.randn(options.batch, 3, options.size, options.size, device=device)
    x = x.to(memory_format=LAYOUTS[layout])
    steps: dict[str, Callable[[], object]] = {}
    saved: dict[str, int] = {}
    for name, model in models.items():
        model.to(device, memory_format=LAYOUTS[layout]).train()
        runs: Any = torch.compile(model) if compiled else model
        steps[name] = forward_backward(runs, x, dtype)
        steps[name]()
        with autocast(x, dtype):
            saved[name] = saved_bytes(runs, x)
    seconds = interleaved(steps, rounds=options.rounds, warmup=1, device=device)
    memory = {name: peak(step, device) for name, step in steps.items()}
    rows: list[list[object]] = []
    for name in models:
        against = ratio(seconds[name], seconds["plain"]) if name != "plain" else "1"
        kept = f"{saved[name] / 2**20:,.1f}"
        more = f"{saved[name] / saved['plain']:.3f}"
        rows.append([f"{layout}, {name}", milliseconds(seconds[name]), against, kept, more, memory[name]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="of timm")
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"], choices=("eager", "compiled"))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], help="of the autocast")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--variants", nargs="*", default=["retrofitted", "fused", "native SE"], help="beside plain")
    parser.add_argument("--batch", type=int, help="default: 8 on CPU, 256 on CUDA")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--quick", action="store_true", help="ResNet-50, compiled, float32: plain, fused and native; batch 4 on the CPU"
    )
    options = parser.parse_args()
    if options.quick:
        options.networks, options.modes, options.dtypes = ["resnet50"], ["compiled"], ["float32"]
        options.variants, options.rounds = ["fused", "native SE"], 12
        options.batch = options.batch or (4 if options.device == "cpu" else None)
    options.batch = options.batch or (8 if options.device == "cpu" else 256)
    started = time.perf_counter()
    print(f"{machine(options.device)}; batch {options.batch}, {options.size}x{options.size}, {options.rounds} rounds")
    header = ("", "ms", "/ plain", "saved MiB", "saved / plain", "peak MiB above the weights")
    for network in options.networks:
        models, remark = variants(network)
        models = {name: model for name, model in models.items() if name == "plain" or name in options.variants}
        for mode, dtype in itertools.product(options.modes, options.dtypes):
            rows: list[list[object]] = []
            for layout in options.layouts:
                rows += measure(models, mode == "compiled", getattr(torch, dtype), layout, options)
            print(f"\n{network}, {mode}, {dtype}\n\n{table(header, rows)}", flush=True)
        if remark:
            print(f"\n{remark}")
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
