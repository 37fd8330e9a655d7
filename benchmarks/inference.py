"""What SE costs at run time, retrofitted and native: ``python benchmarks/inference.py [--device cuda --compile]``.

Three networks with the same weights take turns: timm's ``resnet50``, timm's ``seresnet50``, and ``resnet50`` after
``add_se(reduction=16, gate="sigmoid", bias=True)``, which computes the same as ``seresnet50`` (checked before timing).
A ratio of 1 to the native network means that the retrofit adds the cost of SE and no other.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timing import LAYOUTS, inference_rows, machine, table
from torch import nn

from se_retrofit import SEAttention, add_se
from se_retrofit.verify import redraw_vectors

PLAIN, NATIVE, RETROFITTED = "plain", "native SE", "retrofitted"


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--plain", default="resnet50", help="a timm network")
    parser.add_argument("--native", default="seresnet50", help="the same with SE, also timm's")
    parser.add_argument("--batch", nargs="*", type=int, help="default: 1 8 on CPU, 1 128 on CUDA")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the autocast"
    )
    arguments = parser.parse_args()
    device = arguments.device
    dtype = getattr(torch, arguments.dtype)

    mode = "torch.compile" if arguments.compile else "eager"
    print(f"{machine(device)}; {mode}, {arguments.dtype}, {arguments.size}x{arguments.size}", end="\n\n")
    models = {name: model.to(device) for name, model in networks(arguments.plain, arguments.native).items()}
    rows: list[list[object]] = []
    for layout in arguments.layouts:
        for model in models.values():
            model.to(memory_format=LAYOUTS[layout])
        for batch in arguments.batch or ((1, 8) if device == "cpu" else (1, 128)):
            x = torch.randn(batch, 3, arguments.size, arguments.size, device=device)
            found = inference_rows(
                models, x.to(memory_format=LAYOUTS[layout]), (PLAIN, NATIVE),
                compiled=arguments.compile, dtype=dtype, rounds=arguments.rounds, device=device,
            )  # fmt: skip
            rows += ([f"{layout}, batch {batch}, {name}", *cells] for name, *cells in found)
    header = ("", "ms", "images/s", "/ plain", "/ native SE", "peak MiB above the weights")
    print(table(header, rows))


if __name__ == "__main__":
    main()
