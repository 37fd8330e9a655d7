"""``se-retrofit demo``: the whole job on handwritten digits, in seconds and on any computer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ..attention import SEAttention
from ..errors import RetrofitError
from ..retrofit import add_se, plan_of
from ..verify import compare
from .app import app, say
from .demo_network import Digits, SmallResNet, load_digits, predict, train

HELP = """
Train a small network on real data, retrofit it, fine-tune it: the whole job in half a minute, on the CPU.

The data are the 1797 handwritten digits that scikit-learn ships; nothing is downloaded and nothing is written.

Examples:

- `se-retrofit demo`
- `se-retrofit demo --seed 1 --epochs 10`
"""


@app.command("demo", help=HELP)
def demo(
    seed: int = typer.Option(
        0, min=0, help="Of the weights and of the order of the images; the same seed, the same run."
    ),
    epochs: int = typer.Option(5, min=1, help="Epochs of the first training, and of the fine-tuning after it."),
    reduction: int = typer.Option(8, min=1, help="SE's reduction ratio."),
) -> None:
    started = time.perf_counter()
    console = Console()
    digits = load_digits()
    torch.manual_seed(seed)

    heading(console, "1. A trained network")
    model: nn.Module = SmallResNet()
    say(console, f"SmallResNet, {parameters(model):,} parameters, on {len(digits.train_images):,} handwritten digits; "
                 f"{len(digits.val_images)} others to validate on.")  # fmt: skip
    with progress(console, "training", epochs) as on_epoch:
        train(model, digits, epochs=epochs, lr=5e-3, seed=seed, on_epoch=on_epoch)
    results = {"trained network": (parameters(model), right(model, digits))}

    heading(console, f"2. model = add_se(model, reduction={reduction})")
    retrofitted = add_se(model, reduction)
    say(console, plan_of(retrofitted))

    heading(console, "3. Still the same function?")
    for mode in ("eval", "train"):
        comparison = compare(model, retrofitted, (digits.val_images,), training=mode == "train")
        if not comparison.equal:
            raise RetrofitError(
                f"in {mode} mode, outputs differ by {comparison.difference:.1e}: a bug, please report it"
            )
        say(console, f"Yes, in {mode} mode: torch.equal on all {comparison.values:,} outputs "
                     f"for the {len(digits.val_images)} validation images.")  # fmt: skip
    results["retrofitted, not yet fine-tuned"] = parameters(retrofitted), right(retrofitted, digits)
    low, high = gate_range(retrofitted, digits.val_images)
    say(console, f"Gates: from {low} to {high}.")

    heading(console, "4. Fine-tuning, with SE and, for comparison, without")
    # the same further training for both: else whatever more epochs bring would look like SE's merit
    networks = {"with SE": retrofitted, "without SE": copy.deepcopy(model)}
    for name, network in networks.items():
        with progress(console, name, epochs) as on_epoch:
            train(network, digits, epochs=epochs, lr=1e-3, seed=seed + 1, on_epoch=on_epoch)
        results[f"fine-tuned {name}"] = parameters(network), right(network, digits)
    low, high = gate_range(retrofitted, digits.val_images)
    say(console, f"Gates: from {low:.2f} to {high:.2f}.")

    heading(console, "5. Result")
    table = Table("", box=None, pad_edge=False)
    for column in ("parameters", "right", "accuracy"):
        table.add_column(column, justify="right")
    for name, (size, hits) in results.items():
        table.add_row(name, f"{size:,}", f"{int(hits.sum())}/{len(hits)}", f"{hits.float().mean():.2%}")
    console.print(table)
    say(console, verdict(results["fine-tuned with SE"][1], results["fine-tuned without SE"][1]))
    say(console, f"\n{time.perf_counter() - started:.0f} seconds. Next: se-retrofit convert resnet50")


def verdict(with_se: Tensor, without: Tensor) -> str:
    """Whether SE made a difference, in words: a sign test on the images that only one of the two gets right."""
    won, lost = int((with_se & ~without).sum()), int((without & ~with_se).sum())
    if won == lost == 0:
        return "With and without SE, the same images are right: on data this easy, one run can't tell whether SE helps."
    said = f"Only with SE right: {won} images; only without: {lost}. "
    # two standard deviations of a fair coin thrown won + lost times
    if abs(won - lost) <= 2 * (won + lost) ** 0.5:
        return said + "That is within the noise: on data this easy, one run can't tell whether SE helps."
    return said + f"More than chance gives in one run, in favour of {'SE' if won > lost else 'the plain network'}."


def right(model: nn.Module, digits: Digits) -> Tensor:
    """For each validation image, whether the model gets it right."""
    return predict(model, digits.val_images).argmax(1) == digits.val_labels


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def gate_range(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """The smallest and the largest gate in all SE modules over all images."""
    gates: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda se, args: gates.append(se.excite(args[0])))
        for module in model.modules()
        if isinstance(module, SEAttention)
    ]
    predict(model, images)
    for hook in hooks:
        hook.remove()
    return min(gate.min().item() for gate in gates), max(gate.max().item() for gate in gates)


def heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold", markup=False, highlight=False)


@contextmanager
def progress(console: Console, label: str, epochs: int) -> Iterator[Callable[[int, float], None]]:
    """A bar in a terminal, a line an epoch elsewhere; yields what to call after each epoch."""
    if not console.is_terminal:
        yield lambda epoch, loss: say(console, f"{label}: epoch {epoch}/{epochs}, loss {loss:.4f}")
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=epochs, loss=float("nan"))
        yield lambda epoch, loss: bar.update(task, completed=epoch, loss=loss)
