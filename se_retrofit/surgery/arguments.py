"""The arguments that the functions of the retrofit accept: models and options."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..attention import check_attention, check_options, name_of
from ..errors import RetrofitError, brief, check_choice, check_flag, check_module, check_unwrapped
from ..plan import Plan
from .blocks.placements import PLACEMENTS
from .record.inputs import given_inputs
from .splice.undo import is_retrofitted

Patterns = str | Iterable[str] | None


def _check_model(model: Any) -> None:
    check_module(model)
    check_unwrapped(model)
    # importing it takes seconds; if the model is of one of its classes, it is already imported
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise RetrofitError(
            f"the model is scripted or traced by torch.jit ({type(model).__name__}): retrofit the Python model, then script it"
        )
    for path, module in model.named_modules():
        if fsdp is not None and isinstance(module, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)):
            raise RetrofitError("the model is sharded by FSDP: retrofit it first, then shard it")
        if is_retrofitted(module):
            raise RetrofitError(
                "the model has been retrofitted already: undo with remove_se(model) first, to retrofit it in another way"
            )
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_complex():
                raise RetrofitError(
                    f"the model computes with complex numbers (parameter {name} of {path or 'the model'} is of dtype "
                    f"{parameter.dtype}), for which SE's sigmoid gate is not defined"
                )


@dataclass(frozen=True)
class Options:
    """The options of a retrofit, as given by the caller."""

    reduction: Any = 8
    placement: Any = "auto"
    gate: Any = "identity"
    bias: Any = False
    min_hidden: Any = 4
    include: Any = None
    exclude: Any = None
    attention: Any = "se"
    at: Any = None
    auto: Any = None
    recognisers: Any = ()

    @classmethod
    def of(cls, plan: Plan) -> Options:
        """Return the options of a plan, which may be broken."""
        try:
            options = cls(**{**plan.options, "recognisers": ()})
            options.check()
        except TypeError as error:
            raise RetrofitError(f"the options of the plan are broken: {error}") from None
        return options

    def noted(self) -> dict[str, Any]:
        """Return the options in the form that a plan stores."""
        patterns = {name: patterns_of(name, getattr(self, name)) or None for name in ("include", "exclude", "at")}
        return {**vars(self), **patterns, "recognisers": [name_of(find) for find in self.recognisers]}

    def check(self) -> None:
        if isinstance(self.reduction, (torch.Tensor, tuple, list, dict)):
            raise TypeError(
                f"reduction must be a positive int, got {brief(self.reduction)}; inputs are given by name: example_inputs=..."
            )
        check_attention(self.attention)
        include, _, at = (patterns_of(name, getattr(self, name)) for name in ("include", "exclude", "at"))
        if self.auto is not None and not isinstance(self.auto, bool):
            raise TypeError(f"auto must be True, False or None, got {brief(self.auto)}")
        for name, what, patterns in (("include", "blocks", include), ("at", "modules", at)):
            if getattr(self, name) is not None and not patterns:
                raise RetrofitError(f"{name} is empty; name {what}, or leave it out")
        if self.auto is False and not at:
            raise RetrofitError("auto=False leaves nothing to retrofit unless at names modules")
        if at and not self.auto and self.placement != "auto":
            raise RetrofitError(f"placement={brief(self.placement)} is for blocks found; with at, give auto=True, too")
        if not isinstance(self.recognisers, (list, tuple)) or not all(map(callable, self.recognisers)):
            raise TypeError(f"recognisers must be a list of functions, got {brief(self.recognisers)}")
        if self.attention != "se" and self.gate == "sigmoid":
            raise RetrofitError('gate="sigmoid" is SE\'s alone (attention="se"); others start as an identity')
        check_options(self.reduction, self.gate, self.bias, self.min_hidden)
        check_choice("placement", self.placement, PLACEMENTS)


def check_arguments(model: Any, options: Options, example_inputs: Any, plan: Any = None, inplace: Any = False) -> None:
    if plan is not None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be what plan_se returns, got {type(plan).__name__}")
        if replace(options, attention="se", recognisers=()) != Options():
            raise RetrofitError("a plan brings its own options; give plan= alone, or make a new plan with plan_se(...)")
    _check_model(model)
    options.check()
    check_flag("inplace", inplace)
    if example_inputs is not None:
        given_inputs(example_inputs)


def patterns_of(name: str, patterns: Patterns) -> list[str]:
    if patterns is None:
        return []
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, (list, tuple, set)) or not all(isinstance(p, str) for p in several):
        raise TypeError(f"{name} must be a pattern of paths or a list of them, got {brief(patterns)}")
    return list(several)
