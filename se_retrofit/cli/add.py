"""``se-retrofit add``: retrofit a network by name, print what was inserted, and check that the outputs are the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import RetrofitError
from ..paths import writable
from . import options
from .app import app, say

if TYPE_CHECKING:
    from torch import nn

HELP = """
Retrofit a timm or torchvision network, print what was inserted, and check that its outputs are the same.

Examples:

- `se-retrofit add resnet50`
- `se-retrofit add timm/resnet50 --pretrained --output resnet50-se/`
- `se-retrofit add torchvision/resnet18 --num-classes 10 --checkpoint mine.pth --output resnet18-se/`
- `se-retrofit add resnet50 --exclude 'layer4.*' --reduction 16`

Exit codes: 0 if the outputs are equal bit for bit; 1 if they are not, or on any other error; 2 for wrong usage.
"""


@app.command("add", help=HELP, no_args_is_help=True)
@options.takes(options.WEIGHTS_OPTIONS, options.SE_OPTIONS)
def add(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=options.MODEL_HELP)],
    num_classes: options.NumClasses = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="save the network into this folder")] = None,
) -> None:
    pretrained, checkpoint = context.params["pretrained"], context.params["checkpoint"]
    options.check_weights(context)
    from ..models import Base, load_checkpoint
    from ..retrofit import add_se, plan_of
    from ..saving.atomic import check_replaceable
    from ..saving.recipe import RECIPE, WEIGHTS

    if output is not None:  # fail before the work, not after it
        check_replaceable(writable(output), (WEIGHTS, RECIPE))
    console = Console()
    base = Base.of(model, **({} if num_classes is None else {"num_classes": num_classes}))
    original = base.build(pretrained)
    if checkpoint is not None:
        load_checkpoint(original, checkpoint, remap=context.params["remap"])
    retrofitted = add_se(original, **options.se_options(context))
    plan = plan_of(retrofitted)
    say(console, f"{base}: {type(original).__name__}")
    say(console, plan)
    before = sum(parameter.numel() for parameter in original.parameters())
    say(console, f"parameters: {before:,} -> {before + plan.parameters:,} (+{plan.parameters / before:.1%})")
    random_weights = not pretrained and checkpoint is None
    same = check(console, original, retrofitted, random_weights=random_weights, gate=context.params["gate"])
    if output is not None:
        from ..saving import save_retrofitted

        save_retrofitted(retrofitted, output)
        say(console, f'saved {output}. To load it: se_retrofit.load_retrofitted("{output}")')
    if not same:
        raise typer.Exit(1)


def check(console: Console, original: nn.Module, retrofitted: nn.Module, *, random_weights: bool, gate: str) -> bool:
    """Print whether both networks compute the same, and return whether that is as the gate promises."""
    import torch

    from ..retrofit import plan_of
    from ..surgery.record.inputs import described_inputs
    from ..verify import agreement, redraw_vectors, se_matters

    inputs: Any = described_inputs(plan_of(retrofitted).inputs, original)  # of a network by name, always known
    inputs = inputs.with_values(torch.Generator().manual_seed(0))
    say(console)
    say(console, f"check on random inputs of the shape {inputs.shapes}:")
    if random_weights:
        # fresh norms hold ones and zeros, which would hide a fault
        original, retrofitted = copy.deepcopy(original), copy.deepcopy(retrofitted)
        redraw_vectors(original)
        retrofitted.load_state_dict(original.state_dict(), strict=False)
        say(console, "  random weights, norms' parameters and statistics drawn at random for this check")
    as_promised = True
    for mode in ("eval", "train"):
        try:
            comparison = agreement(original, retrofitted, inputs, training=mode == "train")
        except Exception as error:
            if mode == "eval":
                raise RetrofitError(f"{type(original).__name__} does not run on random inputs: {error}") from error
            reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
            say(console, f"  train mode: not checked, the network itself does not run so ({reason})")
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
    verdict = "the same function" if as_promised else "NOT shown to be the same function"
    if gate != "identity":
        verdict = "not the same function, as expected: a sigmoid gate halves what it scales until it is trained"
    say(console, f"verdict: {verdict}")
    return as_promised
