"""Networks with any attention, and with SE in blocks of any kind, copy, pickle, compile, export, trace, save and load."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attentions import (
    ALL,
    BUILT_IN,
    EVERY_TIME,
    IN_SWEEPS,
    LIBRARIES,
    MORE_OF_LIBRARIES,
    TIMM,
    Network,
    citizen,
    inserted,
    learned,
)
from networks import assert_same_function, gradients, randomise_se, run
from sweeps import swept
from torch import Tensor, nn

from se_retrofit import (
    RetrofitError,
    export,
    fold_se,
    from_native,
    has_se,
    inspect_se,
    load_retrofitted,
    plan_of,
    remove_se,
    save_retrofitted,
)
from se_retrofit.fusion import plan_fusion
from se_retrofit.inspection import GateLogger, excitations
from se_retrofit.saving import load_se, save_se
from se_retrofit.surgery.record.inputs import Inputs
from se_retrofit.verify import se_matters

# in one process, as PyTorch's compilers and exporters take seconds to import
pytestmark = [pytest.mark.xdist_group("compilers"), pytest.mark.usefixtures("fresh_dynamo")]

COMPILED = [*LIBRARIES[1:], "torchvision/shufflenet_v2_x0_5", "torchvision/mobilenet_v2", "timm/dla34"]
compiled = pytest.mark.parametrize(
    "name", swept(["cbam", "class", "timm/test_resnet"], ["se", "eca", "static", *TIMM, *COMPILED])
)


def assert_same(found: Any, name: str, model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """On these images, and on none (a detector's head without proposals), which timm's own modules need not take."""
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=tolerance, atol=tolerance)
        assert name in TIMM or found(x[:0]).shape == model(x[:0]).shape


@pytest.mark.parametrize("name", swept([*EVERY_TIME, *LIBRARIES], [*IN_SWEEPS, *MORE_OF_LIBRARIES]))
def test_copies_pickles_and_state_dicts_are_those_of_the_network_and_undo_leaves_none_of_it(name: str) -> None:
    network, loaded, x = citizen(name)
    model = randomise_se(copy.deepcopy(loaded))
    loaded.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model)), loaded):
        assert_same_function(twin, model, x)
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert plan_of(twin) == plan_of(model)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert_same_function(copy.copy(model), model, x)
    assert not se_matters(model, Inputs((x,))).equal
    bare = remove_se(model)
    assert not has_se(bare)
    assert list(bare.state_dict()) == list(network.state_dict())
    assert_same_function(bare, network, x)


FRESH = """
import pathlib, sys, torch
for file in pathlib.Path(sys.argv[1]).iterdir():
    model, x, in_eval_mode, in_train_mode = torch.load(file, weights_only=False)
    assert torch.equal(model.eval()(x), in_eval_mode)
    torch.manual_seed(3)
    assert torch.equal(model.train()(x), in_train_mode)
    import se_retrofit
    assert se_retrofit.has_se(model)
    assert not se_retrofit.has_se(se_retrofit.remove_se(model))
"""


@pytest.mark.sweep
def test_whole_models_load_in_a_fresh_process_that_has_imported_nothing(tmp_path: Path) -> None:
    for name in ("class", *BUILT_IN, *TIMM, *LIBRARIES):
        model, x = learned(name)
        outputs = [run(copy.deepcopy(model).train(mode), x, seed=3)[0].detach() for mode in (False, True)]
        torch.save((model, x, *outputs), tmp_path / name.replace("/", "_"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path)], env=environment, check=True)


@pytest.mark.filterwarnings("ignore")
@compiled
def test_torch_compile_takes_it_as_one_graph(name: str) -> None:
    model, x = learned(name)
    assert_same(torch.compile(model, backend="eager", fullgraph=True), name, model, x)


@pytest.mark.filterwarnings("ignore")
@compiled
def test_torch_export_takes_it_with_a_dynamic_batch(name: str) -> None:
    model, x = learned(name)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert set(program.state_dict) == set(model.state_dict())
    assert_same(program.module(), name, model, x.repeat(2, 1, 1, 1)[:3])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", swept(["se", "class"], ["cbam", "eca", "static", *TIMM, *LIBRARIES]))
def test_a_file_of_onnx_computes_the_same(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = learned(name)
    session = onnxruntime.InferenceSession(export(model, tmp_path / "network.onnx", example_inputs=x))
    (given,) = session.get_inputs()

    def run_session(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {given.name: batch.numpy()})[0])

    assert_same(run_session, name, model, x, tolerance=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dims"),
    [
        *((name, 2) for name in (*BUILT_IN, *LIBRARIES[:2])),
        ("se", 1),
        *(pytest.param(name, 2, marks=pytest.mark.sweep) for name in ("EcaModule", "torchvision/mobilenet_v2")),
    ],
)
def test_scripts_and_traces(name: str, dims: int) -> None:
    model, x = learned(name, dims)
    takes = [lambda net: torch.jit.trace(net, x, check_trace=False)]
    if name != "EcaModule":  # a timm module of its own makes symbolic traces and scripts of any kind
        takes.append(torch.jit.script)
    if name != "timm/test_resnet":  # the original's forward has branches
        takes.append(torch.fx.symbolic_trace)
    for take in takes:
        torch.testing.assert_close(take(model)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_in_train_mode_and_inductor_on_a_block() -> None:
    model, x = learned("timm/test_resnet")
    found, expected = (gradients(net, x) for net in (torch.compile(model.train(), backend="eager"), model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)
    block, x = model.eval().layer1, torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)


# Saving and loading ---------------------------


@pytest.mark.parametrize("name", swept([*BUILT_IN, "class", "SEModule"], [name for name in TIMM if name != "SEModule"]))
def test_a_name_is_saved_with_its_options_and_a_class_is_given_again(name: str, tmp_path: Path) -> None:
    model, x = learned(name)
    folder, file = save_retrofitted(model, tmp_path / "saved"), save_se(model, tmp_path / "se.safetensors")
    given = {} if name in BUILT_IN else {"attention": ALL[name]}
    loaded = load_retrofitted(folder, base=Network(), **given)
    assert plan_of(loaded) == plan_of(model)
    for twin in (loaded, load_se(remove_se(model), file, **given)):
        assert torch.equal(twin(x), model(x))
    with pytest.raises(RetrofitError, match=f"attention, {name}" if name in BUILT_IN else "parameters"):
        load_retrofitted(folder, base=Network(), attention=lambda slot: nn.Conv2d(8, 8, 3, padding=1))
    if given:
        with pytest.raises(RetrofitError, match="not saved; give it"):
            load_retrofitted(folder, base=Network())


# What looks into them ---------------------------


@pytest.mark.parametrize("name", ["cbam", "class"])
@pytest.mark.parametrize("look", [fold_se, excitations, lambda model, images: GateLogger(model)])
def test_without_gates_what_needs_them_is_refused_plainly(name: str, look: Any) -> None:
    model, x = learned(name)
    with pytest.raises(RetrofitError, match=r"first\.se_attention is (CBAM|Gain) 8.* no gates"):
        look(model, [x])


def test_gates_of_eca_are_gathered_and_constant_ones_are_folded() -> None:
    model, x = learned("eca")
    with GateLogger(model) as logger:
        model(x)
        seen = logger.summary()
    for site in excitations(model, [x]).sites:
        torch.testing.assert_close(seen[site.path].mean.double(), site.mean)
    with torch.no_grad():
        for module in inserted(model).values():
            module.conv.weight.zero_()
    folded = fold_se(model, [x])
    assert len(folded.fold_report.folded) == 2
    assert not has_se(folded)
    assert_same(folded, "eca", model, x)


@pytest.mark.parametrize("name", ["eca", "cbam", "static", "class"])
def test_what_is_for_se_alone_is_refused_plainly(name: str, tmp_path: Path) -> None:
    model, x = learned(name)
    assert {skip.reason.rpartition(": ")[2] for skip in plan_fusion(model).skipped} <= {"SEAttention alone is fused"}
    with pytest.raises(RetrofitError, match="no native form"):
        from_native(model, Network())
    if name != "class":  # its source is exported, and compared bit for bit by export itself
        assert export(model, tmp_path / "network.py", example_inputs=x).exists()
    else:
        with pytest.raises(RetrofitError, match=r"first\.se_attention is Gain 8"):
            export(model, tmp_path / "network.py", example_inputs=x)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_inspection_names_it_and_counts_its_costs(name: str) -> None:
    model, x = learned(name)
    found = inspect_se(model, x)
    report = found.report()
    what = "Squeeze-and-Excitation" if name == "se" else f"{plan_of(model).what} modules"
    assert f"Network with {what}" in str(report)
    passes = {"se": 2, "eca": 2, "static": 1, "cbam": 6}.get(name)
    for row, module in zip(report.rows, inserted(model).values(), strict=True):
        assert row.parameters == sum(p.numel() for p in module.parameters())
        assert row.squeeze_scale is not None
        assert passes is None or row.squeeze_scale == passes * 8 * 7 * 6 // 2
    excitation = {"se": 2 * 8 * 4, "eca": 3 * 8, "static": 0, "cbam": 2 * 2 * 8 * 4 + 2 * 49 * 42}.get(name)
    assert excitation is None or report.rows[0].excitation == excitation
    assert next(iter(inserted(model).values())).summary() in str(found.graph("first"))
