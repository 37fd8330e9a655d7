"""What SE costs at run time, retrofitted and native: ``python benchmarks/inference.py [--device cuda --compile]``.

Three networks with the same weights take turns: timm's ``resnet50``, timm's ``seresnet50``, and ``resnet50`` after
``add_se(reduction=16, gate="sigmoid", bias=True)``, which computes the same as ``seresnet50`` (checked before timing).
A ratio of 1 to the native network means that the retrofit adds the cost of SE and no other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import timm
import torch
from timing import interleaved, machine, milliseconds, ratio, table
from torch import Tensor, nn

from se_retrofit import SEAttention, add_se
from se_retrofit.verify import redraw_vectors

PLAIN, NATIVE, RETROFITTED = "plain", "native SE", "retrofitted"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def networks(plain: str, native: str) -> dict[str, nn.Module]:
    """The three networks; all they share has the same weights, and both SE networks the same SE weights."""
    torch.manual_seed(0)
    with_se = timm.create_model(native)
    redraw_vectors(with_se)
    without = timm.create_model(plain)
    without.load_state_dict(with_se.state_dict(), strict=False)
    retrofitted = add_se(without, reduction=16, gate="sigmoid", bias=True, min_hidden=8)
    for path, module in retrofitted.named_modules():
        if isinstance(module, SEAttention):
            theirs = with_se.get_submodule(path.rpartition(".")[0] + ".se")
            for mine, layer in ((module.fc[0], theirs.fc1), (module.fc[2], theirs.fc2)):
                mine.load_state_dict({"weight": layer.weight.flatten(1), "bias": layer.bias})
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        wanted, got = with_se.eval()(x), retrofitted.eval()(x)
    if not torch.allclose(wanted, got, rtol=1e-4, atol=1e-4 * wanted.abs().max().item()):
        raise SystemExit(f"{plain} retrofitted and {native} do not compute the same; timing them would compare nothing")
    return {PLAIN: without, NATIVE: with_se, RETROFITTED: retrofitted}


def forward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.eval()

    def step() -> None:
        with torch.inference_mode():
            model(x)

    return step


def forward_backward(model: nn.Module, x: Tensor) -> Callable[[], object]:
    model.train()

    def step() -> None:
        model(x).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def peak(step: Callable[[], object], device: str) -> str:
    if device != "cuda":
        return "-"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--plain", default="resnet50", help="a timm network")
    parser.add_argument("--native", default="seresnet50", help="the same with SE, also timm's")
    parser.add_argument("--batch", nargs="*", type=int, help="default: 1 8 on CPU, 1 128 on CUDA")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--train", action="store_true", help="forward and backward in train mode, not forward alone")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the autocast"
    )
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype)

    what = "forward and backward" if arguments.train else "forward"
    mode = "torch.compile" if arguments.compile else "eager"
    print(f"{machine(device)}; {what}, {mode}, {arguments.dtype}, {arguments.size}x{arguments.size}", end="\n\n")
    models = {name: model.to(device) for name, model in networks(arguments.plain, arguments.native).items()}
    rows: list[list[object]] = []
    for layout in arguments.layouts:
        for batch in arguments.batch or ((1, 8) if device == "cpu" else (1, 128)):
            x = torch.randn(batch, 3, arguments.size, arguments.size, device=device)
            x = x.to(memory_format=LAYOUTS[layout])
            torch.compiler.reset()
            steps = {}
            for name, model in models.items():
                model.to(memory_format=LAYOUTS[layout])
                runs = torch.compile(model) if arguments.compile else model
                steps[name] = (forward_backward if arguments.train else forward)(runs, x)
            synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                seconds = interleaved(steps, rounds=arguments.rounds, warmup=3, synchronize=synchronize)
                memory = {name: peak(step, device) for name, step in steps.items()}
            for name in models:
                images = f"{batch / statistics.median(seconds[name]):,.1f}"
                against = [ratio(seconds[name], seconds[base]) if name != base else "1" for base in (PLAIN, NATIVE)]
                rows.append(
                    [f"{layout}, batch {batch}, {name}", milliseconds(seconds[name]), images, *against, memory[name]]
                )
    header = ("", "ms", "images/s", "/ plain", "/ native SE", "peak MiB above the weights")
    print(table(header, rows))


if __name__ == "__main__":
    main()
