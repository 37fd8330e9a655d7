"""All that only a GPU can show, in under eight minutes on one: ``python benchmarks/on_cuda.py``.

The tests marked ``cuda``; training and inference of plain, retrofitted, fused and native ResNet-50, eager and compiled, in
bfloat16 and channels_last; a fine-tune with resume; peak memory; and the fine-tuning loop against a bare one. The Markdown goes
into docs/benchmarks.md, between two markers, after each measurement. What fails is printed, and named at the end with an exit
code of 1; the rest is measured all the same. It needs the package with its extras ``all`` and ``test``, installed or in
PYTHONPATH. ``--device cpu --small`` does all of it in a reduced form, eager only, so that the script can be tried without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import loop
import timm
import torch
import training
from timing import LAYOUTS, inference_rows, machine, ratio, table
from torch import nn
from torch.utils.data import TensorDataset

from se_retrofit import add_se
from se_retrofit.finetune import FinetuneConfig, FinetuneResult, finetune

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- on_cuda.py: begin -->", "<!-- on_cuda.py: end -->"
LAYOUT, DTYPE = "channels_last", torch.bfloat16
MARK = re.compile("NEEDS_CUDA|ON_CUDA")  # of the tests, see tests/helpers/sweeps.py
Section = Callable[[argparse.Namespace], str]


def tests(options: argparse.Namespace) -> str:
    """What pytest says at its end about the tests marked cuda, in the files that have some."""
    files = [
        file for file in (HERE.parent / "tests").rglob("test_*.py") if MARK.search(file.read_text(encoding="utf-8"))
    ]
    command = [
        sys.executable,
        "-u",
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-m",
        "cuda",
        "-W",
        "ignore",
        *map(str, sorted(files)),
    ]
    last = ""
    with subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    if process.returncode:
        raise RuntimeError(f"the tests marked cuda end with {process.returncode}: {last}")
    return f"The tests marked `cuda`: {last}."


def training_table(options: argparse.Namespace, compiled: bool) -> str:
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

    whole, twice = (finetune(network(), data, config=config, quiet=True) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        finetune(network(), data, config=config.replace(epochs=1), output_dir=folder, quiet=True)
        again = finetune(network(), data, config=config, output_dir=folder, resume=True, quiet=True)
    last = whole.history[-1]
    memory = f", peak {last['peak_memory_mb']:,.0f} MiB" if "peak_memory_mb" in last else ""
    return (
        f"Fine-tune of the retrofitted network: {last['images_per_second']:,.0f} images/s{memory}. Stopped after one epoch "
        f"of two and resumed, no weight is further than {apart(whole, again):.2g} from that of the run that was not stopped; "
        f"between two runs that were not stopped, it is {apart(whole, twice):.2g}."
    )


def apart(one: FinetuneResult, other: FinetuneResult) -> float:
    """The largest difference between the weights of two runs."""
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max((a.detach() - b.detach()).abs().max().item() for a, b in pairs)


def against_bare(options: argparse.Namespace) -> str:
    count = options.batch * options.updates
    images, targets = torch.randn(count, 3, options.size, options.size), torch.arange(count) % 10
    model = add_se(timm.create_model(options.network, num_classes=10))
    options.precision = "bf16"
    found = loop.seconds_of(model, images, targets, time.perf_counter, options)
    return f"The loop reaches {ratio(found['bare'], found['finetune'])} of a bare PyTorch loop's images a second."


def sections(options: argparse.Namespace) -> dict[str, Section]:
    """What is measured, by name, the most telling first: what would begin after ``--seconds`` is left out."""
    eager: dict[str, Section] = {
        "tests": tests,
        "training, eager": lambda o: training_table(o, False),
        "inference, eager": lambda o: inference(o, False),
        "resume": resumed,
        "loop": against_bare,
    }
    compiled: dict[str, Section] = {
        "training, compiled": lambda o: training_table(o, True),
        "inference, compiled": lambda o: inference(o, True),
    }
    return eager if options.small else {**eager, **compiled}


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
    page = options.page.read_text(encoding="utf-8")
    written(page, "")  # rather now than after the measurements
    failed = measured(options, page)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measured(options: argparse.Namespace, page: str) -> list[str]:
    """Measure, and write the page after each measurement; return the names of those that failed."""
    began = time.perf_counter()
    parts = [
        f"{machine(options.device)}; {options.network}, batch {options.batch}, {options.size}x{options.size}, bfloat16, {LAYOUT}"
    ]
    failed: list[str] = []
    left_out: list[str] = []
    for name, section in sections(options).items():
        seconds = time.perf_counter() - began
        print(f"\n[{seconds:.0f} s] {name}\n", flush=True)
        try:
            if seconds > options.seconds:
                left_out.append(name)
            else:
                parts.append(section(options))
                print(parts[-1], flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        gc.collect()  # an error's traceback holds tensors
        if options.device == "cuda":
            torch.cuda.empty_cache()
        took = f"{time.perf_counter() - began:.0f} s in all"
        lacking = [
            f"{what}: {', '.join(names)}" for what, names in (("failed", failed), ("left out", left_out)) if names
        ]
        last = "; ".join([took, *lacking])
        options.page.write_text(written(page, "\n\n".join([*parts, f"{last}."])), encoding="utf-8")
    print(f"\n{last}")
    return failed


if __name__ == "__main__":
    main()
