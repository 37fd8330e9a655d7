"""One SE for one block: a loop over several blocks gives each its own; the same modules run again share theirs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_function, randomise_se, randomised, se_modules
from torch import Tensor, nn

from se_retrofit import RetrofitError, add_se, plan_se


class Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(torch.relu(x)))


class SharedUnit(Layer):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Looped(nn.Module):
    """``kind`` is how the layers are run."""

    def __init__(self, kind: str, widths: tuple[int, ...] = (8, 8, 8, 8)) -> None:
        super().__init__()
        self.kind = kind
        pairs = list(pairwise(widths))
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.layers = nn.ModuleList(Layer(*pair) for pair in pairs)
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _, outputs in pairs)
        self.names = [f"layers.{i}" for i in range(len(pairs))]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "residual":
            for layer in self.layers:
                x = x + layer(x)
        elif self.kind == "augmented":
            for layer in self.layers:
                x += layer(x)
        elif self.kind == "zip":
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = x + norm(conv(F.relu(x)))
        elif self.kind == "index":
            for i in range(len(self.layers)):
                y = self.layers[i](x)
                x = y + x
        elif self.kind == "forward":
            for layer in self.layers:
                x = x + layer.forward(x)
        elif self.kind == "again":
            for _ in range(3):
                x = x + self.layers[0](x)
        elif self.kind == "chain":
            for layer in self.layers:
                x = layer(x).relu()
        elif self.kind == "weights":
            for conv in self.convs:
                x = x + F.relu(F.conv2d(x, conv.weight, padding=1))
        return x


X = torch.randn(2, 3, 10, 10)


@pytest.mark.parametrize("kind", ["residual", "augmented", "zip", "index", "forward"])
def test_each_block_of_a_loop_gets_its_own_se(kind: str) -> None:
    model = randomised(Looped(kind)).eval()
    retrofitted = add_se(model)
    ses = se_modules(retrofitted)
    assert len(ses) == 3
    calls: dict[str, int] = {}
    for path, se in ses.items():
        se.register_forward_hook(lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1}))
    retrofitted(X)
    assert calls == dict.fromkeys(ses, 1)
    assert_same_function(model, add_se(model), X)
    trained = randomise_se(add_se(model))
    assert not torch.equal(trained(X), model(X))


def test_the_same_block_run_again_shares_its_se() -> None:
    model = randomised(Looped("again")).eval()
    retrofitted = add_se(model)
    (path,) = se_modules(retrofitted)
    calls: list[int] = []
    retrofitted.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    retrofitted(X)
    assert len(calls) == 3
    assert_same_function(model, add_se(model), X)


def test_units_of_a_chain_that_one_expression_activates_get_se_before_that() -> None:
    model = randomised(Looped("chain", (8, 12, 16, 20))).eval()
    plan = plan_se(model)
    assert [(site.block, site.after) for site in plan.sites] == [
        ("stem", "2"), ("layers.0", "layers.0"), ("layers.1", "layers.1")
    ]  # fmt: skip
    assert [skip.block for skip in plan.skipped] == ["layers.2.conv"]
    assert "no learned layer takes its output" in plan.skipped[0].reason
    assert_same_function(model, add_se(model), X)


def test_blocks_that_cannot_have_their_own_se_are_left_out_with_the_reason() -> None:
    model = randomised(Looped("weights")).eval()
    with pytest.raises(RetrofitError, match="one expression of a loop computes it and other blocks"):
        plan_se(model)
    skipped = {skip.block: skip.reason for skip in plan_se(nn.Sequential(model, SharedUnit())).skipped}
    assert {block for block, reason in skipped.items() if "one expression" in reason} == {
        f"0.convs.{i}" for i in range(3)
    }
