"""A retrofitted network compiles, exports, traces and scripts wherever the original does; tests/attention has the same for each
attention, a dynamic batch and ONNX."""

from __future__ import annotations

import copy

import pytest
import torch
from citizens import X, model_and_input, small
from networks import gradients, run
from sweeps import swept

# in one process, as PyTorch's compilers and exporters take seconds to import
pytestmark = [
    pytest.mark.xdist_group("compilers"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


BOTH = ["timm/test_resnet", "torchvision/squeezenet1_1"]  # a derived forward and a Sequential
MORE = ["torchvision/mobilenet_v2", "torchvision/shufflenet_v2_x0_5", "timm/test_convnext", "timm/dla34"]


@pytest.mark.parametrize("name", swept(BOTH, MORE))
def test_it_is_taken_as_one_graph(name: str) -> None:
    model, x = model_and_input(name)
    with torch.no_grad():
        expected = run(model, x)
        torch.testing.assert_close(run(torch.compile(model, backend="eager", fullgraph=True), x), expected)
        program = torch.export.export(model, (x,))
        assert set(program.state_dict) == set(model.state_dict())
        torch.testing.assert_close(run(program.module(), x), expected)


@pytest.mark.parametrize("name", swept(BOTH, MORE[:1]))
def test_torch_jit_traces_and_scripts_it(name: str) -> None:
    model, x = model_and_input(name)
    with torch.no_grad():
        for taken in (torch.jit.trace(model, x, check_trace=False), torch.jit.script(model)):
            torch.testing.assert_close(run(taken, x), run(model, x))


@pytest.mark.sweep
def test_torch_compile_in_train_mode_and_with_another_batch() -> None:
    model = small().train()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    found, expected = gradients(compiled, X), gradients(model, X)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)
    torch.testing.assert_close(run(compiled, X[:1].repeat(5, 1, 1, 1)), run(model, X[:1].repeat(5, 1, 1, 1)))


@pytest.mark.sweep
def test_inductor_compiles_a_block() -> None:
    model = small().layer1
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-4)
