"""A run tells what its gates did in each epoch: in its history, on TensorBoard, and in a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeps import swept
from torch import nn

from se_retrofit import SEAttention, excitations
from se_retrofit.finetune import FinetuneConfig, NamedData, finetune

pytestmark = pytest.mark.usefixtures("drawn_pictures")

Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]


@pytest.mark.parametrize("ema_decay", swept([None], [0.5]))
def test_each_epoch_s_row_has_the_gates_on_the_validation_data(
    ema_decay: float | None, network: Network, config: Config, digits: NamedData, tmp_path: Path
) -> None:
    model = network()
    recipe = config(epochs=2, lr=3e-3, ema_decay=ema_decay, trackers=("tensorboard",))
    result = finetune(model, digits.train, digits.val, config=recipe, output_dir=tmp_path, quiet=True)
    sites = [path for path, module in model.named_modules() if isinstance(module, SEAttention)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(list(row["gates"]) == sites for row in rows)
    assert all(site["channels"] == [1.0] * 5 for site in rows[0]["gates"].values())  # the retrofit is an identity
    assert rows == result.history
    # the model now has the weights of the best epoch, and its gates
    best = next(row for row in rows if row["epoch"] == result.best_epoch)
    batches = [digits.val[i] for i in range(len(digits.val))]
    for site in excitations(model, [(image[None], label) for image, label in batches]).sites:
        seen = best["gates"][site.path]
        assert (seen["low"], seen["high"]) == (pytest.approx(site.low, abs=1e-5), pytest.approx(site.high, abs=1e-5))
        assert seen["variation"] == pytest.approx(float(site.std.mean()), abs=1e-5)
    assert rows[2]["gates"] != rows[1]["gates"]

    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next(tmp_path.rglob("events.out.tfevents.*"))
    board = EventAccumulator(str(events.parent), {"histograms": 0}).Reload()
    assert set(board.Tags()["histograms"]) == {f"gates/{path}" for path in sites}
    assert len(board.Histograms(f"gates/{sites[0]}")) == 3


def test_a_plain_network_has_no_gates_and_no_picture_of_them(
    network: Network, config: Config, digits: NamedData, tmp_path: Path
) -> None:
    plain = network(se=False)
    result = finetune(plain, digits.train, digits.val, config=config(epochs=1), output_dir=tmp_path, quiet=True)
    assert not any("gates" in row for row in result.history)
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "gates.png").exists()
