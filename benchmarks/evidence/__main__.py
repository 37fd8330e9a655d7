"""Does SE pay? Runs what is missing of the studies and writes docs/evidence.md: ``python -m benchmarks.evidence``.

Every run is remembered in ``results.jsonl``, so the command can be stopped and started again, and larger settings go into a
folder of their own:

    python -m benchmarks.evidence --jobs 2
    python -m benchmarks.evidence --data path/to/images --image-size 64 --folder evidence-on-mine --page mine.md

The second part, a pretrained network on pictures that others made, has results of its own, ``real.jsonl``:

    python -m benchmarks.evidence --real
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

from .arms import ARMS
from .networks import NETWORKS
from .studies import STUDIES, Unit, units_of
from .study import Bench, Setting
from .tasks import GENERATED

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = [*GENERATED, "digits"]
    setting = Setting()
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--tasks", nargs="*", default=tasks, choices=tasks)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=setting.train, help="images to train on")
    parser.add_argument("--test", type=int, default=setting.test, help="images to test on")
    parser.add_argument("--base-epochs", type=int, default=setting.base_epochs, help="of the training from scratch")
    parser.add_argument("--epochs", type=int, default=setting.epochs, help="of going on from there")
    parser.add_argument(
        "--data", help="a folder with train/CLASS and val/CLASS, or a data set of timm's (torch/cifar10)"
    )
    parser.add_argument("--image-size", type=int, default=setting.image_size, help="of --data")
    parser.add_argument("--folder", type=Path, default=HERE, help="of results.jsonl and of the trained bases")
    parser.add_argument("--page", type=Path, default=HERE.parents[1] / "docs" / "evidence.md")
    parser.add_argument(
        "--real", action="store_true", help="the second part; of the other options, --seeds, --folder and --page hold"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, each with one thread")
    parser.add_argument("--only-page", action="store_true", help="run nothing; write the page from what there is")
    return parser.parse_args()


def work(unit: Unit) -> Unit:
    """In a process of its own: all runs of one task, network and study."""
    import torch

    torch.set_num_threads(1)
    for _ in unit.runs():
        pass
    return unit


def run(units: list[Unit], jobs: int) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("task x network x study", total=len(units))
        if jobs == 1:
            for unit in units:
                progress.update(bar, description=str(unit))
                work(unit)
                progress.advance(bar)
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for done in as_completed([pool.submit(work, unit) for unit in units]):
                progress.update(bar, description=str(done.result()))
                progress.advance(bar)


def run_real(folder: Path, page: Path, seeds: int, only_page: bool) -> None:
    """The second part, in one process with one thread."""
    import torch

    from .real import CELLS, RealBench, cell_runs
    from .real_page import write_real
    from .results import Results
    from .robustness import grid_runs
    from .scratch import scratch_runs

    results = Results(folder / "real.jsonl")
    if not only_page:
        torch.set_num_threads(1)
        bench = RealBench(results, folder / "packages")
        studies = {name: cell_runs(bench, cell, seeds) for name, cell in CELLS.items()}
        studies |= {"from scratch": scratch_runs(bench, seeds)}
        studies |= {f"learning rates, {optimizer}": grid_runs(bench, optimizer) for optimizer in ("adamw", "sgd")}
        for name, runs in studies.items():
            for _ in track(runs, name):
                pass
    write_real(page, RealBench(results), seeds)


def main() -> int:
    options = arguments()
    if options.real:
        run_real(options.folder, options.page, options.seeds, options.only_page)
        print(f"{options.page} written")
        return 0
    fields = ("train", "test", "base_epochs", "epochs", "data", "image_size")
    bench = Bench(options.folder, Setting(**{name: getattr(options, name) for name in fields}))
    tasks = [options.data] if options.data else options.tasks
    if not options.only_page:
        run(list(units_of(bench, options.studies, tasks, options.networks, options.seeds, options.arms)), options.jobs)
    from .page import Selection, write_page

    reader = Bench(options.folder, bench.setting, only_reads=True)
    write_page(options.page, Selection(reader, tasks, options.networks, options.seeds, options.arms))
    print(f"{options.page} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
