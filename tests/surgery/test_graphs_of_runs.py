"""The record of a run is a torch.fx graph: it runs, and it computes what the network does."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from networks import randomised, run, same_tensors
from structure import module_of
from sweeps import swept
from torch import Tensor, fx, nn

from se_retrofit import RetrofitError, add_se, record
from se_retrofit.models import Base


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
