"""All that only a GPU can show, in under eight minutes on one: ``python benchmarks/on_cuda.py``.

The tests marked ``cuda``; training and inference of plain, retrofitted, fused and native ResNet-50, eager and compiled, in
bfloat16 and channels_last; a fine-tune with resume; peak memory; and the fine-tuning loop against a bare one. The Markdown goes
into docs/benchmarks.md, between two markers. ``--device cpu --small`` does all of it in a reduced form, eager only, so that
the script can be tried without a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import loop
import timm
import torch
import training
from timing import LAYOUTS, inference_rows, machine, ratio, table
from torch import nn
from torch.utils.data import TensorDataset

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, finetune

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- on_cuda.py: begin -->", "<!-- on_cuda.py: end -->"
LAYOUT, DTYPE = "channels_last", torch.bfloat16
Section = Callable[[argparse.Namespace], str]


def tests(options: argparse.Namespace) -> str:
    """What pytest says at its end about the tests marked cuda."""
    where = ["tests/finetune/test_finetune_cuda.py"] if options.small else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda", *where]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the tests marked cuda failed:\n{done.stdout}{done.stderr}")
    return f"The tests marked `cuda`: {done.stdout.splitlines()[-1].strip('= ')}."


def train_rows(options: argparse.Namespace, compiled: bool) -> str:
    models, _ = training.variants(options.network)
    header = ("", "ms", "/ plain", "saved MiB", "saved / plain", "peak MiB above the weights")
    rows = training.measure(models, compiled, DTYPE, LAYOUT, options)
    return f"Forward and backward, {'compiled' if compiled else 'eager'}:\n\n{table(header, rows)}"


def inference(options: argparse.Namespace, compiled: bool) -> str:
    models, _ = training.variants(options.network)
    for model in models.values():
        model.to(options.device, memory_format=LAYOUTS[LAYOUT])
    x = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    rows = inference_rows(
        models, x.to(memory_format=LAYOUTS[LAYOUT]), ("plain",),
        compiled=compiled, dtype=DTYPE, rounds=options.rounds, device=options.device,
    )  # fmt: skip
    header = ("", "ms", "images/s", "/ plain", "peak MiB above the weights")
    return f"Inference, {'compiled' if compiled else 'eager'}:\n\n{table(header, rows)}"


def resumed(options: argparse.Namespace) -> str:
    """A fine-tune of two epochs, and the same with a stop between them."""
    count = options.batch * options.updates
    data = TensorDataset(torch.randn(count, 3, options.size, options.size), torch.arange(count) % 10)
    config = FinetuneConfig(
        epochs=2, batch_size=options.batch, cpu=options.device == "cpu", precision="bf16", schedule="constant",
        warmup_ratio=0.0, workers=0,
    )  # fmt: skip

    def network() -> nn.Module:
        torch.manual_seed(0)
        return add_se(timm.create_model(options.network, num_classes=10))

    whole = finetune(network(), data, config=config, quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        finetune(network(), data, config=config.replace(epochs=1), output_dir=folder, quiet=True)
        again = finetune(network(), data, config=config, output_dir=folder, resume=True, quiet=True)
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    apart = max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)
    last = whole.history[-1]
    memory = f", peak {last['peak_memory_mb']:,.0f} MiB" if "peak_memory_mb" in last else ""
    return (
        f"Fine-tune of the retrofitted network: {last['images_per_second']:,.0f} images/s{memory}. Stopped after one epoch "
        f"of two and resumed, no weight is further than {apart:.2g} from that of the run that was not stopped."
    )


def against_bare(options: argparse.Namespace) -> str:
    count = options.batch * options.updates
    images, targets = torch.randn(count, 3, options.size, options.size), torch.arange(count) % 10
    model = add_se(timm.create_model(options.network, num_classes=10))
    options.precision = "bf16"
    found = loop.seconds_of(model, images, targets, time.perf_counter, options)
    return f"The loop reaches {ratio(found['bare'], found['finetune'])} of a bare PyTorch loop's images a second."


def sections(options: argparse.Namespace) -> Iterator[Section]:
    """The most telling first: what would begin after ``--seconds`` is left out."""
    yield tests
    yield lambda o: train_rows(o, False)
    yield lambda o: inference(o, False)
    yield resumed
    yield against_bare
    if not options.small:
        yield lambda o: train_rows(o, True)
        yield lambda o: inference(o, True)


def written(page: str, text: str) -> str:
    """The page with the text between the markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"the page must have the lines {BEGIN} and {END} once each")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{text}\n\n{END}", page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="a small network, tiny batches of tiny images, eager only")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the Markdown goes, between the markers")
    parser.add_argument("--seconds", type=float, default=330, help="nothing new is begun after so many")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --device cpu --small tries the script without one")
    options.batch, options.size, options.rounds, options.updates = (2, 32, 1, 2) if options.small else (256, 224, 10, 8)
    options.network = "resnet18" if options.small else "resnet50"
    written(options.page.read_text(encoding="utf-8"), "")  # rather now than after the measurements
    began = time.perf_counter()
    parts = [
        f"{machine(options.device)}; {options.network}, batch {options.batch}, {options.size}x{options.size}, bfloat16, {LAYOUT}"
    ]
    left_out = 0
    for section in sections(options):
        if time.perf_counter() - began > options.seconds:
            left_out += 1
            continue
        parts.append(section(options))
        print(parts[-1], flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    took = f"{time.perf_counter() - began:.0f} s in all"
    parts.append(took + (f"; {left_out} measurements were left out for want of time." if left_out else "."))
    page = options.page.read_text(encoding="utf-8")
    options.page.write_text(written(page, "\n\n".join(parts)), encoding="utf-8")


if __name__ == "__main__":
    main()
