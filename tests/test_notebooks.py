"""What a notebook shows of a result is a table with the numbers that are printed."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torchvision.models.resnet import BasicBlock, ResNet

from se_retrofit import add_se, inspect_se, plan_se
from se_retrofit.finetune import FinetuneResult
from se_retrofit.finetune.comparing import Arm, Comparison
from se_retrofit.tables import as_html


def network() -> torch.nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def comparison() -> Comparison:
    right = torch.ones(2, 4, dtype=torch.bool)
    return Comparison({name: Arm([0.5, 0.75], [0.5, 0.5], 0.1, 1234, 1234, right) for name in ("plain", "se")}, [0, 1])


def result() -> FinetuneResult:
    epochs = [{"epoch": 0, "val_accuracy": 0.25}, {"epoch": 1, "train_loss": 0.5, "val_accuracy": 0.75, "gates": {}}]
    return FinetuneResult(network(), epochs, 0.75, 0.75, 1, "epochs", None, 3, None, 10, 10)


@pytest.mark.parametrize(
    ("made", "cells", "below"),
    [
        (lambda: plan_se(network()), {"layer2.0", "residual", "bn2", "128"}, "4 SE modules, "),
        (lambda: inspect_se(add_se(network())), {"bn2 (BatchNorm2d)", "128x28x28", "4,096"}, "trainable"),
        (comparison, {"se", "seed 1, accuracy %", "75.00", "1,234"}, "se - plain: "),
        (result, {"epoch", "val_accuracy", "0.75", "0.5"}, "best validation accuracy 75.00% in epoch 1"),
    ],
    ids=["plan", "inspection", "comparison", "result"],
)
def test_a_notebook_shows_a_table_of_what_is_printed(made: Callable[[], Any], cells: set[str], below: str) -> None:
    text = made()._repr_html_()
    assert cells <= {html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", text)}
    assert below in text.partition("</table>")[2]


def test_what_it_shows_is_text_not_markup() -> None:
    text = as_html([["<b>"]], above="a & b", below=["<i>"])
    assert "<b>a &amp; b</b>" in text
    assert "&lt;b&gt;" in text
    assert "&lt;i&gt;" in text
