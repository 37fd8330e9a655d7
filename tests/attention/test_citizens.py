"""Networks with any attention copy, pickle, compile, export, save and load as those with SE do."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attentions import ALL, BUILT_IN, EVERY_TIME, IN_SWEEPS, TIMM, Gain, Network, inputs, inserted, retrofitted
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
from se_retrofit.verify import se_matters

pytestmark = pytest.mark.xdist_group("compilers")

QUICK = ["se", "cbam", "class"]
SLOW = ["eca", "static", *TIMM]


def learned(name: str, dims: int = 2) -> nn.Module:
    """A network whose attention has learned something."""
    model = retrofitted(Network(dims), ALL[name], inputs(dims)).eval()
    with torch.no_grad():
        for module in inserted(model).values():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def assert_same(found: nn.Module, model: nn.Module, x: Tensor | None = None) -> None:
    x = inputs() if x is None else x
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_copies_and_undo(name: str) -> None:
    model = learned(name)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs()), model(inputs()))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    bare = remove_se(model)
    assert not has_se(bare)
    assert list(bare.state_dict()) == list(Network().state_dict())
    assert not se_matters(model, (inputs(),)).equal


@pytest.mark.sweep
def test_pickles_are_read_in_a_fresh_process(tmp_path: Path) -> None:
    for name in ("class", *BUILT_IN, *TIMM):
        model = learned(name)
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps((model, inputs(), model(inputs()).detach())))
    code = (
        "import pathlib, pickle, torch\n"
        "from se_retrofit import plan_of, remove_se\n"
        f"for file in pathlib.Path({str(tmp_path)!r}).glob('*.pkl'):\n"
        "    model, x, y = pickle.loads(file.read_bytes())\n"
        "    assert torch.equal(model(x), y)\n"
        "    assert len(plan_of(model).sites) == 2\n"
        "    remove_se(model)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", swept(QUICK, SLOW))
def test_torch_compile_takes_it_as_one_graph(name: str) -> None:
    model = learned(name)
    assert_same(torch.compile(model, backend="eager", fullgraph=True), model)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", swept(QUICK, SLOW))
def test_torch_export_with_a_dynamic_batch(name: str) -> None:
    model = learned(name)
    program = torch.export.export(model, (inputs(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert set(program.state_dict) == set(model.state_dict())
    assert_same(program.module(), model, torch.randn(5, 3, 9, 8))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", swept(["se", "class"], ["eca", "cbam", "static", *TIMM]))
def test_onnx_export_computes_the_same(name: str) -> None:
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    model, x = learned(name), inputs()
    proto = torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto
    (found,) = reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dims"),
    [*((name, 2) for name in BUILT_IN), ("se", 1), pytest.param("EcaModule", 2, marks=pytest.mark.sweep)],
)
def test_scripts_and_traces(name: str, dims: int) -> None:
    model, x = learned(name, dims), inputs(dims)
    assert_same(torch.jit.trace(model, x), model, x)
    if name != "EcaModule":  # a timm module of its own makes symbolic traces and scripts of any kind
        assert_same(torch.jit.script(model), model, x)
    assert_same(torch.fx.symbolic_trace(model), model, x)


# Saving and loading


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_name_is_saved_with_its_options(name: str, tmp_path: Path) -> None:
    model = learned(name)
    folder = save_retrofitted(model, tmp_path / "saved")
    again = load_retrofitted(folder, base=Network())
    assert torch.equal(again(inputs()), model(inputs()))
    assert plan_of(again) == plan_of(model)
    bare = remove_se(model)
    assert torch.equal(load_se(bare, save_se(model, tmp_path / "se.safetensors"))(inputs()), model(inputs()))
    with pytest.raises(RetrofitError, match=f"attention, {name}"):
        load_retrofitted(folder, base=Network(), attention=Gain)


@pytest.mark.parametrize("name", swept(["class", "SEModule"], [name for name in TIMM if name != "SEModule"]))
def test_a_class_is_given_again(name: str, tmp_path: Path) -> None:
    model = learned(name)
    folder, file = save_retrofitted(model, tmp_path / "saved"), save_se(model, tmp_path / "se.safetensors")
    assert torch.equal(load_retrofitted(folder, base=Network(), attention=ALL[name])(inputs()), model(inputs()))
    assert torch.equal(load_se(remove_se(model), file, attention=ALL[name])(inputs()), model(inputs()))
    with pytest.raises(RetrofitError, match="not saved; give it"):
        load_retrofitted(folder, base=Network())
    with pytest.raises(RetrofitError, match="parameters"):
        load_retrofitted(folder, base=Network(), attention=lambda slot: nn.Conv2d(8, 8, 3, padding=1))


# Where gates are asked for


@pytest.mark.parametrize("name", ["cbam", "class"])
def test_without_gates_what_needs_them_is_refused_plainly(name: str) -> None:
    model = learned(name)
    words = r"first\.se_attention is (CBAM|Gain) 8.* no gates"
    for call in (
        lambda: fold_se(model, [inputs()]), lambda: excitations(model, [inputs()]), lambda: GateLogger(model),
    ):  # fmt: skip
        with pytest.raises(RetrofitError, match=words):
            call()


def test_gates_of_eca_are_gathered_and_constant_ones_are_folded() -> None:
    model = learned("eca")
    with GateLogger(model) as logger:
        model(inputs())
        seen = logger.summary()
    found = excitations(model, [inputs()])
    for site in found.sites:
        torch.testing.assert_close(seen[site.path].mean.double(), site.mean)
    with torch.no_grad():
        for module in inserted(model).values():
            module.conv.weight.zero_()
    folded = fold_se(model, [inputs()])
    report = folded.fold_report
    assert len(report.folded) == 2
    assert not has_se(folded)
    assert_same(folded, model)


@pytest.mark.parametrize("name", ["eca", "cbam", "static", "class"])
def test_what_is_for_se_alone_is_refused_plainly(name: str) -> None:
    model = learned(name)
    assert {skip.reason.rpartition(": ")[2] for skip in plan_fusion(model).skipped} <= {"SEAttention alone is fused"}
    with pytest.raises(RetrofitError, match="no native form"):
        from_native(model, Network())


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_source_of_a_built_in_attention_is_exported(name: str, tmp_path: Path) -> None:
    """Loaded and compared bit for bit by export itself."""
    export(learned(name), tmp_path / "network.py", example_inputs=inputs())


def test_the_source_of_a_users_class_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match=r"first\.se_attention is Gain 8"):
        export(learned("class"), tmp_path / "network.py", example_inputs=inputs())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", swept(EVERY_TIME, IN_SWEEPS))
def test_inspection_names_it_and_counts_its_costs(name: str) -> None:
    model = learned(name)
    found = inspect_se(model, inputs())
    report = found.report()
    word = "SE" if name == "se" else plan_of(model).what
    assert f"Network with {'Squeeze-and-Excitation' if name == 'se' else f'{word} modules'}" in str(report)
    for row, module in zip(report.rows, inserted(model).values(), strict=True):
        assert row.parameters == sum(p.numel() for p in module.parameters())
        assert row.squeeze_scale is not None
        passes = {"se": 2, "eca": 2, "static": 1, "cbam": 6}.get(name)
        assert passes is None or row.squeeze_scale == passes * 8 * 7 * 6 // 2
    excitation = {"se": 2 * 8 * 4, "eca": 3 * 8, "static": 0, "cbam": 2 * 2 * 8 * 4 + 2 * 49 * 42}.get(name)
    assert excitation is None or report.rows[0].excitation == excitation
    assert next(iter(inserted(model).values())).summary() in str(found.graph("first"))
