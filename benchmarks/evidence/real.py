"""The second part: a network with ImageNet's weights is fine-tuned on pictures that others made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_retrofit import add_se
from se_retrofit.attention import Inserted
from se_retrofit.finetune import param_groups
from se_retrofit.finetune.learning import fans_in

from .arms import Arm, head_of, unchanged
from .packages import clip_art, emoji, fashion, lite0
from .results import Results
from .study import SEARCH_SEED, Missing
from .tasks import Part, Task
from .training import Recipe, measured, train

EACH = 20  # training images of a class
RATES = (
    3e-4,
    1e-3,
    3e-3,
    1e-2,
    3e-2,
)  # of the search, which begins in the middle and ends where the best is not at an edge
SIZES = {"emoji": 64, "Fashion-MNIST": 48, "three domains": 64, "Fashion-MNIST, 4,000 images": 48}


# The tasks: the images to train on are drawn by the seed, those to test on are the same for all


def pictures(images: Tensor) -> Tensor:
    """Bytes ``(..., 3, H, W)`` as the network takes them, in the memory format that is quickest on a CPU."""
    scaled = (images.flatten(0, -4).float() / 255 - 0.5) / 0.5
    return scaled.contiguous(memory_format=torch.channels_last)


def split(kinds: list[Tensor], seed: int, train: int, val: int, test: int) -> Task:
    """From the first so many things of each kind to test on, and of the rest drawn ones to train on and to choose by; each thing
    has one picture, or several, which stay together."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], []]
    for things in kinds:
        shuffled = torch.randperm(len(things), generator=torch.Generator().manual_seed(1000))
        rest = shuffled[test:]
        drawn = rest[torch.randperm(len(rest), generator=generator)]
        for part, chosen in zip(parts, (drawn[:train], drawn[train : train + val], shuffled[:test]), strict=True):
            part.append(things[chosen])
    made = []
    for part in parts:
        images = [pictures(things) for things in part]
        made.append(Part(torch.cat(images), torch.arange(len(part)).repeat_interleave(len(images[0]))))
    return Task(*made, classes=len(kinds))


def emoji_kinds(folder: Path) -> list[Tensor]:
    """10 kinds of emoji, each with two makers' pictures."""
    return list(emoji(folder, 64).values())[:10]


def fashion_kinds(folder: Path, size: int, each: int, offset: int = 0) -> list[Tensor]:
    """``each`` pictures of each class of Fashion-MNIST's training part, from the ``offset``-th on."""
    images, labels = fashion(folder)["train"]
    chosen = [images[labels == label][offset : offset + each] for label in range(10)]
    return [resized(kind, size) for kind in chosen]


def resized(images: Tensor, size: int) -> Tensor:
    grown = F.interpolate(images[:, None].float(), size=size, mode="bilinear", antialias=True)
    return grown.round().byte().expand(-1, 3, -1, -1)


@lru_cache(maxsize=4)
def real_task(name: str, folder: Path, seed: int) -> Task:
    if name == "emoji":
        return split(emoji_kinds(folder), seed, EACH // 2, 6, 12)
    if name == "Fashion-MNIST":
        return split(fashion_kinds(folder, SIZES[name], 1000), seed, EACH, 12, 30)
    if name == "three domains":
        art = list(clip_art(folder, 64, 10, 52).values())
        parts = [
            split(emoji_kinds(folder), seed, EACH // 2, 6, 10),
            split(fashion_kinds(folder, 64, 1000), seed, EACH, 12, 20),
            split(art, seed, EACH, 12, 20),
        ]
        return joined(parts)
    assert name == "Fashion-MNIST, 4,000 images", name
    return split(fashion_kinds(folder, SIZES[name], 1000), seed, 400, 20, 100)


def joined(tasks: list[Task]) -> Task:
    """One task with the classes of all."""
    offsets = [sum(task.classes for task in tasks[:i]) for i in range(len(tasks))]
    made = []
    for parts in zip(*((task.train, task.val, task.test) for task in tasks), strict=True):
        labels = [part.labels + offset for part, offset in zip(parts, offsets, strict=True)]
        images = torch.cat([part.images for part in parts]).contiguous(memory_format=torch.channels_last)
        made.append(Part(images, torch.cat(labels)))
    return Task(*made, classes=sum(task.classes for task in tasks))


# The arms


def attention(base: nn.Module, example: Tensor, **options: Any) -> nn.Module:
    return add_se(base, example_inputs=example, inplace=True, **options)


WITH: dict[str, Callable[..., nn.Module]] = {
    "plain": unchanged,
    "static": partial(attention, attention="static"),
    "ECA": partial(attention, attention="eca"),
    "CBAM": partial(attention, attention="cbam"),
    **{f"SE, r = {r}": partial(attention, reduction=r) for r in (4, 8, 32)},
}
KEPT = ", statistics kept"
RATES_OF_SE = "16 lr / inputs, 0.01 / inputs at most"
REAL_ARMS = {
    arm.name: arm
    for arm in (
        Arm("head", unchanged, "head"),
        Arm("norms", unchanged, "norms"),
        Arm(f"norms{KEPT}", unchanged, "norms", keeps_statistics=True),
        *(Arm(name, build, "se") for name, build in WITH.items() if name != "plain"),
        *(Arm(f"{name}, all", build) for name, build in WITH.items()),
    )
}


@dataclass(frozen=True)
class Tuning:
    """One fine-tune, by all that it depends on.

    Attributes:
        task: whose images.
        arm: what is done to the network, and what of it is trained.
        lr: as ``param_groups`` takes it.
        seed: of the training images, the new head, SE's first layers and the order of the images.
        epochs: passes over the training images.
        optimizer: ``"adamw"`` or ``"sgd"``.
        rates: at which SE's layers learn: :data:`RATES_OF_SE`, as ``param_groups`` has it; ``"lr"``, as it was before; or others that
            were tried, ``"lr / inputs"`` and ``"16 lr / inputs"`` (``lr`` at most).
    """

    task: str
    arm: str
    lr: float
    seed: int
    epochs: int
    optimizer: str = "adamw"
    rates: str = RATES_OF_SE

    @property
    def recipe(self) -> Recipe:
        """That of ``finetune``, with few images in a batch, as there are few in all."""
        return Recipe(
            partial(groups, rates=self.rates), self.optimizer, 0.05, batch=16, warmup=0.05, clip=1.0, smoothing=0.1
        )  # fmt: skip


def groups(model: nn.Module, lr: float, rates: str) -> list[dict[str, Any]]:
    """As ``finetune`` makes them, with the new head at the rate of the rest: at the highest rates it would spoil all arms."""
    made = param_groups(model, lr, head_lr_scale=1.0)
    inputs = fans_in(model)
    for group in made:
        if group["name"] == "se" and rates != RATES_OF_SE:
            fan_in = inputs[id(group["params"][0])]
            group["lr"] = {"lr": lr, "lr / inputs": lr / fan_in, "16 lr / inputs": min(lr, 16 * lr / fan_in)}[rates]
    return made


# The runs


@dataclass(frozen=True)
class RealBench:
    """Where finished runs are found again.

    Attributes:
        results: their file.
        packages: the folder of the packages with pictures and weights, which are fetched to it where they are missing; None to
            carry out nothing: a run that is missing raises :class:`Missing`.
    """

    results: Results
    packages: Path | None = None

    def outcome(self, run: Mapping[str, Any], carry_out: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What came of a run, which is carried out with the packages where that isn't known yet."""
        if run not in self.results:
            if self.packages is None:
                raise Missing(f"{dict(run)} has not been carried out.")
            self.results.add(run, carry_out(self.packages))
        return self.results[run]

    def run(self, tuning: Tuning) -> dict[str, Any]:
        """What came of a fine-tune."""
        return self.outcome({"study": "real", **asdict(tuning)}, partial(tune, tuning))

    def search(self, cell: Cell, arm: str) -> float:
        """The learning rate that is best for one further seed."""
        return best_rate(RATES, lambda lr: self.run(cell.tuning(arm, lr, SEARCH_SEED)))


def best_rate(rates: Sequence[float], run: Callable[[float], Mapping[str, Any]]) -> float:
    """Of five learning rates that with the highest accuracy; of several, the lowest loss. The three in the middle are tried, then
    neighbours of the best until it has one on each side, or there is none left."""
    tried: dict[float, tuple[float, float]] = {}
    wanted = set(rates[1:4])
    while wanted - tried.keys():
        for lr in sorted(wanted - tried.keys()):
            outcome = run(lr)
            tried[lr] = outcome["accuracy"], -outcome["loss"]
        at = rates.index(max(tried, key=lambda lr: tried[lr]))
        wanted |= set(rates[max(at - 1, 0) : at + 2])
    return max(tried, key=lambda lr: tried[lr])


def tune(tuning: Tuning, packages: Path) -> dict[str, Any]:
    """Fine-tune and measure."""
    data, arm = real_task(tuning.task, packages, tuning.seed), REAL_ARMS[tuning.arm]
    torch.manual_seed(tuning.seed)
    base = copy.deepcopy(pretrained(packages))
    base.reset_classifier(data.classes)  # type: ignore[operator]
    model = arm.prepare(base, data.train.images[:1], tuning.seed).to(memory_format=torch.channels_last)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if arm.trains == "head":  # what it is given stays the same
        data, model = features(tuning.task, packages, tuning.seed), head_of(model)
    train(
        model, data.train, epochs=tuning.epochs, lr=tuning.lr, seed=tuning.seed + 1, set_modes=arm.set_modes, recipe=tuning.recipe
    )  # fmt: skip
    # the search's seed is for the choice alone, and never sees the images to test on
    accuracy, loss = measured(model, data.val if tuning.seed == SEARCH_SEED else data.test)
    return {"accuracy": accuracy, "loss": loss, "parameters": trained, "saturated": saturated(model, data.val)}


@lru_cache(maxsize=1)
def pretrained(packages: Path) -> nn.Module:
    return lite0(packages)


@lru_cache(maxsize=8)
@torch.no_grad()
def features(task: str, packages: Path, seed: int) -> Task:
    """What the head is given, for all parts of a task."""
    data, model = real_task(task, packages, seed), pretrained(packages).eval()
    found = []
    for part in (data.train, data.val, data.test):
        maps = [model.forward_features(images) for images in part.images.split(200)]  # type: ignore[operator]
        found.append(Part(model.forward_head(torch.cat(maps), pre_logits=True), part.labels))  # type: ignore[operator]
    return Task(*found, classes=data.classes)


@torch.no_grad()
def saturated(model: nn.Module, part: Part) -> float | None:
    """The share of the gates below 0.02 or above 1.98, on up to 100 images; None without gates that look at the image."""
    extreme = total = 0

    def look(module: nn.Module, given: Any, gates: Tensor) -> None:
        nonlocal extreme, total
        extreme += int(((gates < 0.02) | (gates > 1.98)).sum())
        total += gates.numel()

    listened = [getattr(m, m.gate_layer) for m in model.modules() if isinstance(m, Inserted) and m.gate_layer]
    hooks = [layer.register_forward_hook(look) for layer in listened]
    model.eval()(part.images[torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:100]])
    for hook in hooks:
        hook.remove()
    return extreme / total if total else None


# The cells


@dataclass(frozen=True)
class Cell:
    """One question: which arm is best for this task, with these epochs?"""

    task: str
    arms: tuple[str, ...]
    epochs: int

    def tuning(self, arm: str, lr: float, seed: int) -> Tuning:
        return Tuning(self.task, arm, lr, seed, self.epochs)


LONG = ("head", f"norms{KEPT}", "static", "SE, r = 8")
FROZEN = (*LONG, "ECA", "CBAM")
WHOLE = ("plain, all", "static, all", "SE, r = 8, all")
CELLS = {
    "emoji, frozen": Cell("emoji", FROZEN, 4),
    "Fashion-MNIST, frozen": Cell("Fashion-MNIST", FROZEN, 4),
    "three domains, frozen": Cell("three domains", FROZEN, 2),
    "emoji, frozen, five times longer": Cell("emoji", LONG, 20),
    "Fashion-MNIST with 4,000 images, frozen": Cell("Fashion-MNIST, 4,000 images", LONG, 1),
    "emoji, all trained": Cell("emoji", WHOLE, 3),
    "Fashion-MNIST, all trained": Cell("Fashion-MNIST", WHOLE, 3),
    "three domains, all trained": Cell("three domains", WHOLE, 2),
    "Fashion-MNIST with 4,000 images, all trained": Cell("Fashion-MNIST, 4,000 images", WHOLE, 1),
}


def cell_runs(bench: RealBench, cell: Cell, seeds: int) -> Iterator[None]:
    """The search for each arm, then all arms with each seed; yields after every arm's."""
    for arm in cell.arms:
        bench.search(cell, arm)
        yield
    for seed in range(seeds):
        for arm in cell.arms:
            bench.run(cell.tuning(arm, bench.search(cell, arm), seed))
            yield
