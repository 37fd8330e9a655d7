"""What the surgery itself costs, against building the model: ``python benchmarks/surgery.py [--rounds 7]``.

Planning and inserting (``add_se(model, inplace=True)``) is timed in turns with building the same model, which is what a
user waits for anyway; carrying out a plan that is there (``add_se(model, plan=plan, inplace=True)``) in turns with planning. The
second table shows that the cost per block stays the same as networks get deeper.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torchvision
from timing import interleaved, machine, milliseconds, ratio, table
from torch import nn

from se_retrofit import SEAttention, add_se, plan_se
from se_retrofit.models import Base

NETWORKS = (
    *(f"torchvision/resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"timm/{name}" for name in ("resnet50", "mobilenetv2_100", "densenet121", "convnext_tiny", "dla34", "hrnet_w18")),
)


def measure(build: Callable[[], nn.Module], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of building, planning, inserting in place and into a copy, carrying out a plan in place; and the number of SE modules."""
    model = build()
    plan = plan_se(model)
    fresh = [build(), build()]  # two ahead, for the rounds that insert before they build

    def insert_in_place() -> nn.Module:
        return add_se(fresh.pop(), inplace=True)

    def carry_out() -> nn.Module:
        return add_se(fresh.pop(), plan=plan, inplace=True)

    def build_one() -> None:
        fresh.append(build())

    candidates: dict[str, Callable[[], Any]] = {
        "build": build_one,
        "build again": build_one,  # for two insertions
        "plan": lambda: plan_se(model),
        "in place": insert_in_place,
        "copy": lambda: add_se(model),
        "carry out": carry_out,
    }
    seconds = interleaved(candidates, rounds=rounds)
    return seconds, sum(isinstance(module, SEAttention) for module in add_se(model).modules())


def deep(blocks: int) -> nn.Module:
    """A narrow ResNet of bottlenecks, ``blocks`` of them in each of its four stages."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [blocks] * 4, width_per_group=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--depths", nargs="*", type=int, default=(2, 4, 8, 16, 32), help="blocks per stage")
    arguments = parser.parse_args()

    print(machine(), end="\n\n")
    rows: list[list[object]] = []
    for name in arguments.networks:
        seconds, modules = measure(Base.of(name).build, arguments.rounds)
        times = [milliseconds(seconds[key]) for key in ("build", "plan", "in place", "copy", "carry out")]
        ratios = ratio(seconds["in place"], seconds["build"]), ratio(seconds["carry out"], seconds["plan"])
        rows.append([name, modules, *times, *ratios])
    header = (
        "network",
        "SE modules",
        "build, ms",
        "plan, ms",
        "add_se in place, ms",
        "add_se, ms",
        "carry out in place, ms",
    )
    print(table([*header, "in place / build", "carry out / plan"], rows), end="\n\n")

    rows = []
    for depth in arguments.depths:
        seconds, modules = measure(lambda depth=depth: deep(depth), arguments.rounds)  # type: ignore[misc]
        # the least of the rounds: what other programs take can only add to it
        build, in_place = (1e3 * min(seconds[key]) for key in ("build", "in place"))
        rows.append([modules, f"{build:.1f}", f"{in_place:.1f}", f"{in_place / modules:.2f}"])
    print(table(("blocks", "build, ms", "add_se in place, ms", "ms per block"), rows))


if __name__ == "__main__":
    main()
