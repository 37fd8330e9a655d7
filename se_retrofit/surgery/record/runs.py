"""Records of a model in eval and train mode, from runs of a copy. The model itself is not changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import RetrofitError, check_module
from .copying import copied, in_mode, on_cpu, on_its_device, on_meta
from .facts import read
from .graph import Record
from .inputs import Inputs, candidate_inputs, given_inputs
from .isolation import isolated, without_collections
from .meta import MetaOperations
from .recorder import NeedsValues, record_run


def record(model: nn.Module, example_inputs: Any = None) -> Record:
    """Run a copy of a model once, in eval mode, and record it as a ``torch.fx.Graph``.

    Unlike ``torch.fx.symbolic_trace``, it works with any model, because Python runs as it is.

    Args:
        model: any module; it is not changed.
        example_inputs: as for ``add_se``.

    Returns:
        The record: ``record.graph`` is the ``torch.fx.Graph``, ``record.ops`` is what is known of each of its nodes.

    Raises:
        RetrofitError: If the model can't be copied, or run on the inputs.
        TypeError: If ``model`` is not an nn.Module, or the inputs hold no tensor.

    Example:
        >>> import timm
        >>> from se_retrofit import record
        >>> graph = record(timm.create_model("resnet18")).graph
        >>> [node.name for node in graph.nodes][:5]
        ['input_1', 'conv1', 'bn1', 'act1', 'maxpool']
    """
    check_module(model)
    with isolated(model) as clean, _disable_current_modes(), without_collections():
        return read(Runs.find(model, example_inputs, clean, training=False).evaluation)


def misfit(model: nn.Module, given: Inputs, error: str | None) -> RetrofitError:
    """Return the error for inputs of the caller that a model does not take."""
    return RetrofitError(
        f"{type(model).__name__} can't be run on the given example_inputs, of shape {given.shapes}; give inputs that it "
        f"takes. Its forward raised {error}"
    )


_WITH_VALUES = 2  # number of inputs that failed on meta to retry with values


@dataclass(eq=False)
class Runs:
    """The records of a model in eval and train mode, and what is needed to repeat them."""

    model: nn.Module
    inputs: Inputs
    convert: Callable[[torch.Tensor], torch.Tensor]
    clean: Callable[[], None]
    evaluation: Record
    training: Record | None
    on_meta: MetaOperations

    @classmethod
    def find(cls, model: nn.Module, example_inputs: Any, clean: Callable[[], None], training: bool = True) -> Runs:
        """Record a model on the given inputs, or on the first that work: on meta, or, if the run needs values or fails
        in any other way (as a scripted function may on meta), on a copy with values, on the CPU or else on the model's
        device. ``clean`` restores what a run has changed outside the copy."""
        first_error: str | None = None
        failed: list[Inputs] = []
        given = None if example_inputs is None else given_inputs(example_inputs)

        def with_values(inputs: Inputs) -> Runs:
            # a single one of our own images is enough, and slow enough
            values = (inputs.of_one() if given is None else inputs).with_values(torch.Generator().manual_seed(0))
            runs = cls._on(model, values, inputs, on_cpu, clean, training)
            device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
            if runs.evaluation.broke_off is None or device.type in ("cpu", "meta"):
                return runs
            # kernels of its own may run only where the network is
            there = copied(values, lambda tensor: tensor.to(device, copy=True))
            own = cls._on(model, there, inputs, on_its_device, clean, training)
            return runs if own.evaluation.broke_off is not None else own

        for inputs in candidate_inputs(model) if given is None else [given]:
            try:
                runs = cls._on(model, copied(inputs, on_meta), inputs, on_meta, clean, training)
            except NeedsValues:
                runs = with_values(inputs)
            else:
                failed.append(inputs)
            if runs.evaluation.broke_off is None:
                return runs
            first_error = first_error or runs.evaluation.broke_off
        for index, inputs in enumerate(failed[:_WITH_VALUES]):
            runs = with_values(inputs)
            if runs.evaluation.broke_off is None:
                return runs
            first_error = runs.evaluation.broke_off if index == 0 else first_error
        name = type(model).__name__
        if first_error is None:
            raise RetrofitError(
                f"{name} has no convolution among its modules, so the shape of its input is not known, and most likely there is "
                "nothing to retrofit; if it convolves with a function (as an exported program does), give example_inputs"
            )
        if given is not None:
            raise misfit(model, given, first_error)
        raise RetrofitError(
            f"{name} can't be run on any input that was tried; give add_se(..., example_inputs=...) a tensor (or a tuple of "
            f"positional inputs, or a dict of keyword inputs) of the right shape. On the first one tried its forward raised {first_error}"
        )

    @classmethod
    def _on(
        cls, model: nn.Module, run: Inputs, inputs: Inputs, convert: Any, clean: Callable[[], None], training: bool
    ) -> Runs:
        clean()
        copy, known = copied(model, convert, independent=True), MetaOperations()
        evaluation, trained = _recorded(copy, run, known, False), None
        if training and evaluation.broke_off is None:
            trained = _recorded(copy, run, known, True)
            if trained.broke_off is not None:  # it may not run on these inputs: a detector needs targets
                trained = None
        return cls(model, inputs, convert, clean, evaluation, trained, known)

    def again(self, prepare: Callable[[nn.Module], None], training: bool = True) -> tuple[Record, Record | None]:
        """Repeat the runs with a new copy changed by ``prepare``; in train mode, too, if the original runs in it."""
        copy = copied(self.model, self.convert, independent=True)
        prepare(copy)
        self.clean()
        repeat = partial(_recorded, copy, self.evaluation.inputs, self.on_meta, traced=False)
        return repeat(training=False), repeat(training=True) if training and self.training is not None else None


def _recorded(copy: nn.Module, inputs: Inputs, on_meta: MetaOperations, training: bool, traced: bool = True) -> Record:
    with torch.set_grad_enabled(training):
        return record_run(in_mode(copy, training), inputs, on_meta, traced=traced)
