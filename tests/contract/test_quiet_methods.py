"""Networks whose ``train``, and with it ``eval``, returns nothing, as OpenMMLab's do, and whose ``to`` does neither."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import randomised, run, same_tensors, se_modules
from timm.layers import SEModule
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from se_retrofit import (
    add_se,
    export,
    fold_se,
    from_native,
    fuse_se,
    inspect_se,
    load_retrofitted,
    save_retrofitted,
    to_native,
)
from se_retrofit.inspection import excitations
from se_retrofit.verify import agreement


class QuietBlock(BasicBlock):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def to(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().to(*args, **kwargs)


class QuietNet(ResNet):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def to(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        super().to(*args, **kwargs)


def network(**options: Any) -> nn.Module:
    net = QuietNet(QuietBlock, [1, 1, 1, 1], num_classes=10, channels=(8, 8, 16, 16), **options)
    randomised(net)
    net.eval()
    return net


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_they_are_retrofitted_inspected_folded_exported_and_saved(tmp_path: Path) -> None:
    original = network()
    model = add_se(original, 2, example_inputs=X)
    assert len(se_modules(model)) == 4
    assert same_tensors(run(model, X), run(original, X))
    assert agreement(original, model, (X,), training=True).equal
    assert len(inspect_se(model).report().rows) == 4
    assert inspect_se(model).write_html(tmp_path / "page.html").exists()
    assert len(excitations(model, [X]).sites) == 4
    assert fuse_se(model).training is False
    assert len(fold_se(model, [X], tolerance=1e9).fold_report.folded) == 4
    for name in ("net.py", "net.pt2"):
        assert export(model, tmp_path / name).exists()
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=network())
    assert same_tensors(run(again, X), run(model, X))


def test_they_take_native_weights_and_give_them() -> None:
    model = add_se(network(), 2, bias=True, example_inputs=X)
    native = network(block_args={"attn_layer": partial(SEModule, rd_ratio=0.5, rd_divisor=4)})
    assert type(to_native(model)) is QuietNet
    filled = from_native(model, to_native(model, native))
    torch.testing.assert_close(filled(X), model(X), rtol=1e-3, atol=1e-3)
