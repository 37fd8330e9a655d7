"""What SE costs in a training step: ``python benchmarks/training.py [--compile] [--dtype bfloat16]``.

The plain network, the same after ``add_se``, that after ``fuse_se``, and timm's own with native SE take turns. Beside the
time of forward and backward stand the bytes that autograd keeps for the backward, without parameters, each storage once.
"""

from __future__ import annotations

import argparse

import timm
import torch
from inference import LAYOUTS, forward_backward
from timing import interleaved, machine, milliseconds, ratio, table
from torch import Tensor, nn

from se_retrofit import add_se, fuse_se


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--plain", default="resnet50", help="a timm network")
    parser.add_argument("--native", default="seresnet50", help="the same with SE, also timm's; empty: none")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the autocast")
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)

    mode = "torch.compile" if arguments.compile else "eager"
    print(f"{machine(device)}; {mode}, {arguments.dtype}, batch {arguments.batch}, {arguments.size}x{arguments.size}\n")
    plain = timm.create_model(arguments.plain)
    models = {"plain": plain, "retrofitted": add_se(plain, reduction=16)}
    models["fused"] = fuse_se(models["retrofitted"])
    if arguments.native:
        models["native SE"] = timm.create_model(arguments.native)
    rows: list[list[object]] = []
    for layout in arguments.layouts:
        torch.compiler.reset()
        x = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
        x = x.to(memory_format=LAYOUTS[layout])
        steps, saved = {}, {}
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            for name, model in models.items():
                model.to(device, memory_format=LAYOUTS[layout]).train()
                runs = torch.compile(model) if arguments.compile else model
                steps[name] = forward_backward(runs, x)
                saved[name] = saved_bytes(runs, x)
            synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
            seconds = interleaved(steps, rounds=arguments.rounds, synchronize=synchronize)
        for name in models:
            against = ratio(seconds[name], seconds["plain"]) if name != "plain" else "1"
            kept = f"{saved[name] / 2**20:,.1f}"
            more = f"{saved[name] / saved['plain']:.3f}"
            rows.append([f"{layout}, {name}", milliseconds(seconds[name]), against, kept, more])
    print(table(("", "ms", "/ plain", "saved MiB", "saved / plain"), rows))


if __name__ == "__main__":
    main()
