"""Gates move alike at every width: SE's layers learn the more slowly, the more inputs they have, and not too fast at any rate."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from tiny import config, network, same, state_of, trained
from torch import nn

from se_retrofit import RetrofitError, SEAttention, add_se
from se_retrofit.finetune import NamedData, find_lr, param_groups
from se_retrofit.finetune.learning import fans_in, scaled_groups, se_pace


def wide_network(attention: str = "se") -> nn.Module:
    """Blocks of 8, 8, 16 and 64 channels; their SE's layers have as many inputs, and half as many."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 16, 64), num_classes=10, zero_init_last=False)
    return add_se(model, reduction=2, attention=attention)


def movement(channels: int, lr: float, scaled: bool = True) -> float:
    """How far the gates are from 1 after two updates of Adam whose gradients ask for more of everything."""
    torch.manual_seed(0)
    se = SEAttention(channels, reduction=8, gate="identity")
    optimizer = torch.optim.Adam(param_groups(se, lr) if scaled else se.parameters(), lr=lr)
    x = torch.rand(8, channels, 2, 2)
    for _ in range(2):
        optimizer.zero_grad()
        (-se(x).sum()).backward()
        optimizer.step()
    return float((se.gates(x).detach() - 1).abs().mean())


def test_gates_move_alike_at_every_width_and_no_faster_than_a_norm_s_scale() -> None:
    for lr in (2e-4, 1e-2):
        narrow, wide = (movement(channels, lr) for channels in (128, 4096))
        assert wide == pytest.approx(narrow, rel=0.2)
        assert narrow < 2 * 1e-2  # as far as two updates at a rate that norms bear move a scale
    assert movement(4096, 1e-2, scaled=False) > 0.9  # of at most 1: saturated by two updates


def test_at_low_rates_gates_move_faster_than_the_rest_so_that_a_short_run_moves_them() -> None:
    assert movement(1024, 2e-4) > 3 * 2e-4
    assert [64 * se_pace(64, lr) for lr in (1e-4, 6e-4, 1e-3, 1e-2, 0.1)] == pytest.approx([16, 16, 10, 1, 1])
    assert se_pace(4, 2e-4) == 1 == se_pace(1, 0.1)  # never faster than the rest's weights
    assert {group["lr"] for group in param_groups(wide_network(), 0.0)} == {0.0}  # as a warm-up of one's own may begin


def test_a_layer_is_scaled_by_its_own_fan_in_whatever_module_it_is_in() -> None:
    attention = nn.ModuleDict(
        {
            "eca": nn.Conv1d(1, 1, 5, bias=False),
            "spatial": nn.Conv2d(2, 1, 7),  # 98 inputs
            "wide": nn.Linear(64, 8),
            "norm": nn.LayerNorm(64),
        }
    )
    attention.factor = nn.Parameter(torch.ones(512))
    inputs = fans_in(attention)
    by_name = {name: inputs[id(parameter)] for name, parameter in attention.named_parameters()}
    assert by_name == {
        "factor": 1, "eca.weight": 5, "spatial.weight": 98, "spatial.bias": 98, "wide.weight": 64, "wide.bias": 64,
        "norm.weight": 1, "norm.bias": 1,
    }  # fmt: skip


def test_static_factors_learn_at_the_full_rate_and_so_do_all_other_parameters() -> None:
    groups = scaled_groups(wide_network(attention="static"), 1e-3, 0.1, 3.0, 5.0)
    assert {(g["name"], g["lr_scale"]) for g in groups} == {("se", 3.0), ("head", 5.0), ("body", 1.0)}


def test_layers_of_one_rate_share_a_group_and_the_run_tells_the_rates(
    digits: NamedData, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trained(wide_network(), digits.val, recipe={"se_lr_scale": 2.0, "head_lr_scale": 5.0}, quiet=False)
    se = [(group["lr_scale"], group["tensors"]) for group in result.groups if group["name"] == "se"]
    expected = {4: 2, 8: 3, 16: 1, 32: 1, 64: 1}
    assert sorted(se) == sorted((2 * se_pace(inputs, 1e-3), tensors) for inputs, tensors in expected.items())
    assert Counter(group["name"] for group in result.groups) == {"se": 5, "head": 2, "body": 2}
    assert sum(group["tensors"] for group in result.groups) == len(list(result.model.parameters()))
    told = "learning rates at their peak: body 1.00e-03; head 5.00e-03; SE 3.13e-04 to 2.00e-03, by the fan-in of its layers"
    assert told in capsys.readouterr().out.splitlines()


def test_find_lr_trains_each_layer_at_its_part_of_the_rate(digits: NamedData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[float, float]]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append({(group["fan_in"], group["lr"]) for group in self.param_groups if group.get("name") == "se"})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    found = find_lr(wide_network(), digits.val, config=config(trainable="se"), steps=10)
    for rate, groups in zip(found.rates, seen[-10:], strict=True):
        assert dict(groups) == pytest.approx({inputs: rate * se_pace(inputs, rate) for inputs in (4, 8, 16, 32, 64)})


def test_a_run_whose_parameters_were_divided_otherwise_is_not_resumed(digits: NamedData, tmp_path: Path) -> None:
    trained(wide_network(), digits.val, output_dir=tmp_path)
    file = tmp_path / "last" / "training.json"
    whole, model = file.read_text(), wide_network()
    file.write_text(whole.replace("se at 0.1562 lr", "se at 5 lr"))  # as an earlier version had it
    assert file.read_text() != whole
    before = state_of(model)
    with pytest.raises(RetrofitError, match=r"parameter groups, se at 0\.1562 lr.*None then, 1 now.*se at 5 lr"):
        trained(model, digits.val, recipe={"epochs": 2}, output_dir=tmp_path, resume=True)
    assert same(before, model.state_dict())


def test_se_and_head_have_their_own_learning_rate_and_norms_no_decay() -> None:
    model = network()
    groups = scaled_groups(model, 1e-3, weight_decay=0.1, se_lr_scale=5.0, head_lr_scale=2.0)
    by_kind = {(g["name"], g["weight_decay"]): g for g in groups}
    assert set(by_kind) == {("se", 0.1), ("head", 0.1), ("head", 0.0), ("body", 0.1), ("body", 0.0)}
    assert [by_kind[k]["lr_scale"] for k in (("head", 0.0), ("body", 0.1))] == [2.0, 1.0]
    inputs = fans_in(model)
    assert all(
        g["lr_scale"] == 5.0 * se_pace(inputs[id(p)], 1e-3) for g in groups if g["name"] == "se" for p in g["params"]
    )
    assert all(p.ndim == 1 for p in by_kind["body", 0.0]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_an_optimizer_of_ones_own_gets_the_rates_that_finetune_has() -> None:
    model = wide_network()
    groups = param_groups(model, 1e-3, weight_decay=0.1, se_lr_scale=2.0)
    scaled = scaled_groups(model, 1e-3, 0.1, 2.0, 5.0)
    assert [group["lr"] for group in groups] == [1e-3 * group["lr_scale"] for group in scaled]
    assert [group["weight_decay"] for group in groups] == [group["weight_decay"] for group in scaled]
    assert [len(group["params"]) for group in groups] == [len(group["params"]) for group in scaled]
    assert not any("lr_scale" in group for group in groups)  # which timm's schedulers would apply once more
    assert set(groups[0]) == {"params", "lr", "weight_decay", "name"}


def test_with_layer_decay_layers_learn_the_more_slowly_the_further_they_are_from_the_head() -> None:
    model = network()
    groups = scaled_groups(model, 1e-2, 0.1, 5.0, 2.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert scale[id(model.fc.weight)] == 2.0
    depths = [model.conv1, *(layer[0].conv1 for layer in (model.layer1, model.layer2, model.layer3, model.layer4))]
    assert [scale[id(conv.weight)] for conv in depths] == [0.5 ** (5 - depth) for depth in range(5)]
    se = next(p for n, p in model.layer2.named_parameters() if "se_attention" in n)
    assert scale[id(se)] == 5.0 / se.shape[1] * scale[id(model.layer2[0].conv1.weight)]
    with pytest.raises(RetrofitError, match="no layers in Sequential"):
        scaled_groups(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 1e-3, 0.1, 1.0, 1.0, layer_decay=0.7)
