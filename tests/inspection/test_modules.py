"""Each module's row in the report says what it holds, returns and costs, and what is measured is what runs."""

from __future__ import annotations

import json

import pytest
import torch
from inspected import Twice, network, retrofitted, small_resnet
from torch import Tensor, nn

from se_retrofit import RetrofitError, SEAttention, add_se, report
from se_retrofit.inspection.modules import size

INPUT = torch.empty(2, 3, 32, 32)


class Branches(nn.Module):
    """A residual network whose branches are in a list, which is never called itself, and one module that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)
        )
        self.stem, self.spare = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = x + branch(x)
        return x


def test_a_row_says_parameters_output_shape_and_multiply_adds() -> None:
    model = retrofitted("tv/resnet50")
    found = report(model)
    rows = {row.path: row for row in found.modules}
    assert list(rows) == [path for path, _ in model.named_modules()]
    assert rows[""].multiply_adds == found.multiply_adds_after
    assert rows[""].parameters == found.parameters_after
    for path, module in model.named_modules():
        row = rows[path]
        assert row.parameters == sum(p.numel() for p in module.parameters())
        if isinstance(module, nn.Conv2d):
            (shape,) = row.shapes
            assert shape[0] == module.out_channels
            assert row.multiply_adds == shape[1] * shape[2] * module.weight.numel()
        if isinstance(module, SEAttention):
            assert row.se
            assert row.multiply_adds == 2 * module.channel * module.hidden
    assert rows["layer3"].shapes == ((1024, 14, 14),)
    assert rows["layer3"].multiply_adds == sum(
        r.multiply_adds or 0 for r in found.modules if r.path.rpartition(".")[0] == "layer3"
    )


def test_a_list_of_modules_costs_what_they_cost_and_what_is_not_called_costs_nothing() -> None:
    found = report(add_se(Branches(), example_inputs=INPUT), INPUT)
    rows = {row.path: row for row in found.modules}
    assert rows["branches"].shapes == ()
    assert rows["branches"].multiply_adds == rows["branches.0"].multiply_adds + rows["branches.1"].multiply_adds > 0
    assert (rows["spare"].shapes, rows["spare"].multiply_adds) == ((), 0)


def test_a_module_called_twice_is_counted_twice() -> None:
    example = torch.empty(1, 3, 8, 8)
    rows = {row.path: row for row in report(add_se(Twice(), example_inputs=example), example).modules}
    assert rows["block.conv1"].multiply_adds == 2 * 8 * 8 * 8 * 8 * 9
    assert rows["block"].multiply_adds + rows["stem"].multiply_adds == rows[""].multiply_adds


def saved_by(model: nn.Module, x: Tensor) -> int:
    """The bytes that autograd saves in one forward pass, beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


def test_saved_bytes_are_what_autograd_saves() -> None:
    model = add_se(small_resnet())
    found = report(model, INPUT, measure=True)
    assert found.saved_bytes == saved_by(model, torch.randn(2, 3, 32, 32)) // 2
    rows = {row.path: row for row in found.modules}
    parts = [row.saved_bytes for row in found.modules if row.depth == 1]
    assert (
        abs(found.saved_bytes - sum(parts)) <= len(parts) + 512 * 4
    )  # rounding, and what is flattened between modules
    assert rows["layer1.0.se_attention"].saved_bytes > 0
    frozen = report(add_se(small_resnet().requires_grad_(False)), INPUT, measure=True)
    assert 0 < frozen.saved_bytes < found.saved_bytes


def test_milliseconds_of_parts_are_within_those_of_the_whole() -> None:
    found = report(add_se(Branches(), example_inputs=INPUT), INPUT, measure=True)
    rows = {row.path: row for row in found.modules}
    assert found.milliseconds == rows[""].milliseconds > 0
    assert 0 < sum(row.milliseconds or 0 for row in found.modules if row.depth == 1) <= found.milliseconds
    assert rows["branches"].milliseconds == rows["branches.0"].milliseconds + rows["branches.1"].milliseconds
    assert rows["spare"].milliseconds == 0
    assert found.measured == "in batches of 2, float32 on cpu"
    assert "in batches of 2, float32 on cpu" in str(found)


def test_measuring_changes_nothing() -> None:
    model = add_se(small_resnet()).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    report(model, INPUT, measure=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_request_nothing_is_measured_and_without_values_nothing_can_be() -> None:
    model = add_se(network("tv/resnet18"))
    found = report(model)
    assert (found.milliseconds, found.saved_bytes, found.measured) == (None, None, None)
    assert all(row.milliseconds is None and row.saved_bytes is None for row in found.modules)
    with pytest.raises(RetrofitError, match="ResNet can't be measured: its parameters have no values"):
        report(model, measure=True)


def test_the_table_of_modules_is_text_down_to_a_depth() -> None:
    found = report(add_se(small_resnet()), INPUT)
    header, _, *lines = map(str, found.module_table())
    assert header.split() == ["module", "class", "output", "parameters", "multiply-adds"]
    assert len(lines) == len(found.modules)
    assert sum(line.startswith("> ") for line in lines) == 5
    assert any(
        line.split() == ["conv1", "Conv2d", "64", "->", "64,", "3x3", "64x8x8", "36,864", "2.359", "M"]
        for line in lines
    )
    assert [line.split()[0] for line in map(str, found.module_table(1)[2:])] == [
        "(model)", *(name for name, _ in small_resnet().named_children())
    ]  # fmt: skip
    measured = report(add_se(small_resnet()), INPUT, measure=True).module_table(0)
    assert str(measured[0]).split()[-2:] == ["milliseconds", "saved"]


def test_plain_data_holds_the_modules() -> None:
    data = json.loads(report(add_se(small_resnet()), INPUT).to_json())
    assert data["modules"][1] == {
        "path": "conv1", "words": "Conv2d 3 -> 64, 7x7, stride 2", "se": False, "shapes": [[64, 16, 16]],
        "parameters": 9408, "multiply_adds": 9408 * 256, "milliseconds": None, "saved_bytes": None,
    }  # fmt: skip


def test_bytes_are_written_in_four_digits() -> None:
    assert [size(n) for n in (0, 999, 96_337_920)] == ["0 B", "999 B", "96.34 MB"]
