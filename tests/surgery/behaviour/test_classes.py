"""Whatever a block's class does, it goes on doing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import class_blocks as blocks
import pytest
import torch
from networks import randomise_se, randomised, se_modules
from programs import imported
from same_behaviour import check
from structure import Net
from torch import nn
from torch.ao.nn.quantized import FloatFunctional
from torch.nn.utils import parametrizations, parametrize

from se_retrofit import RetrofitError, add_se, plan_se

SIMPLE = [
    blocks.Named, blocks.Copies, blocks.Mover, blocks.Cached, blocks.NeverRaises, blocks.OddNames, blocks.DictResult,
    blocks.Children, blocks.Derived, blocks.Private, blocks.Property, blocks.made(0.25),
]  # fmt: skip


@pytest.mark.parametrize("block", SIMPLE, ids=lambda cls: cls.__name__)
def test_a_class_goes_on_doing_what_it_does(block: type[nn.Module]) -> None:
    registry, cache, counts = list(blocks.REGISTRY), dict(blocks.CACHE), dict(blocks.COUNTS)
    instances = blocks.Named.instances
    blocks.grid(5)  # its cache is full, as after a run of the model
    add_se(Net(block).eval(), 2, example_inputs=torch.zeros(2, 3, 16, 16))
    assert registry == blocks.REGISTRY, "a class was registered"
    assert counts == blocks.COUNTS
    assert blocks.Named.instances == instances
    assert cache == blocks.CACHE
    assert not blocks.grid(16).is_meta
    check(Net(block))


def test_weak_references_to_a_parent_point_to_the_copys_own() -> None:
    model = Net(blocks.KnowsParent).eval()
    retrofitted = add_se(model, 2)
    assert retrofitted.block1.child.parent() is retrofitted.block1
    assert model.block1.child.parent() is model.block1
    x = torch.randn(2, 3, 9, 9)
    for network in (model, retrofitted):
        network.block1.alpha = 2.0
    assert torch.equal(retrofitted(x), model(x))


def test_a_model_with_a_lock_is_retrofitted_in_place() -> None:
    model, x = Net(blocks.Locked).eval(), torch.randn(2, 3, 9, 9)
    with pytest.raises(RetrofitError, match="can't be copied"):
        add_se(model)
    expected = model(x)
    assert torch.equal(add_se(model, 2, inplace=True)(x), expected)


def test_a_module_without_source_returns_its_value_through_se() -> None:
    check(Net(blocks.sourceless))


def test_two_calls_of_one_parents_forward_are_left_out_with_the_reason_or_right() -> None:
    model = Net(blocks.Diamond).eval()
    try:
        retrofitted = add_se(model, 2)
    except RetrofitError as error:
        assert "several times" in str(error)  # noqa: PT017
        return
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(retrofitted(x), model(x))


@pytest.mark.parametrize("block", [blocks.KnowsClass, blocks.CountsChildren, blocks.Timed])
def test_a_block_whose_numbers_depend_on_its_class_its_children_or_the_run_is_left_out(block: type[nn.Module]) -> None:
    with pytest.raises(RetrofitError, match="looks at the class"):
        add_se(Net(block), 2, example_inputs=torch.zeros(2, 3, 16, 16))


SOURCE = """
import torch.nn.functional as F
from python_blocks import Block


class Edited(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x)))
        return x + out
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return x + out", "return x + out * 100"),
        ("(Block):\n", "(Block):\n\n\n"),
        ("(Block):\n", "(Block):\n    def other(self):\n        return 1\n\n"),  # stands where forward stood
        ("return x + out", "return 'x + out"),  # no Python
    ],
)
def test_a_file_that_was_edited_after_its_import_does_not_change_the_model(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "edited_blocks.py"
    block = imported(path, SOURCE).Edited
    path.write_text(SOURCE.replace(old, new))
    model = Net(block).eval()
    x = torch.randn(2, 3, 9, 9)
    try:
        retrofitted = add_se(model, 2)
    except RetrofitError as error:
        assert "edited" in str(error)  # noqa: PT017
    else:
        assert torch.equal(retrofitted(x), model(x))


def test_a_patched_method_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, x):
        out = self.bn2(self.conv2(self.branch(x) * 0.5))
        return x + out

    monkeypatch.setattr(blocks.Base, "forward", forward)
    check(Net(blocks.Base))


def test_a_pickle_says_so_where_the_source_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "pickled_blocks.py"
    block = imported(path, SOURCE).Edited
    data = pickle.dumps(add_se(nn.Sequential(nn.Conv2d(3, 8, 1), block()), 2))
    assert torch.equal(pickle.loads(data).eval()(x := torch.zeros(1, 3, 9, 9)), pickle.loads(data).eval()(x))
    imported(path, SOURCE.replace("return x + out", "return x + out + 1"))
    with pytest.raises(RetrofitError, match=r"source of pickled_blocks\.Edited\.forward has changed"):
        pickle.loads(data)


class Symmetric(nn.Module):
    def forward(self, weight):
        return (weight + weight.flip(-1)) / 2


@pytest.mark.parametrize("what", ["block", "weight", "norm", "hook"])
def test_parametrized_and_hooked_blocks_go_on(what: str) -> None:
    def block() -> nn.Module:
        made = blocks.Base()
        if what == "block":
            made.gain = nn.Parameter(torch.ones(8, 1, 1))
            parametrize.register_parametrization(made, "gain", nn.Softplus())
        elif what == "weight":
            parametrize.register_parametrization(made.conv2, "weight", Symmetric())
        elif what == "norm":
            parametrizations.spectral_norm(made.conv2)
        else:
            made.bn2.register_forward_hook(lambda module, args, output: output * 0.5)
            made.register_forward_pre_hook(lambda module, args: (torch.cat([args[0][:, :6], args[0][:, :2]], 1),))
            made.conv1.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
            made.register_forward_hook(lambda module, args, output: torch.relu(output))
        return made

    check(Net(block))


@pytest.mark.parametrize("what", ["lambda", "forward", "hook"])
def test_functions_on_instances_go_on_with_the_copys_modules(what: str) -> None:
    block = blocks.SetForward() if what == "lambda" else blocks.Base()
    runs: list[str] = []
    if what == "forward":
        inner = block.forward
        block.forward = lambda x: torch.relu(inner(x))  # type: ignore[method-assign]
    elif what == "hook":
        block.other = other = nn.Conv2d(8, 8, 1)
        block.register_forward_hook(lambda module, args, output: runs.append("") or output + other(args[0]))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), block).eval()
    x = torch.randn(2, 3, 9, 9)
    retrofitted = add_se(model, 2, example_inputs=x)
    assert not runs, "a recording is seen by the hook's own list"
    expected = model(x)
    assert torch.equal(retrofitted(x), expected)
    called = []
    for se in se_modules(retrofitted).values():
        se.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(retrofitted(x), expected), "the copy computes with the original's weights"
    assert called


def test_the_copies_of_two_blocks_that_copy_themselves_are_two() -> None:
    again = copy.deepcopy(add_se(Net(blocks.Mover).eval(), 2))
    assert again.block1 is not again.block2


@pytest.mark.filterwarnings("ignore")
def test_quantisation_aware_training_is_kept() -> None:
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    model = Net(blocks.Base)
    model.qconfig = get_default_qat_qconfig("fbgemm")
    prepared = prepare_qat(model.train())
    x = torch.randn(2, 3, 12, 12)
    prepared(x)
    prepared.eval()
    retrofitted = add_se(prepared, 2)
    assert len(plan_se(prepared).sites) == 2
    assert torch.equal(retrofitted(x), prepared(x))
    for network in (copy.deepcopy(prepared).train(), retrofitted.train()):
        network(x)


class Quantisable(blocks.Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.add = FloatFunctional()

    def forward(self, x):
        return self.add.add(x, self.bn2(self.conv2(self.branch(x))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["se", "eca", "static"])
@pytest.mark.parametrize("prepared_first", [False, True])
def test_a_network_quantised_in_eager_mode_computes_its_gates_in_floating_point(
    prepared_first: bool, attention: str
) -> None:
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qconfig, prepare

    torch.manual_seed(3)
    model = nn.Sequential(QuantStub(), nn.Conv2d(3, 8, 1), Quantisable(), Quantisable(), DeQuantStub())
    model = randomised(model).eval()
    model.qconfig = get_default_qconfig("x86")
    x = torch.randn(2, 3, 12, 12)
    if prepared_first:
        model = prepare(model)
    fitted = randomise_se(add_se(model, 2, attention=attention, example_inputs=x), std=2)
    fitted = fitted if prepared_first else prepare(fitted)
    expected = fitted(x)
    assert (model(x) - expected).norm() > 0.2 * expected.norm()
    assert (convert(fitted)(x) - expected).norm() < 0.05 * expected.norm()
