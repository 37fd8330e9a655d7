"""Convolutional blocks of all fields are recognised by what they compute: each structure has the plan that an expert would write."""

from __future__ import annotations

import copy

import block_networks  # noqa: F401
import image_networks  # noqa: F401
import layer_networks  # noqa: F401
import pytest
import signal_networks  # noqa: F401
import torch
from networks import randomised
from numeric import check_promises
from structure import STRUCTURES, Structure

from se_retrofit import RetrofitError, plan_se


@pytest.mark.parametrize("found", STRUCTURES.values(), ids=STRUCTURES)
def test_a_structure_has_the_plan_that_an_expert_would_write(found: Structure) -> None:
    torch.manual_seed(3)
    model = randomised(found.build()).eval()
    if found.refused:
        with pytest.raises(RetrofitError, match=found.refused):
            plan_se(model, 2, example_inputs=found.inputs)
        return
    plan = plan_se(model, 2, example_inputs=found.inputs)
    assert {site.path.removesuffix(".se_attention"): site.channels for site in plan.sites} == found.sites
    assert not found.after or {site.after for site in plan.sites} == {found.after}
    assert {site.kind for site in plan.sites} == {found.kind}
    reasons = {skip.block: skip.reason for skip in plan.skipped}
    for block, reason in found.skipped.items():
        assert reason in reasons[block]
    check_promises(model, lambda net: net(*copy.deepcopy(found.inputs)), reduction=2, example_inputs=found.inputs)
