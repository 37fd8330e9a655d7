"""``se-retrofit convert``: retrofit a network by name, say what was inserted, and check that it computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from torch import nn

from ..errors import RetrofitError
from ..models import Base, load_checkpoint
from ..plan import Plan
from ..retrofit import add_se, plan_of
from ..verify import compare, prepared_for, redraw_vectors, se_matters
from .app import app, say

HELP = """
Retrofit a timm or torchvision network, print what was inserted, and check on two photographs that it computes the same.

Examples:

- `se-retrofit convert resnet50`
- `se-retrofit convert timm/resnet50 --pretrained --output resnet50-se.safetensors`
- `se-retrofit convert torchvision/resnet18 --num-classes 10 --checkpoint mine.pth --output resnet18-se/`
- `se-retrofit convert resnet50 --exclude 'layer4.*' --reduction 16`

Exit codes: 0, the outputs are equal bit for bit; 1, they are not, or it can't be done; 2, wrong usage.
"""


@app.command("convert", help=HELP, no_args_is_help=True)
def convert(
    model: str = typer.Argument(help="A name such as resnet50, timm/resnet50 or torchvision/resnet50."),
    pretrained: bool = typer.Option(False, "--pretrained", help="Start from the library's weights (downloaded by it)."),
    checkpoint: Path | None = typer.Option(None, help="Start from your weights: .safetensors, or torch.save's."),
    num_classes: int | None = typer.Option(
        None, min=1, help="Number of classes, where it is not the library's default."
    ),
    reduction: int = typer.Option(8, min=1, help="SE's reduction ratio."),
    placement: str = typer.Option("auto", help="Where SE goes: auto, standard, pre, post, identity or 3x3."),
    gate: str = typer.Option("identity", help="identity keeps the function; sigmoid, the paper's, does not."),
    bias: bool = typer.Option(False, "--bias", help="Give SE's two linear layers biases."),
    min_hidden: int = typer.Option(4, min=1, help="The least width between SE's two layers."),
    include: list[str] = typer.Option([], help="Only blocks whose path matches, e.g. 'layer4.*'. May be repeated."),
    exclude: list[str] = typer.Option([], help="Not the blocks whose path matches. May be repeated."),
    output: Path | None = typer.Option(
        None, help="Save the result: FILE.safetensors (weights), or a folder (with its recipe)."
    ),
) -> None:
    console = Console()
    if pretrained and checkpoint is not None:
        raise typer.BadParameter("give --pretrained or --checkpoint, not both")
    if output is not None:
        check_output(output)
    options: dict[str, Any] = {
        "reduction": reduction, "placement": placement, "gate": gate, "bias": bias, "min_hidden": min_hidden,
        "include": include or None, "exclude": exclude or None,
    }  # fmt: skip
    base = Base.of(model, **({} if num_classes is None else {"num_classes": num_classes}))
    original = base.build(pretrained)
    if checkpoint is not None:
        load_checkpoint(original, checkpoint)
    inputs = prepared_for(original, base)

    retrofitted = add_se(original, **options)
    plan = plan_of(retrofitted)
    say(console, f"{base}: {type(original).__name__}")
    say(console, plan)
    say(console, added(original, plan))

    same = check(
        console, original, retrofitted, inputs, random_weights=not pretrained and checkpoint is None, gate=gate
    )
    if output is not None:
        save(console, retrofitted, base, output)
    if not same:
        raise typer.Exit(1)


def added(model: nn.Module, plan: Plan) -> str:
    before = sum(parameter.numel() for parameter in model.parameters())
    return f"parameters: {before:,} -> {before + plan.parameters:,} (+{plan.parameters / before:.1%})"


def check(
    console: Console,
    original: nn.Module,
    retrofitted: nn.Module,
    inputs: tuple[Any, ...],
    *,
    random_weights: bool,
    gate: str,
) -> bool:
    """Print whether both networks compute the same on ``inputs``; whether that is as the gate promises."""
    say(console)
    say(console, "check on two photographs (china.jpg, flower.jpg of scikit-learn), prepared as the model wants them:")
    if random_weights:
        # fresh norms are ones and zeros, and would hide a fault
        original, retrofitted = copy.deepcopy(original), copy.deepcopy(retrofitted)
        redraw_vectors(original)
        retrofitted.load_state_dict(original.state_dict(), strict=False)
        say(console, "  random weights, norms' parameters and statistics drawn at random for this check")
    as_promised = True
    for mode in ("eval", "train"):
        try:
            comparison = compare(original, retrofitted, inputs, training=mode == "train")
        except Exception as error:
            if mode == "eval":
                raise RetrofitError(f"{type(original).__name__} does not run on the photographs: {error}") from error
            say(console, f"  train mode: not checked, the network itself does not run so ({first_line(error)})")
            continue
        if not comparison.finite:
            say(console, f"  {mode} mode: shows nothing, the original's outputs are not finite")
            as_promised = False
        elif comparison.equal:
            say(console, f"  {mode} mode: equal bit for bit, all {comparison.values:,} values")
        else:
            say(console, f"  {mode} mode: different, by {comparison.difference:.2g} x the largest value")
            as_promised = as_promised and gate != "identity"
    counter = se_matters(retrofitted, inputs)
    if counter.equal:
        say(console, "  counter-check: random gates do not change the outputs, so SE takes no part in them")
        as_promised = False
    else:
        say(console, f"  counter-check: with random gates they differ by {counter.difference:.2g} x the largest value")
    if gate != "identity":
        say(
            console,
            "verdict: not the same function, as expected: a sigmoid gate halves what it scales until it is trained",
        )
    else:
        say(console, "verdict: " + ("the same function" if as_promised else "NOT shown to be the same function"))
    return as_promised


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:120] or type(error).__name__


def check_output(output: Path) -> None:
    """Find out before the work, not after it, that the result can't be written."""
    if output.suffix and output.suffix != ".safetensors":
        raise typer.BadParameter(f"{output} is neither a .safetensors file nor a folder", param_hint="--output")
    parent = output.parent
    if not parent.is_dir():
        raise RetrofitError(f"no folder {parent} to write {output.name} to")
    if output.is_dir() if output.suffix else output.is_file():
        raise RetrofitError(f"{output} exists and is {'a folder' if output.suffix else 'a file'}")


def save(console: Console, model: nn.Module, base: Base, output: Path) -> None:
    if output.suffix == ".safetensors":
        from safetensors.torch import save_model

        save_model(model, str(output))
        size = output.stat().st_size / 2**20
        say(console, f"saved {output} ({size:.1f} MiB). To load it: retrofit the network with the same options, then")
        say(console, f'  safetensors.torch.load_model(model, "{output}")')
        return
    from ..saving import save_retrofitted

    save_retrofitted(model, output, base=base)
    say(console, f'saved {output}. To load it: se_retrofit.load_retrofitted("{output}")')
