"""What folding costs: small networks are fine-tuned on scikit-learn's digits, then folded at several tolerances.

Prints a Markdown table: for each network and tolerance the sites folded, the change of the outputs, the accuracy on held-out
images before and after, and after one more epoch of training.

    python benchmarks/folding.py --epochs 5
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import DenseNet, shufflenet_v2_x0_5

from se_retrofit import add_se, fold_se
from se_retrofit.finetune import load_data

NETWORKS = {
    "resnet10t": lambda: timm.create_model("resnet10t", num_classes=10),
    "mobilenetv2_035": lambda: timm.create_model("mobilenetv2_035", num_classes=10),
    "DenseNet, growth 12, blocks of 3": lambda: DenseNet(12, (3, 3, 3), 24, num_classes=10),
    "shufflenet_v2_x0_5": lambda: shufflenet_v2_x0_5(num_classes=10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--tolerances", nargs="*", type=float, default=[0.001, 0.01, 0.1])
    parser.add_argument("--report", action="store_true", help="print each fold's own table, too")
    arguments = parser.parse_args()
    data = load_data("digits", image_size=32)
    # the tolerance is decided on training images, the accuracy is that on images that neither training nor folding saw
    seen = [batch for _, batch in zip(range(8), DataLoader(data.train, 32), strict=False)]
    print("| network | tolerance | sites folded | change of the outputs | accuracy before | folded | one more epoch |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.networks:
        torch.manual_seed(0)
        model = train(add_se(NETWORKS[name](), reduction=4), data.train, arguments.epochs, 2e-3)
        before = accuracy(model, data.val)
        for tolerance in arguments.tolerances:
            folded, report = fold_se(model, seen, tolerance=tolerance)
            if arguments.report:
                print(report)
            after = accuracy(folded, data.val)
            recovered = accuracy(train(copy.deepcopy(folded), data.train, 1, 5e-4), data.val)
            sites = f"{len(report.folded)} of {len(report.sites)}"
            print(
                f"| {name} | {tolerance:g} | {sites} | {report.change:.1e} | {before:.1%} | {after:.1%} | {recovered:.1%} |"
            )


def train(model: nn.Module, data: TensorDataset, epochs: int, lr: float) -> nn.Module:
    """A few epochs of AdamW, with the learning rate going to zero."""
    loader = DataLoader(data, 64, shuffle=True, generator=torch.Generator().manual_seed(0), drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, targets in loader:
            loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images: Tensor
    right = 0
    for images, targets in DataLoader(data, 120):
        right += int((model(images).argmax(1) == targets).sum())
    return right / len(data)


if __name__ == "__main__":
    main()
