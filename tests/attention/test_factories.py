"""Classes and factories of a user's own: what they may give, and what is refused or said."""

from __future__ import annotations

import copy
import importlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attentions import Gain, Network, inputs, inserted, retrofitted
from networks import randomise_se
from torch import Tensor, nn

from se_retrofit import RetrofitError, add_se, load_retrofitted, plan_of, plan_se, save_retrofitted
from se_retrofit.attention import ATTENTIONS, ECA, FromIdentity, Inserted, Slot, scale, squeeze
from se_retrofit.inspection import GateLogger


def test_a_factory_is_told_its_place() -> None:
    slots: list[Slot] = []

    def factory(slot: Slot) -> nn.Module:
        slots.append(slot)
        return Gain(slot.channels)

    model = retrofitted(Network().bfloat16(), factory, inputs(dtype=torch.bfloat16))
    assert {str(slot.device) for slot in slots} == {"meta", "cpu"}
    assert [(s.channels, s.channel_dim, s.shape, s.kind, s.block, s.dtype, s.dims) for s in slots[-2:]] == [
        (8, -3, (2, 8, 7, 6), "residual", block, torch.bfloat16, 2) for block in ("first", "second")
    ]
    assert {p.dtype for module in inserted(model).values() for p in module.parameters()} == {torch.bfloat16}


class Looking(Gain):
    """Looks at values in its constructor."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        assert self.weight.sum().item() > 0


def two(slot: Slot) -> nn.Module:
    return nn.Sequential(Gain(slot.channels), nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.parametrize("attention", [*ATTENTIONS, Gain, Looking, two])
def test_parameters_are_counted_on_the_built_module(attention: Any) -> None:
    plan = plan_se(Network(), attention=attention, example_inputs=inputs())
    for site, module in zip(plan.sites, inserted(add_se(Network(), plan=plan)).values(), strict=True):
        assert site.parameters == sum(p.numel() for p in module.parameters()) > 0


def test_an_inserted_of_the_users_own_is_inserted_as_it_is() -> None:
    class Mine(Inserted):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.0

    for attention in (Mine, ECA, lambda slot: Mine(slot.channels, slot.channel_dim)):
        found = inserted(retrofitted(Network(last=True), attention, inputs())).values()
        assert not any(isinstance(module, FromIdentity) for module in found)
        assert [module.channel_dim for module in found] == [-1, -1]


def test_an_attention_that_holds_se_itself_is_one_module() -> None:
    model = retrofitted(Network(), lambda slot: nn.Sequential(ECA(slot.channels), Gain(slot.channels)), inputs())
    assert list(inserted(model)) == ["first.se_attention", "second.se_attention"]
    assert all(isinstance(module, FromIdentity) for module in inserted(model).values())


def grow(slot: Slot) -> nn.Module:
    return nn.Conv2d(slot.channels, 2 * slot.channels, 1)


def overwrite(slot: Slot) -> nn.Module:
    return nn.ReLU(inplace=True)


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def infinite(slot: Slot) -> nn.Module:
    return Log()


def shared() -> Callable[[Slot], nn.Module]:
    one = ECA(8, channel_dim=-3)
    return lambda slot: one


SAME = nn.Conv2d(8, 8, 1)


@pytest.mark.parametrize(
    ("attention", "fact"),
    [
        (lambda slot: 3, "nn.Module, got 3"),
        (lambda slot: SAME, "one module to several sites"),
        (grow, r"grow, in block first, .*\(2, 8, 7, 6\).* \(2, 16, 7, 6\)"),
        (overwrite, "overwrite, in block first, .*in place"),
        (infinite, "infinite, in block first, .*non-finite"),
        (lambda slot: nn.Conv2d(3, 8, 1), "can't be run on a value of shape"),
        (lambda slot: slot.nothing, "8 channels, in block first: AttributeError"),
        (shared(), "another site.s module"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_cannot_be_inserted_is_refused_and_the_model_unchanged(attention: Any, fact: str, inplace: bool) -> None:
    network = Network()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RetrofitError, match=fact):
        add_se(network, attention=attention, example_inputs=inputs(), inplace=inplace)
    assert list(network.state_dict()) == list(before)
    assert type(network.first).__name__ == "Unit"


def test_random_numbers_in_train_mode_are_said_and_none_are_drawn_in_the_check() -> None:
    network, before = Network().eval(), torch.get_rng_state()
    with pytest.warns(UserWarning, match="draws random numbers in train mode"):
        model = retrofitted(network, lambda slot: nn.Dropout(0.1), inputs())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model(inputs()), model(inputs()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        retrofitted(Network(), Gain, inputs())


def test_a_plan_brings_its_attention() -> None:
    plan = plan_se(Network(), attention=Gain, example_inputs=inputs())
    model = add_se(Network(), plan=plan)
    assert [site.attention for site in plan_of(model).sites] == ["attentions.Gain"] * 2
    with pytest.raises(RetrofitError, match=r"attentions\.Gain, .*give it again"):
        add_se(Network(), plan=plan_of(model))
    again = add_se(Network(), plan=type(plan).from_dict(plan.to_dict()), attention=Gain)
    assert [module.f.__class__ for module in inserted(again).values()] == [Gain, Gain]
    with pytest.raises(RetrofitError, match="attention, eca"):
        add_se(Network(), plan=plan_se(Network(), attention="eca", example_inputs=inputs()), attention="cbam")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["se", "eca", "static"])
def test_gates_are_factors_of_the_outputs(name: str, last: bool) -> None:
    module = next(iter(inserted(randomise_se(retrofitted(Network(last=last), name, inputs()))).values()))
    x = torch.randn(3, 6, 5, 8) if last else torch.randn(3, 8, 6, 5)
    gates = module.gates(x)  # type: ignore[operator]
    assert gates.shape == (3, 8)
    torch.testing.assert_close(module(x), scale(x, gates, module.channel_dim))
    if name == "eca":  # against the paper's formula
        z = squeeze(x, module.channel_dim)
        expected = 2 * torch.sigmoid(nn.functional.conv1d(z[:, None], module.conv.weight, padding="same")[:, 0])
        torch.testing.assert_close(gates, expected)


# The worked example of CONTRIBUTING.md: a stranger adds an attention in one file and one row ---------------------------

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_one_file_and_one_row_are_all_that_an_attention_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, row = re.findall(r"```python\n(.*?)```", TEXT[TEXT.index("## Add an attention") :], re.DOTALL)[:2]
    (tmp_path / "effective_se.py").write_text(file, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "effective_se", importlib.import_module("effective_se"))
    monkeypatch.setitem(ATTENTIONS, "ese", None)  # so that it goes again
    exec(row, {"ATTENTIONS": ATTENTIONS, "EffectiveSE": sys.modules["effective_se"].EffectiveSE})

    for last in (False, True):
        network, x = Network(last=last).eval(), inputs()
        model = add_se(network, attention="ese", example_inputs=x)
        assert torch.equal(model(x), network(x))
        assert {type(module).__name__ for module in inserted(model).values()} == {"EffectiveSE"}
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
        with GateLogger(model) as gates:
            model(x)
            assert len(gates.summary()) == 2
        again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=network)
        assert torch.equal(again(x), model(x))
