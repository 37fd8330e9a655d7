"""What folding costs: fine-tuned networks with SE of five block kinds, on two data sets, folded at several tolerances.

Prints a Markdown table: for each data set, network and tolerance the sites folded, the change of the outputs, the accuracy on test
images before and after folding, and after a short fine-tune, of the folded network and, as a control, of the one that was not
folded.

    python benchmarks/folding.py --epochs 6
"""

from __future__ import annotations

import argparse
import copy

from small_networks import NETWORKS, TASKS, accuracy, fine_tuned, train

from se_retrofit import fold_se

HEADER = (
    "data", "network", "tolerance", "sites folded", "change of the outputs", "before", "folded", "folded, one more epoch",
    "not folded, one more epoch",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6, help="of the base, and of the fine-tune with SE")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--tolerances", nargs="*", type=float, default=[0.001, 0.01, 0.1, 1.0])
    parser.add_argument("--report", action="store_true", help="print each fold's own table, too")
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}")
    for task in arguments.tasks:
        data, test = TASKS[task]()
        # folding sees training images, the accuracy is that on images that neither training nor folding saw
        seen = list(data.tensors[0][:256].split(32))
        for name in arguments.networks:
            _, model = fine_tuned(name, data, arguments.epochs)
            before = accuracy(model, test)
            control = accuracy(train(copy.deepcopy(model), data, 1, 5e-4, seed=2), test)
            for tolerance in arguments.tolerances:
                folded = fold_se(model, seen, tolerance=tolerance)
                report = folded.fold_report
                if arguments.report:
                    print(report)
                after = accuracy(folded, test)
                recovered = accuracy(train(copy.deepcopy(folded), data, 1, 5e-4, seed=2), test)
                cells = (
                    task, name, f"{tolerance:g}", f"{len(report.folded)} of {len(report.sites)}", f"{report.change:.1e}",
                    *(f"{value:.1%}" for value in (before, after, recovered, control)),
                )  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
