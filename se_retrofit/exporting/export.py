"""Writing a network in a format that runs without this package, and comparing the outputs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RetrofitError, check_choice, check_module
from ..retrofit import has_se, plan_of
from ..saving.atomic import replaced_file
from ..surgery.record.copying import check_values, copied, in_mode
from ..surgery.record.inputs import Inputs, described_inputs, given_inputs, in_dtype_of, tensors_in
from ..surgery.record.isolation import forked_randomness
from ..surgery.record.runs import misfit, record
from .images import metadata_of
from .source import export_source

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "source": ".py"}
FORMATS = tuple(SUFFIXES)
# which sizes of the inputs may change, most first: if the network does not allow one, the next is tried
DYNAMIC = {"all": "all sizes dynamic", "batch": "a dynamic batch size", "none": "fixed sizes"}
METADATA = "metadata.json"  # the name of the file in a .pt2

Tensors = tuple[Tensor, ...]
Run = Callable[[Tensors], list[Tensor]]  # an exported network


def export(
    model: nn.Module,
    file: str | Path,
    *,
    format: str | None = None,
    dynamic: str = "batch",
    example_inputs: Any = None,
) -> Path:
    """Export a network, retrofitted or folded, and check that the exported file computes the same.

    docs/folding.md describes what the files of each format hold and need.

    Args:
        model: the network; it is exported in eval mode, from a copy on the CPU.
        file: the file to write.
        format: ``"onnx"`` (checked by onnxruntime, if it is installed), ``"pt2"`` (torch.export) or ``"source"``, a
            Python file with weights of the same name beside it. Default by suffix: ``.onnx``, ``.pt2`` or ``.py``.
        dynamic: which input sizes the exported program accepts: ``"batch"``, any batch size; ``"all"``, any height and
            width, too, which can take minutes; ``"none"``, only those of the example.
        example_inputs: a tensor or a tuple of positional inputs (for the source, any inputs of the network), large
            enough that no feature map has a size of one. By default, one image of the size that the network was
            fine-tuned on, or one input of the shape that it was retrofitted with.

    Raises:
        RetrofitError: If the format can't represent this network, or the outputs differ. No file is written.
        TypeError: If ``model`` is not an nn.Module, or ``format`` or ``dynamic`` is not a string.

    Warns:
        UserWarning: If fewer sizes are dynamic than requested, with the reason.

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
    check_values(model.named_parameters())
    file = Path(file)
    format = _format_of(file, format)
    check_choice("dynamic", dynamic, DYNAMIC)
    with forked_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on formats
        copy = in_mode(copied(model, lambda t: t.detach().to("cpu", copy=True)), False)
        inputs = _example(copy, example_inputs)
        if format == "source":
            return export_source(model, copy, file, inputs)
        if inputs.kwargs or not all(isinstance(a, Tensor) for a in inputs.args):
            raise _refusal(copy, format, "such a program takes tensors as positional inputs alone")
        with replaced_file(file) as fresh:
            done, reason = _write(copy, inputs.args, format, dynamic, fresh)
    if done != dynamic:
        sizes = ", ".join(str(tuple(t.shape)) for t in inputs.args)
        only = f"{DYNAMIC[done]}, {sizes}" if done == "none" else DYNAMIC[done]
        warnings.warn(f"{file.name} has {only}: {DYNAMIC[dynamic]} failed with {reason}", stacklevel=2)
    return file


def _refusal(model: nn.Module, format: str, reason: str) -> RetrofitError:
    return RetrofitError(
        f"{type(model).__name__} can't be exported as {format}: {reason}.\n"
        "Its source can, where its classes can be imported: plain PyTorch, by format='source' (--format source).\n"
        f"Or export the part that takes and returns tensors, such as a detector's backbone: export(model.backbone, 'net{SUFFIXES[format]}')."
    )


def _format_of(file: Path, format: str | None) -> str:
    if format is not None:
        check_choice("format", format, SUFFIXES)
        return format
    for known, suffix in SUFFIXES.items():
        if file.suffix == suffix:
            return known
    endings = ", ".join(SUFFIXES.values())
    raise RetrofitError(f"{file.name} must end in one of {endings}, which tells the format; or say which with format=")


def _example(model: nn.Module, example_inputs: Any) -> Inputs:
    """Return inputs with values, on the CPU: the given ones, or a batch of one."""
    inputs: Inputs | None = None
    if example_inputs is not None:
        inputs = given_inputs(example_inputs)
    elif size := metadata_of(model).get("input_size"):
        inputs = Inputs((torch.empty(1, *size, device="meta"),))
    elif has_se(model):
        inputs = described_inputs(plan_of(model).inputs, model)
    if inputs is None or inputs.is_meta:
        found = record(model, inputs).inputs
        inputs = (found if example_inputs is not None else found.of_one()).with_values(torch.Generator().manual_seed(0))
    on_cpu = in_dtype_of(model, copied(inputs, lambda t: t.detach().to("cpu")), None)
    if example_inputs is not None:
        run = copied(on_cpu)  # a forward may write into its containers
        try:
            with torch.no_grad():
                model(*run.args, **run.kwargs)
        except Exception as error:  # of the network's own code
            raise misfit(model, on_cpu, f"{type(error).__name__}: {error}") from error
    return on_cpu


def _write(model: nn.Module, inputs: Tensors, format: str, dynamic: str, file: Path) -> tuple[str, str]:
    """Write and compare with the most dynamic sizes that work; return these, and why more dynamic ones failed."""
    write = {"onnx": _to_onnx, "pt2": _to_pt2}[format]
    # exporters treat a size of one as a constant
    two = tuple(torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t for t in inputs)
    three = tuple(torch.cat([t, t[:1]]) if t.dim() else t for t in two)
    failures: list[str] = []
    for wanted in list(DYNAMIC)[list(DYNAMIC).index(dynamic) :]:
        example, others = (inputs, ()) if wanted == "none" else (two, (three,))
        try:
            # torch.export prints its graph to stderr when it fails
            with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
                run = write(model, example, _dynamic_shapes(example, wanted), file)
                if run is not None:
                    for given in (example, *others):
                        _compare(model, run, given, format)
            return wanted, next(iter(failures), "")
        except Exception as error:  # exporters raise errors of all kinds
            if isinstance(error, OSError) and error.errno is not None:
                raise
            while error.__cause__ is not None:  # torch.onnx wraps torch.export's error
                error = error.__cause__  # type: ignore[assignment]
            first = (str(error).strip().splitlines() or [""])[0]
            failures.append(f"{type(error).__name__}: {first[:300]}")
    raise _refusal(model, format, failures[-1])


def _dynamic_shapes(inputs: Tensors, dynamic: str) -> tuple[dict[int, str], ...]:
    """Return the names of the sizes that may change, which do not include the number of channels."""

    def named(dims: int) -> dict[int, str]:
        space = ("height", "width") if dims == 4 else tuple(f"size_{d}" for d in range(2, dims))
        names = {"all": ("batch", "", *space), "batch": ("batch",), "none": ()}[dynamic]
        return {d: name for d, name in enumerate(names[:dims]) if name}

    return tuple(named(t.dim()) for t in inputs)


def _named(model: nn.Module, inputs: Tensors) -> dict[str, Any]:
    """Return the names of an image classifier's inputs and outputs; other networks keep torch's names."""
    outputs = tensors_in(model(*inputs))
    named = {}
    if len(inputs) == 1 and inputs[0].dim() == 4:
        named["input_names"] = ["images"]
    if len(outputs) == 1 and outputs[0].dim() == 2:
        named["output_names"] = ["logits"]
    return named


def _to_onnx(model: nn.Module, inputs: Tensors, dynamic: tuple[dict[int, str], ...], file: Path) -> Run | None:
    program = torch.onnx.export(
        model, inputs, dynamo=True, verbose=False, dynamic_shapes=dynamic, external_data=False, **_named(model, inputs)
    )  # fmt: skip
    assert program is not None
    for name, value in metadata_of(model).items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    program.save(str(file))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(given: Tensors) -> list[Tensor]:
        arrays = {name: t.numpy() for name, t in zip(names, given, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, arrays)]

    return run


def _to_pt2(model: nn.Module, inputs: Tensors, dynamic: tuple[dict[int, str], ...], file: Path) -> Run:
    shapes = tuple(dict.fromkeys(names, torch.export.Dim.DYNAMIC) for names in dynamic)
    metadata = json.dumps({**metadata_of(model), **_named(model, inputs)})
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    written = io.BytesIO()  # torch's own writer aborts on a full disk
    torch.export.save(program, written, extra_files={METADATA: metadata})
    file.write_bytes(written.getvalue())
    module = torch.export.load(str(file)).module()
    return lambda given: tensors_in(module(*given))


def _compare(model: nn.Module, run: Run, inputs: Tensors, format: str) -> None:
    wanted, got = tensors_in(model(*inputs)), run(inputs)
    tolerance = 1e-3 if format == "onnx" else 1e-4
    close = len(got) == len(wanted) and all(
        a.shape == b.shape and float((a.double() - b.double()).norm()) <= tolerance * (1e-6 + float(b.double().norm()))
        for a, b in zip(got, wanted, strict=True)
    )
    if not close:
        raise RetrofitError(f"the {format} export does not compute what the network computes")
