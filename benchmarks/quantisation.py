"""What int8 costs with and without SE: fine-tuned networks, quantised by tools that people use.

For each network and data set: a plain network and one with SE, trained equally long from the same base. Each is exported, quantised after training with 256 training images for calibration, and run. The tools:

- onnxruntime: ``quantize_static`` on the ONNX file, QDQ, per channel;
- NNCF: ``nncf.quantize`` on the same file in OpenVINO, run by OpenVINO;
- torchao: pt2e with the quantiser for x86 CPUs, on the program that ``torch.export`` gives.

Prints a Markdown table; a tool that is not installed is left out, and named.

    pip install onnxruntime nncf openvino torchao
    python benchmarks/quantisation.py --epochs 6
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from small_networks import NETWORKS, TASKS, accuracy, fine_tuned
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from se_retrofit import export

CALIBRATION = 256  # training images

Run = Callable[[Tensor], Tensor]


def batches(data: TensorDataset) -> Iterator[Tensor]:
    yield from data.tensors[0][:CALIBRATION].split(32)


def with_onnxruntime(model: nn.Module, data: TensorDataset, folder: Path) -> Run:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Calibration(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = ({name: images.numpy()} for images in batches(data))

        def get_next(self) -> Any:
            return next(self.left, None)

    file = export(model, folder / "float.onnx", example_inputs=data.tensors[0][:2])
    name = onnxruntime.InferenceSession(file).get_inputs()[0].name
    quant_pre_process(file, folder / "prepared.onnx", skip_symbolic_shape=True)
    files = folder / "prepared.onnx", folder / "int8.onnx"
    quantize_static(*files, Calibration(name), quant_format=QuantFormat.QDQ, per_channel=True)
    session = onnxruntime.InferenceSession(folder / "int8.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def with_nncf(model: nn.Module, data: TensorDataset, folder: Path) -> Run:
    import nncf
    import openvino

    file = export(model, folder / "float.onnx", example_inputs=data.tensors[0][:2])
    calibration = nncf.Dataset(list(batches(data)), lambda images: images.numpy())
    quantised = nncf.quantize(openvino.Core().read_model(file), calibration, subset_size=len(list(batches(data))))
    compiled = openvino.Core().compile_model(quantised, "CPU")
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0])


def with_torchao(model: nn.Module, data: TensorDataset, folder: Path) -> Run:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    free = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (data.tensors[0][:2],), dynamic_shapes=free).module()
    quantiser = X86InductorQuantizer()
    quantiser.set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(program, quantiser)
    for images in batches(data):
        prepared(images)
    return move_exported_model_to_eval(convert_pt2e(prepared))


TOOLS = {"onnxruntime": with_onnxruntime, "nncf": with_nncf, "torchao": with_torchao}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=6, help="of the base, and of each fine-tune")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    arguments = parser.parse_args()
    tools = [tool for tool in arguments.tools if importlib.util.find_spec(tool) is not None]
    print("not installed:", ", ".join(set(arguments.tools) - set(tools)) or "none")
    print(
        f"\n| data | network | form | float | {' | '.join(tools)} |\n| --- | --- | --- | --- |{' --- |' * len(tools)}"
    )
    for task in arguments.tasks:
        data, test = TASKS[task]()
        for network in arguments.networks:
            plain, retrofitted = fine_tuned(network, data, arguments.epochs)
            for form, model in (("plain", plain), ("SE", retrofitted)):
                before = accuracy(model, test)
                cells = [difference(before, model, data, test, tool) for tool in tools]
                print(f"| {task} | {network} | {form} | {before:.2%} | {' | '.join(cells)} |", flush=True)


def difference(before: float, model: nn.Module, data: TensorDataset, test: TensorDataset, tool: str) -> str:
    """What becomes of the accuracy, in points."""
    # the tools leave files in the working directory
    with tempfile.TemporaryDirectory() as folder, chdir(folder), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = TOOLS[tool](model, data, Path(folder))
        except Exception as error:  # the tools raise what they like
            return f"{type(error).__name__}"
        return f"{100 * (accuracy(run, test) - before):+.2f}"


if __name__ == "__main__":
    main()
