"""What the fine-tuning loop costs beyond a bare PyTorch loop with the same network: ``python benchmarks/loop.py``.

Both train on the same tensors in memory with the same optimizer and clipping, in the same precision. An epoch of the one and
an epoch of the other take turns; start-up and evaluation are left out. ``--profile`` prints what the loop spends its time on.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from unittest import mock

import timm
import torch
from timing import interleaved, machine, ratio, synchronize, table
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, finetune, train

Clock = Callable[[], float]
NETWORKS = ["resnet10t", "resnet18", "mobilenetv2_050"]


def recipe(options: argparse.Namespace) -> FinetuneConfig:
    return FinetuneConfig(
        epochs=1, batch_size=options.batch, precision=options.precision, cpu=options.device == "cpu", workers=0
    )


def bare_epoch(model: nn.Module, images: Tensor, targets: Tensor, options: argparse.Namespace) -> Callable[[], None]:
    """An epoch as one writes it by hand, with the recipe's optimizer, clipping and layout."""
    config, device = recipe(options), torch.device(options.device)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model.to(device, memory_format=layout).train()
    optimizer = create_optimizer_v2(model, opt=config.optimizer, lr=config.lr, weight_decay=config.weight_decay)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]

    def epoch() -> None:
        for index in torch.randperm(len(images)).split(options.batch):
            x = images[index].to(device, non_blocking=True, memory_format=layout)
            y = targets[index].to(device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = criterion(model(x), y)
            loss.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()

    return epoch


def seconds_of(
    model: nn.Module, images: Tensor, targets: Tensor, clock: Clock, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Of an epoch of each loop, by this clock, in every round."""
    epoch, config, data = bare_epoch(model, images, targets, options), recipe(options), TensorDataset(images, targets)
    found: dict[str, list[float]] = {"bare": [], "finetune": []}

    def timed(name: str, call: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object) -> None:
            synchronize(options.device)
            start = clock()
            call(*args)
            synchronize(options.device)
            found[name].append(clock() - start)

        return run

    def ours() -> None:
        with mock.patch.object(train, "train_epoch", timed("finetune", train_epoch)):
            finetune(model, data, config=config, quiet=True)

    train_epoch = train.train_epoch
    interleaved({"bare": timed("bare", epoch), "finetune": ours}, rounds=options.rounds, warmup=1)
    return {name: times[1:] for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="of timm")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--updates", type=int, default=30, help="an epoch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    count = options.batch * options.updates
    images, targets = torch.randn(count, 3, options.size, options.size), torch.arange(count) % 10
    if options.profile:
        model = add_se(timm.create_model(options.networks[0], num_classes=10))
        with cProfile.Profile() as profile:
            finetune(model, TensorDataset(images, targets), config=recipe(options), quiet=True)
        pstats.Stats(profile).sort_stats("cumulative").print_stats(50)
        return
    print(
        f"{machine(options.device)}; batches of {options.batch}, {options.size}x{options.size}, {options.precision}\n"
    )
    rows: list[list[object]] = []
    for name in options.networks:
        row: list[object] = [name]
        for clock in (time.perf_counter, time.process_time):
            model = add_se(timm.create_model(name, num_classes=10))
            found = seconds_of(model, images, targets, clock, options)
            if clock is time.perf_counter:
                row += [f"{count / statistics.median(found[loop]):,.0f}" for loop in ("bare", "finetune")]
            row.append(ratio(found["bare"], found["finetune"]))
        rows.append(row)
    header = ("network", "bare, images/s", "finetune, images/s", "share of bare, by the clock", "by CPU time")
    print(table(header, rows))


if __name__ == "__main__":
    main()
