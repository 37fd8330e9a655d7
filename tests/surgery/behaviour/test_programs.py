"""Networks written as programs and imported keep the contract, whatever Python they are composed of; one that does not is printed
as a program that runs by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from programs import LOOPS, OPTIONS, PARTS, block, imported, network, programs, residual
from same_behaviour import check
from torch import nn

from se_retrofit import plan_se


def keeps_the_contract(program: str, options: dict[str, Any], folder: Path, sites: int | None = None) -> None:
    try:
        torch.manual_seed(0)
        model = imported(folder / f"network_{abs(hash(program))}.py", program).Network()
        check(model, sites=sites, sizes=((2, 3, 12, 12), (1, 3, 7, 9)), **options)
        if "at" not in options:
            each_convolution_is_in_a_block(model)
    except Exception as error:
        error.add_note(f"add_se(model, 2, **{options}); the network, as a program:\n{program}")
        raise


def each_convolution_is_in_a_block(model: nn.Module) -> None:
    """Each convolution over space that runs is part of a block with SE, or of one that is skipped, with the reason; of one that
    does not run it is said that it does not."""
    ran: set[str] = set()
    convs = {p: m for p, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1}
    handles = [m.register_forward_hook(lambda *_, path=path: ran.add(path)) for path, m in convs.items()]
    model(torch.randn(2, 3, 12, 12))
    for handle in handles:
        handle.remove()
    plan = plan_se(model)
    listed = {path: skip.reason for skip in plan.skipped for path in skip.convolutions}
    assert all(listed.values())
    assert {path for path, reason in listed.items() if "no recorded call" in reason} == listed.keys() - ran
    for path in ran - listed.keys():
        assert any(path == site.block or path.startswith(f"{site.block}.") for site in plan.sites), path


@pytest.mark.parametrize("part", [f"{name}-{i}" for name, texts in PARTS.items() for i in range(len(texts))])
def test_a_fragment_of_python_works_in_a_residual_block(part: str, tmp_path: Path) -> None:
    plain = {name: texts[0] for name, texts in PARTS.items()}
    name, _, index = part.partition("-")
    where = "before" if "pool" in PARTS[name][int(index)] else name
    body = residual(**{**plain, where: PARTS[name][int(index)]})
    keeps_the_contract(network(block("Block", body), ["Block"] * 2), {}, tmp_path, sites=2)


@pytest.mark.parametrize("loop", range(len(LOOPS)))
def test_each_block_of_a_loop_gets_its_own_se_and_one_run_again_shares_its_own(loop: int, tmp_path: Path) -> None:
    text, sites = [*LOOPS.items()][loop]
    keeps_the_contract(network(block("Block", f"{text}\nreturn x"), ["Block"]), {}, tmp_path, sites=sites)


def composed(examples: int) -> Any:
    """A test on so many networks."""

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(program=programs(), options=OPTIONS)
    def test(program: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
        keeps_the_contract(program, options, tmp_path_factory.mktemp("networks"))

    return test


test_networks_composed_at_random_keep_the_contract = composed(10)
test_many_more_networks_composed_at_random_keep_the_contract = pytest.mark.sweep(composed(100))
