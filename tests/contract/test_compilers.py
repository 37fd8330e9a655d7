"""A retrofitted network compiles and exports wherever the original does."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from citizens import X, model_and_input, small
from networks import gradients, run
from sweeps import swept

# in one process, as PyTorch's compilers and exporters take seconds to import
pytestmark = pytest.mark.xdist_group("compilers")

BOTH = ["torchvision/resnet18", "torchvision/squeezenet1_1"]  # a derived forward and a Sequential


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", swept(BOTH, ["timm/convnext_atto", "timm/dla34"]))
def test_torch_compile_takes_it_as_one_graph(name: str) -> None:
    model, x = model_and_input(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, x), run(model, x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.sweep
def test_torch_compile_in_train_mode_and_with_another_batch() -> None:
    model = small().train()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    found, expected = gradients(compiled, X), gradients(model, X)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)
    torch.testing.assert_close(run(compiled, X[:1].repeat(5, 1, 1, 1)), run(model, X[:1].repeat(5, 1, 1, 1)))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_compiles_a_block() -> None:
    model = small().layer1
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    swept(BOTH, ["torchvision/mobilenet_v2", "torchvision/shufflenet_v2_x0_5", "timm/convnext_atto", "timm/dla34"]),
)
def test_torch_export(name: str) -> None:
    model, x = model_and_input(name)
    program = torch.export.export(model, (x,))
    assert set(program.state_dict) == set(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(run(program.module(), x), run(model, x))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_torch_export_with_a_dynamic_batch() -> None:
    model = small()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_computes_the_same() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model = small()
    x = X[:, :, :16, :16].contiguous()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    onnx.checker.check_model(program.model_proto)
    (found,) = ReferenceEvaluator(program.model_proto).run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", swept(BOTH, ["torchvision/mobilenet_v2"]))
def test_torch_jit_traces_it(name: str) -> None:
    model, x = model_and_input(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", swept(BOTH, ["torchvision/mobilenet_v2"]))
def test_torch_jit_scripts_it(name: str) -> None:
    model, x = model_and_input(name)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))
