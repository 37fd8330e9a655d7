"""A model's records in eval and in train mode, of runs on a copy of it. The model itself is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from ...errors import RetrofitError
from ..splice.undo import strip
from .copying import copied, in_mode, on_cpu, on_meta
from .facts import read
from .graph import Record
from .inputs import Inputs, candidate_inputs, given_inputs
from .isolation import isolated, without_collections
from .meta import MetaOperations
from .recorder import NeedsValues, record_run

__all__ = ["Runs", "record"]


def record(model: nn.Module, example_inputs: Any = None, *, without_se: bool = False) -> Record:
    """Run a copy of a model once, in eval mode, and record it as a ``torch.fx.Graph``.

    Unlike ``torch.fx.symbolic_trace`` it takes any model, since Python runs as it is.

    Args:
        model: any module; it is not touched.
        example_inputs: as for ``add_se``.
        without_se: record the network that a retrofitted one was before.

    Returns:
        The record: ``record.graph``, the ``torch.fx.Graph``; ``record.ops``, what is known of each of its nodes.

    Raises:
        RetrofitError: the model can't be copied, or run on the inputs.

    Example:
        >>> import timm
        >>> from se_retrofit import record
        >>> graph = record(timm.create_model("resnet18")).graph
        >>> [node.name for node in graph.nodes][:5]
        ['input_1', 'conv1', 'bn1', 'act1', 'maxpool']
    """
    with isolated(model) as clean, _disable_current_modes(), without_collections():
        if without_se:
            described = isinstance(example_inputs, Inputs) and example_inputs.is_meta
            model = copied(model, on_meta if described else on_cpu, independent=True)
            strip(model)
        return read(Runs.find(model, example_inputs, clean, evaluation_only=True).evaluation)


_WITH_VALUES = 2  # of the inputs that failed on meta, so many are tried with values


@dataclass(eq=False)
class Runs:
    """The records of a model in eval and in train mode, and what it takes to make others like them."""

    model: nn.Module
    inputs: Inputs
    convert: Callable[[torch.Tensor], torch.Tensor]
    clean: Callable[[], None]
    evaluation: Record
    training: Record | None = None
    on_meta: MetaOperations = field(default_factory=MetaOperations)

    @classmethod
    def find(
        cls, model: nn.Module, example_inputs: Any, clean: Callable[[], None], evaluation_only: bool = False
    ) -> Runs:
        """Record a model on the inputs given, or on the first that go through: on meta, or where the run asks for values or fails
        in any other way (as a scripted function may on meta), on a copy that has them. ``clean`` puts back what a run has left
        outside of the copy."""
        first_error: str | None = None
        failed: list[Inputs] = []
        copy = copied(model, on_meta, independent=True)
        given = example_inputs is not None
        candidates: Iterator[Inputs] = iter([given_inputs(example_inputs)]) if given else candidate_inputs(copy)
        for tried, inputs in enumerate(candidates):
            try:
                copy = copied(model, on_meta, independent=True) if tried == 1 else copy
                runs = cls._run(model, copy, inputs.on_meta(), inputs, on_meta, clean, evaluation_only)
            except NeedsValues:
                runs = cls._with_values(model, inputs, given, clean, evaluation_only)
            else:
                failed.append(inputs)
            if runs.evaluation.broke_off is None:
                return runs
            first_error = first_error or runs.evaluation.broke_off
        for index, inputs in enumerate(failed[:_WITH_VALUES]):
            runs = cls._with_values(model, inputs, given, clean, evaluation_only)
            if runs.evaluation.broke_off is None:
                return runs
            first_error = runs.evaluation.broke_off if index == 0 else first_error
        name = type(model).__name__
        if first_error is None:
            raise RetrofitError(f"{name} has no convolution, so there is nothing to retrofit")
        if given:
            raise RetrofitError(
                f"{name} can't be run on the given example_inputs, of shape "
                f"{given_inputs(example_inputs).shapes}; give inputs that it takes. Its forward raised {first_error}"
            )
        raise RetrofitError(
            f"{name} can't be run on any input that was tried; give add_se(..., example_inputs=...) a tensor (or a tuple of "
            f"positional inputs, or a dict of keyword inputs) of the right shape. On the first one tried its forward raised {first_error}"
        )

    @classmethod
    def _with_values(
        cls, model: nn.Module, inputs: Inputs, given: bool, clean: Callable[[], None], evaluation_only: bool
    ) -> Runs:
        # one image of those that we made up is enough, and is as slow as it has to be
        values = (inputs if given else inputs.of_one()).with_values(torch.Generator().manual_seed(0))
        return cls._run(model, copied(model, on_cpu, independent=True), values, inputs, on_cpu, clean, evaluation_only)

    @classmethod
    def _run(
        cls, model: nn.Module, copy: nn.Module, inputs: Inputs, given: Inputs, convert: Any, clean: Callable[[], None],
        evaluation_only: bool,
    ) -> Runs:  # fmt: skip
        clean()
        on_meta = MetaOperations()
        runs = cls(model, given, convert, clean, _evaluated(copy, inputs, on_meta), on_meta=on_meta)
        if not evaluation_only and runs.evaluation.broke_off is None:
            training = _trained(copy, inputs, on_meta)
            if training.broke_off is None:  # on these inputs it may not: a detector wants targets
                runs.training = training
        return runs

    def again(self, prepare: Callable[[nn.Module], None], training: bool = True) -> tuple[Record, Record | None]:
        """The same runs of a new copy that ``prepare`` has changed; in train mode, too, if the original runs in it."""
        copy = copied(self.model, self.convert, independent=True)
        prepare(copy)
        self.clean()
        inputs = self.evaluation.inputs
        evaluation = _evaluated(copy, inputs, self.on_meta, traced=False)
        if self.training is None or not training:
            return evaluation, None
        return evaluation, _trained(copy, inputs, self.on_meta, traced=False)


def _evaluated(copy: nn.Module, inputs: Inputs, on_meta: MetaOperations, traced: bool = True) -> Record:
    with torch.no_grad():
        return record_run(in_mode(copy, False), inputs, on_meta, traced=traced)


def _trained(copy: nn.Module, inputs: Inputs, on_meta: MetaOperations, traced: bool = True) -> Record:
    with torch.enable_grad():
        return record_run(in_mode(copy, True), inputs, on_meta, traced=traced)
