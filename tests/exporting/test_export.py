"""What is exported computes the same, and the source does so where this package is not installed."""

from __future__ import annotations

import re
import resource
import runpy
import signal
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import called
from networks import (
    NETWORKS,
    assert_same_function,
    assert_untouched,
    narrow_resnet,
    random_states,
    randomise_se,
    snapshot,
)
from sweeps import swept
from timm.models.resnet import BasicBlock
from torch import nn

from se_retrofit import RetrofitError, add_se, export, fold_se, save_retrofitted

# in one process, as PyTorch's compilers and exporters take seconds to import
pytestmark = pytest.mark.xdist_group("compilers")

SMALL = NETWORKS["torchvision/squeezenet1_1"]
X = SMALL.input()


def retrofitted(name: str = SMALL.name, **options: Any) -> nn.Module:
    return randomise_se(add_se(NETWORKS[name].build(), example_inputs=NETWORKS[name].input(), **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": "static"},
        {"gate": "sigmoid", "bias": True},
        {"name": "torchvision/resnet18", "placement": "pre"},
        {"name": "torchvision/googlenet", "include": "inception3a"},  # a function that hides its module
        pytest.param({"name": "timm/mobilenetv2_100"}, marks=pytest.mark.sweep),
    ],
)
def test_the_source_gives_equal_outputs_with_every_kind_of_gate(options: dict[str, Any], tmp_path: Path) -> None:
    model = retrofitted(**options)
    file = export(model, tmp_path / "net.py", example_inputs=X)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.py", "net.safetensors"]
    assert "se_retrofit" not in file.read_text()
    assert_same_function(runpy.run_path(str(file))["load"](), model, X)


def test_the_source_of_a_folded_network_and_of_one_whose_base_is_not_known(tmp_path: Path) -> None:
    model = retrofitted()
    folded = fold_se(model, [X], tolerance=100)
    assert "BLOCKS = {\n\n}" in export(folded, tmp_path / "a.py").read_text()
    model.classifier[1] = nn.Conv2d(512, 5, 1)  # no longer what its name builds
    text = export(model, tmp_path / "b.py", example_inputs=X).read_text()
    assert "def load(model: nn.Module)" in text


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_programs_compute_the_same_at_other_sizes(format: str, tmp_path: Path) -> None:
    model = randomise_se(add_se(narrow_resnet()))
    x, example = torch.randn(5, 3, 96, 64), torch.randn(2, 3, 64, 64)
    before, states = snapshot(model), list(random_states())
    file = export(model, tmp_path / f"net.{format}", dynamic="all", example_inputs=example)
    assert_untouched(model, before)
    assert list(random_states()) == states
    if format == "pt2":
        found = torch.export.load(file).module()(x)
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(str(file))
        (given,), (returned,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.shape) == ("images", ["batch", 3, "height", "width"])
        assert (returned.name, returned.shape) == ("logits", ["batch", 10])
        found = torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])
    torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-3)


class ByPairs(nn.Module):
    """Takes batches of an even size, which no exporter can leave open."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if len(x) == 1 else (x[::2] + x[1::2]).mean((2, 3))


OF_ONE_WIDTH = nn.Linear(16, 2)


@pytest.mark.parametrize(
    ("last", "wanted", "batch", "said"),
    [
        (OF_ONE_WIDTH, "all", 5, "net.pt2 has a dynamic batch size: all sizes dynamic failed with"),
        (ByPairs(), "batch", 1, r"net.pt2 has fixed sizes, \(1, 3, 16, 16\): a dynamic batch size failed with"),
        (OF_ONE_WIDTH, "batch", 5, ""),
        (OF_ONE_WIDTH, "none", 1, ""),
    ],
)
def test_a_size_that_cannot_be_dynamic_is_fixed_and_that_is_said(
    last: nn.Module, wanted: str, batch: int, said: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), last)
    file = export(model, tmp_path / "net.pt2", dynamic=wanted, example_inputs=torch.randn(1, 3, 16, 16))
    assert [bool(re.match(said, str(warning.message))) for warning in recwarn] == [True] * bool(said)
    program, x = torch.export.load(file).module(), torch.randn(batch, 3, 16, 16)
    torch.testing.assert_close(program(x), model(x))
    if batch == 1:
        with pytest.raises((AssertionError, RuntimeError)):
            program(torch.randn(2, 3, 16, 16))


def test_the_command_says_what_it_does_and_what_could_not_be_dynamic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(network: nn.Module, file: Path, *, dynamic: str, **options: Any) -> None:
        warnings.warn(f"{file.name} has fixed sizes: {dynamic} failed", stacklevel=2)

    monkeypatch.setattr("se_retrofit.exporting.export", failing)
    folder, file = save_retrofitted(retrofitted("timm/test_resnet"), tmp_path / "saved"), tmp_path / "net.onnx"
    result = called("export", folder, "--output", file, "--dynamic", "all")
    assert result.output.split("\n") == [
        f"writing {file} and comparing its outputs", "note: net.onnx has fixed sizes: all failed", f"wrote {file}", "",
    ]  # fmt: skip


def of_a_local_class() -> nn.Module:
    class Unit(BasicBlock):
        pass

    return add_se(nn.Sequential(nn.Conv2d(3, 8, 3), Unit(8, 8)), example_inputs=X)


@pytest.mark.parametrize(
    ("model", "file", "options", "error", "says"),
    [
        (retrofitted, "net.tf", {"format": "tf"}, RetrofitError, "one of 'onnx', 'pt2', 'source', got 'tf'"),
        (retrofitted, "net.tf", {}, RetrofitError, r"net.tf must end in one of .onnx, .pt2, .py"),
        (retrofitted, "net.txt", {"format": "source"}, RetrofitError, "must end in .py, got net.txt"),
        (retrofitted, "net.pt2", {"dynamic": "size"}, RetrofitError, "one of 'all', 'batch', 'none', got 'size'"),
        (retrofitted, "net.pt2", {"example_inputs": X[:, :1]}, RetrofitError, "give inputs that it takes.*1 channels"),
        (retrofitted, "net.py", {"example_inputs": X[:, :1]}, RetrofitError, "give inputs that it takes.*1 channels"),
        (of_a_local_class, "net.py", {}, RetrofitError, "can't be imported by another program"),
        (str, "net.onnx", {}, TypeError, r"model must be an nn\.Module, got .* of type str"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    model: Callable[[], Any], file: str, options: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        export(model(), tmp_path / file, **{"example_inputs": X, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", swept(["net.py"], ["net.pt2", "net.onnx"]))
def test_a_full_disk_leaves_no_file(file: str, tmp_path: Path) -> None:
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    model = retrofitted()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(RetrofitError, match=r"can't be written: .*File too large"):
            export(model, tmp_path / file, example_inputs=X)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


class Detector(nn.Module):
    """Takes a list of images or a batch, and returns for each as many boxes as it finds, the best if they are many."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = narrow_resnet()

    def forward(self, images: list[torch.Tensor] | torch.Tensor) -> list[dict[str, torch.Tensor]]:
        found = [scores[scores > 0] for scores in self.backbone(torch.stack(list(images)))]
        found = [scores.topk(3).values if scores.numel() > 3 else scores for scores in found]
        return [{"scores": scores, "boxes": scores[:, None].expand(-1, 4)} for scores in found]


@pytest.mark.parametrize(
    ("ending", "inputs"),
    [
        ("pt2", torch.randn(2, 3, 64, 64)),
        pytest.param("pt2", [torch.randn(3, 64, 64)] * 2, marks=pytest.mark.sweep),
        pytest.param("onnx", torch.randn(2, 3, 64, 64), marks=pytest.mark.sweep),
    ],
)
def test_a_detector_is_refused_in_three_lines_and_what_they_advise_works(
    ending: str, inputs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = randomise_se(add_se(Detector().eval(), example_inputs=(inputs,)))
    with pytest.raises(RetrofitError, match="Detector can't be exported as") as refused:
        export(model, tmp_path / f"net.{ending}", example_inputs=(inputs,))
    assert len(str(refused.value).splitlines()) == 3
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    source = runpy.run_path(str(export(model, tmp_path / "net.py", example_inputs=(inputs,))))
    again = source["load"](Detector())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(model(inputs), again(inputs), strict=True) for key in a)
    assert export(model.backbone, tmp_path / "backbone.pt2", example_inputs=torch.randn(1, 3, 64, 64)).exists()


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")  # onnxruntime's own
def test_int8_changes_a_network_with_se_hardly_more_than_a_plain_one(tmp_path: Path) -> None:
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = change_by_int8(narrow_resnet(), images, tmp_path)
    with_se = change_by_int8(randomise_se(add_se(narrow_resnet())), images, tmp_path)
    assert 0 < with_se < 2 * plain < 0.2


def change_by_int8(model: nn.Module, images: torch.Tensor, folder: Path) -> float:
    """How much static quantisation by onnxruntime changes the outputs, relative to their norm."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Calibration(CalibrationDataReader):
        left = iter([{"images": batch.numpy()} for batch in images.split(16)])

        def get_next(self) -> Any:
            return next(self.left, None)

    file = export(model, folder / "float.onnx", example_inputs=images[:2])
    quantize_static(file, folder / "int8.onnx", Calibration(), quant_format=QuantFormat.QDQ, per_channel=True)
    (found,) = onnxruntime.InferenceSession(folder / "int8.onnx").run(None, {"images": images.numpy()})
    wanted = model(images).detach()
    return float((torch.from_numpy(found) - wanted).norm() / wanted.norm())


def test_a_module_may_have_any_name_and_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    model = add_se(nn.Sequential(OrderedDict([("\N{GRINNING FACE}'s", narrow_resnet())])))
    assert export(model, tmp_path / "net.py").is_file()
    with pytest.raises(RetrofitError, match=r"net\.pt2 can't be written"):
        export(model, tmp_path / "net.py" / "net.pt2")
