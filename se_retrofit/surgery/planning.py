"""From a model to the edits that retrofit it, each of them seen to be right on a copy. The model itself is not touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .blocks import Place, find_places
from .fitting import Fitting, SurgerySite
from .inputs import Inputs
from .isolation import isolated, without_collections
from .methods import forget_methods
from .operations import read
from .record import Record
from .runs import Runs

__all__ = ["Surgery", "plan_surgery"]


@dataclass(eq=False)
class Surgery:
    """What is to be done to a model: the sites, and the blocks that are skipped, with the reasons."""

    inputs: Inputs
    record: Record
    sites: list[SurgerySite]
    skipped: dict[str, str]
    attended: int  # blocks that have channel attention already


Choose = Callable[[list[Place], dict[str, str]], list[Place]]


def plan_surgery(model: nn.Module, placement: str, example_inputs: Any, choose: Choose) -> Surgery:
    """Find out what is to be done to retrofit a model.

    Args:
        model: it is not touched.
        placement: one of ``PLACEMENTS``.
        example_inputs: see ``given_inputs``; None for inputs that the model may take.
        choose: which of the places that were found are wanted; the blocks of the others are put into the dict, with the
            reason.

    Raises:
        RetrofitError: the model can't be copied, or run on the inputs.
    """
    forget_methods()
    with isolated(model) as clean, _disable_current_modes(), without_collections():
        runs = Runs.find(model, example_inputs, clean)
        found = find_places(read(runs.evaluation), placement)
        skipped = dict(found.skipped)
        places = choose(found.places, skipped)
        training = find_places(read(runs.training), placement).places if runs.training is not None else []
        sites = Fitting(runs, places, training, skipped).sites()
    return Surgery(runs.inputs, runs.evaluation, sites, skipped, found.attended)
