"""The record of a run is a torch.fx graph, which computes what the network does; short ways to it give what the long ways give."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from networks import randomised, run, same_tensors
from structure import Unit, conv, module_of
from sweeps import swept
from torch import Tensor, fx, nn

from se_retrofit import RetrofitError, add_se, plan_of, plan_se, record
from se_retrofit.models import Base
from se_retrofit.surgery.record.copying import copied, on_meta
from se_retrofit.surgery.record.meta import MetaOperations


def rewriting() -> dict[str, Any]:
    """With tensors that no operation makes, one of which is neither a parameter nor a buffer."""
    return {"conv": nn.Conv2d(3, 8, 3), "scale": nn.Parameter(torch.rand(8, 1, 1)), "shift": torch.rand(8, 1, 1)}


@module_of(rewriting)
def Rewriting(self, x: Tensor, *, flip: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Views that are written to, and operations with several outputs."""
    y = self.conv(x) * self.scale + self.shift
    y[:, :4].mul_(2).relu_()
    a, b = y[:, :4], y[:, 4:]
    a += b
    values, indices = torch.max(y.flatten(2), -1)
    return (y.flip(-1) if flip else y), {"max": values, "at": indices.float(), "a": a}


@module_of(
    lambda needs_values, where: {"conv": conv(3, 8), "unit": Unit(), "needs_values": needs_values, "where": where}
)
def Moving(self, x: Tensor) -> Tensor:
    y = self.unit(self.conv(x.to(self.where)))
    if self.needs_values and float(y.mean()) > 1e9:
        return y
    return y + torch.arange(y.shape[-1], device=self.where)


NETWORKS = swept(
    ["timm/test_resnet", "torchvision/shufflenet_v2_x0_5"],
    ["timm/mobilenetv2_035", "timm/densenet121", "timm/convnext_atto", "timm/hrnet_w18_small", "torchvision/squeezenet1_1", "timm/repvgg_a0",
     "timm/nf_resnet26", "timm/inception_next_atto", "torchvision/googlenet", "timm/res2net50_14w_8s"],
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_recorded_graph_computes_what_the_network_does(name: str) -> None:
    model = randomised(Base.of(name).build()).eval()
    for network in (model, add_se(model)):
        found = record(network)
        found.graph.lint()
        x = torch.rand(2, *found.inputs.args[0].shape[1:])
        with torch.no_grad():
            assert torch.equal(fx.GraphModule(network, found.graph)(x), network(x))


@pytest.mark.parametrize("flip", [True, False])
def test_writes_to_views_and_values_of_no_operation_are_in_the_graph(flip: bool) -> None:
    model = randomised(Rewriting()).eval()
    x = torch.randn(2, 3, 9, 9)
    found = record(model, ((x,), {"flip": flip}))
    constants = [node for node in found.graph.nodes if node.op == "get_attr" and node.target.startswith("constant")]
    assert len(constants) == 1
    constants[0].target = "shift"  # the one thing that a graph can't name
    model.scale.data.mul_(3)
    assert same_tensors(run(fx.GraphModule(model, found.graph), x), run(model, x, flip=flip))


def test_nodes_tell_shapes_calls_and_modules() -> None:
    found = record(timm.create_model("test_resnet"), torch.zeros(3, 3, 64, 64))
    nodes = {node.name: node for node in found.graph.nodes}
    conv = nodes["layer2_0_conv1"]
    assert (conv.op, conv.target) == ("call_module", "layer2.0.conv1")
    assert conv.meta["shape"][0] == 3
    assert conv.meta["dtype"] is torch.float32
    assert conv.meta["call"].path == "layer2.0"
    (adds,) = [n for n in found.graph.nodes if n.op == "call_function" and n.meta["call"].path == "layer2.0"]
    assert adds.target is torch.ops.aten.add_.Tensor
    assert [op.node for op in found.ops] == [n for n in found.graph.nodes if n.op != "output"]
    assert {op.node: op.role for op in found.ops}[adds] == "add"


@module_of(lambda: {"conv": nn.Conv2d(3, 4, 3)})
def Branching(self, x: Tensor, y: Tensor) -> Tensor:
    return self.conv(x) - y if x.shape[0] > 0 and x.sum() != 0 else x


def test_a_network_that_symbolic_trace_cannot_take_has_a_graph_that_takes_its_inputs_in_order() -> None:
    model, x, y = Branching(), torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3)
    with pytest.raises(torch.fx.proxy.TraceError):
        fx.symbolic_trace(model)
    assert torch.equal(fx.GraphModule(model, record(model, (x, y)).graph)(x, y), model(x, y))


def test_a_model_that_cannot_be_run_has_no_record() -> None:
    with pytest.raises(RetrofitError, match=r"\(2, 5, 8, 8\)"):
        record(nn.Conv2d(3, 4, 3), torch.zeros(2, 5, 8, 8))


# Short ways ---------------------------

aten = torch.ops.aten
X = torch.empty(2, 4, 6, 6, device="meta")
LAST = X.to(memory_format=torch.channels_last)
WEIGHT = torch.empty(8, 4, 3, 3, device="meta")
CONVOLUTION = (WEIGHT, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
OPERATIONS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.add.Tensor, (X, X)),
    (aten.add.Tensor, (X, LAST)),
    (aten.add.Tensor, (LAST, LAST)),
    (aten.add.Tensor, (X, torch.empty(4, 1, 1, device="meta", dtype=torch.float64))),
    (aten.add.Tensor, (X.long(), 1)),
    (aten.add.Tensor, (X.long(), 1.0)),
    (aten.add.Tensor, (X.bool(), True)),
    (aten.add.Tensor, (X.bool(), 1)),
    (aten.mean.dim, (X, [2, 3])),
    (aten.mean.dim, (X, [2, 3], True)),
    (aten.convolution.default, (X, *CONVOLUTION)),
    (aten.convolution.default, (LAST, *CONVOLUTION)),
    (aten.max_pool2d_with_indices.default, (X, [2, 2], [2, 2])),
    (aten.split.Tensor, (X, 2, 1)),
]


def forms(output: Any) -> list[tuple[Any, ...]]:
    tensors = [output] if isinstance(output, Tensor) else list(output)
    return [(type(t), t.shape, t.stride(), t.dtype, t.device) for t in tensors]


@pytest.mark.parametrize("needs_values", [False, True])
def test_a_network_that_moves_values_to_a_gpu_is_recorded_without_it(
    needs_values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    model = Moving(needs_values, torch.device("cuda:0"))
    retrofitted = add_se(model)
    model.where = retrofitted.where = torch.device("cpu")
    assert [site.path for site in plan_of(retrofitted).sites] == ["unit.se_attention"]
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(retrofitted(x), model(x))


def test_an_operation_asked_for_again_has_outputs_of_the_same_form() -> None:
    known = MetaOperations()
    for turn in range(3):
        for operation, args in OPERATIONS:
            got, wanted = known.run(operation, args, {}), operation(*args)
            assert forms(got) == forms(wanted), (turn, operation)
            assert type(got) is type(wanted)
        x, viewed = torch.empty_like(X), torch.empty_like(X)
        assert known.run(aten.relu_.default, (x,), {}) is x
        assert known.run(aten.transpose_.default, (viewed, 0, 1), {}) is viewed
        assert viewed.shape == (4, 2, 6, 6)
        with pytest.raises((NotImplementedError, RuntimeError)):  # it depends on values
            known.run(aten._local_scalar_dense.default, (torch.empty((), device="meta"),), {})


class Twins(nn.Module):
    """Modules, parameters and containers that stand in several places; attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.second, self.third = nn.Conv2d(3, 3, 3), self.first
        self.second.weight = self.first.weight
        self.lists = [self.first, {"a": self.norm, "b": torch.ones(2)}]
        self.same = self.lists
        self.empty: set[int] = set()
        self.empty_again = self.empty
        self.register_buffer("kept", torch.arange(3), persistent=False)
        self.second._forward_hooks = self.first._forward_hooks  # shared, and empty
        self.upsample = nn.Upsample(scale_factor=2)


def test_a_copy_is_that_of_deepcopy() -> None:
    model = Twins()
    wanted = copy.deepcopy(model)
    for convert in (None, on_meta):
        got: Any = copied(model, convert, independent=convert is not None)
        assert [(n, type(m), sorted(vars(m))) for n, m in got.named_modules()] == [
            (n, type(m), sorted(vars(m))) for n, m in wanted.named_modules()
        ]
        assert not {id(m) for m in model.modules()} & {id(m) for m in got.modules()}
        assert got.third is got.first is got.lists[0]
        assert got.second.weight is got.first.weight is not model.first.weight
        assert got.same is got.lists is not model.lists
        assert got.lists[1]["a"] is got.norm
        assert got.empty_again is got.empty is not model.empty
        assert got.second._forward_hooks is got.first._forward_hooks is not model.first._forward_hooks
        assert [n for n, _ in got.named_buffers()] == [n for n, _ in wanted.named_buffers()]
        ours, theirs = got.state_dict(keep_vars=True), wanted.state_dict(keep_vars=True)
        assert [(n, t.shape, t.dtype, type(t)) for n, t in ours.items()] == [
            (n, t.shape, t.dtype, type(t)) for n, t in theirs.items()
        ]


class Told(nn.Conv2d):
    """Copies and pickles by a state of its own."""

    told = 0

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.told += 1


def test_a_module_that_copies_in_its_own_way_is_asked() -> None:
    assert copied(nn.Sequential(Told(3, 3, 3)))[0].told == 1


@pytest.mark.parametrize("switch", [gc.enable, gc.disable], ids=["on", "off"])
@pytest.mark.parametrize("model", [nn.Sequential(conv(3, 8), Unit()), nn.Linear(2, 2)], ids=["planned", "refused"])
def test_the_garbage_collector_is_left_on_or_off(switch: Callable[[], None], model: nn.Module) -> None:
    try:
        switch()
        before = gc.isenabled()
        with contextlib.suppress(RetrofitError):
            plan_se(model)
        assert gc.isenabled() == before
    finally:
        gc.enable()
