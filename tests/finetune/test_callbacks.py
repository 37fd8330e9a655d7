from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sweeps import swept
from tiny import config, network, same, trained
from torch.utils.data import Subset

from se_retrofit.finetune import Callbacks, Facts, NamedData, evaluate, finetune


def test_each_event_is_told_with_its_facts(digits: NamedData, tmp_path: Path) -> None:
    told: list[tuple[str, Facts]] = []

    def teller(event: str) -> Callable[[Facts], None]:
        return lambda facts: told.append((event, facts))

    events = ("update", "evaluation", "epoch", "training")
    callbacks = Callbacks(**{f"after_{event}": teller(event) for event in events})
    model = network()
    recipe = {"epochs": 2, "log_every": 3, "ema_decay": 0.9}
    result = trained(model, digits, recipe=recipe, output_dir=tmp_path, callbacks=callbacks)
    updates = [("update", 1)] * 8, [("update", 2)] * 8
    ends = [[("evaluation", epoch), ("epoch", epoch)] for epoch in (1, 2)]
    expected = [("evaluation", 0), *updates[0], *ends[0], *updates[1], *ends[1], ("training", 2)]
    assert [(event, facts.epoch) for event, facts in told] == expected
    steps = [facts for event, facts in told if event == "update"]
    assert [facts.update for facts in steps] == list(range(1, 17))
    losses = torch.stack([facts.loss for facts in steps])
    assert losses[8:].mean().item() == pytest.approx(result.history[2]["train_loss"])
    assert all(facts.model is model and facts.tested is not model for facts in steps)
    assert [dict(row) for row in told[-1][1].history] == result.history
    with pytest.raises(TypeError):
        told[-1][1].history[-1]["val_loss"] = 0.0  # type: ignore[index]


def test_a_run_with_callbacks_that_evaluate_and_draw_gives_the_same_weights(digits: NamedData) -> None:
    def look(facts: Facts) -> None:
        torch.rand(3)
        if facts.loss is None:
            evaluate(facts.model, few, config=config())

    few, train = Subset(digits.val, range(16)), Subset(digits.train, range(32))
    told, untold = network(drop_rate=0.2), network(drop_rate=0.2)
    trained(told, train, few, {"mixup": 0.4}, callbacks=Callbacks(look, look, look, look))
    trained(untold, train, few, {"mixup": 0.4})
    assert same(told.state_dict(), untold.state_dict())


@pytest.mark.parametrize("event", swept(["after_epoch"], ["after_update", "after_evaluation", "after_training"]))
def test_what_a_callback_raises_ends_the_run_and_it_goes_on_without_the_callback(
    digits: NamedData, tmp_path: Path, event: str
) -> None:
    def fail(facts: Facts) -> None:
        raise ZeroDivisionError(event)

    train, few = Subset(digits.train, range(32)), Subset(digits.val, range(16))
    handler, mode = signal.getsignal(signal.SIGTERM), torch.get_rng_state()
    model, again, whole = network().eval(), network(), network()
    with pytest.raises(ZeroDivisionError, match=event):
        trained(model, train, few, {"trainable": "se"}, output_dir=tmp_path, callbacks=Callbacks(**{event: fail}))
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.equal(torch.get_rng_state(), mode)
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    trained(again, train, few, {"trainable": "se"}, output_dir=tmp_path, resume=True)
    trained(whole, train, few, {"trainable": "se"})
    assert same(again.state_dict(), whole.state_dict())


def test_what_is_no_callback_is_refused(digits: NamedData) -> None:
    with pytest.raises(TypeError, match=r"after_epoch .*got 3"):
        Callbacks(after_epoch=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be Callbacks"):
        finetune(network(), digits.train, config=config(), callbacks=print, quiet=True)  # type: ignore[arg-type]
