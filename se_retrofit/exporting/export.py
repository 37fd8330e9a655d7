"""Write a network in a format that runs without this package, read it back and compare."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError, brief, check_module, check_values
from ..retrofit import has_se, plan_of
from ..saving.atomic import replaced_file
from ..surgery.record.copying import copied, in_mode
from ..surgery.record.inputs import Inputs, described_inputs, float_dtype, given_inputs, tensors_in
from ..surgery.record.isolation import forked_randomness
from ..surgery.record.runs import record
from .source import export_source

__all__ = ["FORMATS", "export"]

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "source": ".py"}
FORMATS = tuple(SUFFIXES)

Run = Callable[[tuple[Tensor, ...]], list[Tensor]]  # an exported network


def export(
    model: nn.Module,
    file: str | Path,
    *,
    format: str | None = None,
    example_inputs: Any = None,
) -> Path:
    """Export a network, retrofitted or folded, and check that the exported file computes the same.

    Args:
        model: the network; it is exported in eval mode, from a copy on the CPU.
        file: where to write.
        format: ``"onnx"`` (by torch.onnx, with dynamic batch and spatial sizes if the network allows it; compared by
            onnxruntime, if it is installed), ``"pt2"`` (torch.export, with dynamic sizes as well), or ``"source"``: a Python
            file with the changed classes and SE in plain PyTorch, which loads the weights from a ``.safetensors`` file of
            the same name beside it and needs PyTorch, safetensors and the network's own library only; where it is not known how
            the bare network is built (``save_retrofitted`` says when it is), ``load`` in the file takes that as an argument.
            Without it, the format that the ending of ``file`` stands for: ``.onnx``, ``.pt2`` or ``.py``.
        example_inputs: a tensor or a tuple of positional inputs, large enough that no feature map has a size of one,
            which torch.export would specialise. Without it, inputs with the shapes that the network was retrofitted
            with, or of a size that fits.

    Returns:
        The file.

    Raises:
        RetrofitError: the format or the ending is none of these, or the format can't represent this network (the message has the reason); the
            result does not compute the same. No file is written then.
        TypeError: ``model`` is not an nn.Module.

    Example:
        >>> import tempfile, timm, torch
        >>> from se_retrofit import add_se
        >>> from se_retrofit.exporting import export
        >>> model = add_se(timm.create_model("resnet10t", num_classes=10)).eval()
        >>> file = export(model, tempfile.mkdtemp() + "/model.pt2", example_inputs=torch.randn(2, 3, 64, 64))
        >>> torch.export.load(file).module()(torch.randn(5, 3, 64, 64)).shape
        torch.Size([5, 10])
    """
    check_module(model)
    check_values(model)
    file = Path(file)
    format = _format_of(file) if format is None else format
    if format not in SUFFIXES:
        raise RetrofitError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {brief(format)}")
    with forked_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on formats
        copy = in_mode(copied(model, lambda t: t.detach().to("cpu", copy=True)), False)
        inputs = _example(copy, example_inputs)
        if format == "source":
            return export_source(model, copy, file, inputs)
        write = {"onnx": _to_onnx, "pt2": _to_pt2}[format]
        with replaced_file(file) as fresh:
            try:
                with torch.no_grad():
                    run = write(copy, inputs, fresh)
            except RetrofitError:
                raise
            except Exception as error:  # of every kind, from the exporters
                first = (str(error).strip().splitlines() or [""])[0]
                raise RetrofitError(
                    f"{type(model).__name__} can't be exported as {format}: {type(error).__name__}: {first}"
                ) from error
            _compare(copy, run, inputs, format)
    return file


def _format_of(file: Path) -> str:
    for format, suffix in SUFFIXES.items():
        if file.suffix == suffix:
            return format
    endings = ", ".join(SUFFIXES.values())
    raise RetrofitError(f"{file.name} must end in one of {endings}, which tells the format; or say which with format=")


def _example(model: nn.Module, example_inputs: Any) -> tuple[Tensor, ...]:
    """Tensors with values, at least two in a batch: an exporter takes a size of one for a constant."""
    inputs: Inputs | None = None
    if example_inputs is not None:
        inputs = given_inputs(example_inputs)
    elif has_se(model):
        inputs = described_inputs(plan_of(model).inputs, model)
    if inputs is None or inputs.is_meta:
        inputs = record(model, inputs).inputs.with_values(torch.Generator().manual_seed(0))
    if inputs.kwargs or not all(isinstance(a, Tensor) for a in inputs.args):
        raise RetrofitError(
            "only networks that take tensors as positional inputs can be exported; pass such example_inputs"
        )
    dtype = float_dtype(model)
    tensors = (t.detach().cpu() for t in inputs.args)
    typed = (t.to(dtype) if t.is_floating_point() else t for t in tensors)
    return tuple(torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t for t in typed)


def _free(inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """All sizes but that of the channels may change, as far as the network allows it."""
    auto = torch.export.Dim.AUTO
    return tuple({d: auto for d in range(t.dim()) if d != 1} for t in inputs)


def _to_onnx(model: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> Run | None:
    program = torch.onnx.export(
        model, inputs, dynamo=True, verbose=False, dynamic_shapes=_free(inputs), external_data=False
    )
    assert program is not None
    program.save(str(file))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(given: tuple[Tensor, ...]) -> list[Tensor]:
        arrays = {name: t.numpy() for name, t in zip(names, given, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, arrays)]

    return run


def _to_pt2(model: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> Run:
    torch.export.save(torch.export.export(model, inputs, dynamic_shapes=_free(inputs)), str(file))
    module = torch.export.load(str(file)).module()
    return lambda given: tensors_in(module(*given))


def _compare(model: nn.Module, run: Run | None, inputs: tuple[Tensor, ...], format: str) -> None:
    if run is None:
        return
    with torch.no_grad():
        wanted, got = tensors_in(model(*inputs)), run(inputs)
    tolerance = 1e-3 if format == "onnx" else 1e-4
    close = len(got) == len(wanted) and all(
        a.shape == b.shape and float((a.double() - b.double()).norm()) <= tolerance * (1e-6 + float(b.double().norm()))
        for a, b in zip(got, wanted, strict=True)
    )
    if not close:
        raise RetrofitError(f"the {format} export does not compute what the network computes")
