"""``se-retrofit demo``: the whole workflow on handwritten digits, in seconds and on any computer."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from ..errors import RetrofitError
from ..tables import aligned
from .app import app, say

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import TensorDataset

HELP = """
Train a small network on real data, retrofit it and fine-tune it, in half a minute on the CPU.

The data are the 1797 handwritten digits included in scikit-learn; nothing is downloaded and nothing is written.

Examples:

- `se-retrofit demo`
- `se-retrofit demo --seed 1 --epochs 10`
"""


@app.command("demo", help=HELP)
def demo(
    seed: int = typer.Option(0, min=0, max=2**62, help="Random seed for the weights and the order of the images."),
    epochs: int = typer.Option(5, min=1, help="Number of epochs of the first training and of the fine-tuning."),
    reduction: int = typer.Option(8, min=1, help="SE's reduction ratio."),
) -> None:
    import torch

    from ..finetune import load_data
    from ..finetune.parts import count
    from ..retrofit import add_se, plan_of
    from ..surgery.record.inputs import Inputs
    from ..verify import agreement
    from .demo_network import SmallResNet

    started = time.perf_counter()
    console = Console()
    digits = load_data("digits", image_size=8)
    images = digits.val.tensors[0]
    torch.manual_seed(seed)

    heading(console, "1. A trained network")
    model: nn.Module = SmallResNet()
    say(console, f"SmallResNet, {count(model):,} parameters, on {len(digits.train):,} handwritten digits; "
                 f"{len(digits.val)} others to validate on.")  # fmt: skip
    train(console, "training", model, digits.train, epochs=epochs, lr=5e-3, seed=seed)
    results = {"trained network": (count(model), right(model, digits.val))}

    heading(console, f"2. model = add_se(model, reduction={reduction})")
    retrofitted = add_se(model, reduction)
    say(console, plan_of(retrofitted))

    heading(console, "3. Still the same function?")
    for mode in ("eval", "train"):
        comparison = agreement(model, retrofitted, Inputs((images,)), training=mode == "train")
        if not comparison.equal:
            raise RetrofitError(
                f"in {mode} mode, outputs differ by {comparison.difference:.1e}: a bug, please report it"
            )
        say(console, f"Yes, in {mode} mode: torch.equal on all {comparison.values:,} outputs "
                     f"for the {len(images)} validation images.")  # fmt: skip
    results["retrofitted, not yet fine-tuned"] = count(retrofitted), right(retrofitted, digits.val)
    low, high = gate_range(retrofitted, images)
    say(console, f"Gates: from {low} to {high}.")

    heading(console, "4. Fine-tuning, with SE and, for comparison, without")
    # the same further training for both, at FinetuneConfig's default rate: else SE would get the credit for more epochs
    networks = {"with SE": retrofitted, "without SE": copy.deepcopy(model)}
    for name, network in networks.items():
        train(console, name, network, digits.train, epochs=epochs, lr=2e-4, seed=seed + 1)
        results[f"fine-tuned {name}"] = count(network), right(network, digits.val)
    low, high = gate_range(retrofitted, images)
    say(console, f"Gates: from {low:.3f} to {high:.3f}.")

    heading(console, "5. Result")
    rows = [("", "parameters", "right", "accuracy")]
    for name, (size, hits) in results.items():
        rows.append((name, f"{size:,}", f"{int(hits.sum())}/{len(hits)}", f"{hits.float().mean():.2%}"))
    for line in aligned(rows, left=1):
        say(console, line)
    say(console, verdict(results["fine-tuned with SE"][1], results["fine-tuned without SE"][1]))
    say(console, f"\n{time.perf_counter() - started:.0f} seconds. Next: se-retrofit add resnet50")


def verdict(with_se: Tensor, without: Tensor) -> str:
    """Say whether SE made a difference, by a sign test on the images that only one of the two networks gets right."""
    won, lost = int((with_se & ~without).sum()), int((without & ~with_se).sum())
    if won == lost == 0:
        return "With and without SE, the same images are right: on data this easy, one run can't tell whether SE helps."
    said = f"Only with SE right: {won} images; only without: {lost}. "
    # two standard deviations of a fair coin thrown won + lost times
    if abs(won - lost) <= 2 * (won + lost) ** 0.5:
        return said + "That is within the noise: on data this easy, one run can't tell whether SE helps."
    return said + f"More than chance gives in one run, in favour of {'SE' if won > lost else 'the plain network'}."


def train(
    console: Console, label: str, model: nn.Module, data: TensorDataset, *, epochs: int, lr: float, seed: int
) -> None:
    """Train the network in place. The same seed gives the same batches for every network."""
    from ..finetune import Callbacks, Facts, FinetuneConfig, finetune

    def tell(facts: Facts) -> None:
        say(console, f"{label}: epoch {facts.epoch}/{epochs}, loss {facts.history[-1]['train_loss']:.4f}")

    config = FinetuneConfig(epochs=epochs, lr=lr, seed=seed, cpu=True, label_smoothing=0.0)
    finetune(model, data, config=config, callbacks=Callbacks(after_epoch=tell), quiet=True)


def right(model: nn.Module, data: TensorDataset) -> Tensor:
    """Return whether the network gets each image right."""
    from ..finetune import FinetuneConfig, evaluate

    return evaluate(model, data, config=FinetuneConfig(cpu=True)).right


def gate_range(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest gate of all SE modules over all images."""
    from ..inspection import excitations

    sites = excitations(model, [images]).sites
    return min(site.low for site in sites), max(site.high for site in sites)


def heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold", markup=False, highlight=False)
