from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from sweeps import swept
from test_processes import RECIPE, launch, read
from torch import nn
from torch.utils.data import Subset

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import Callbacks, Facts, FinetuneConfig, NamedData, finetune
from se_retrofit.finetune.freezing import stages_of

Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]
Same = Callable[[dict[str, Any], dict[str, Any]], bool]

STAGES = ["layer4", "layer3", "layer2", "layer1", "conv1, bn1"]


def part_of(key: str) -> str:
    if ".se_attention" in key:
        return "SE"
    top = key.split(".")[0]
    return {"conv1": "conv1, bn1", "bn1": "conv1, bn1"}.get(top, top)


def changes_by_epoch(model: nn.Module, data: Any, recipe: FinetuneConfig) -> list[tuple[set[str], set[str]]]:
    """After each epoch: the parts of which something has changed, and those of which all tensors have."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found: list[tuple[set[str], set[str]]] = []

    def compare(facts: Facts) -> None:
        nonlocal before
        now = {key: value.clone() for key, value in facts.model.state_dict().items()}
        moved = {key for key in now if not torch.equal(now[key], before[key])}
        parts = {part_of(key) for key in now}
        still = {part_of(key) for key in now.keys() - moved}
        found.append(({part_of(key) for key in moved}, parts - still))
        before = now

    finetune(model, data, config=recipe, quiet=True, callbacks=Callbacks(after_epoch=compare))
    return found


def test_stages_are_unfrozen_from_the_last_to_the_first_and_all_else_stays_bit_for_bit(
    network: Network, config: Config, digits: NamedData
) -> None:
    recipe = config(trainable="se+head", unfreeze_every=2, epochs=8, schedule="constant")
    found = changes_by_epoch(network(), Subset(digits.train, range(64)), recipe)
    for epoch, (some, whole) in enumerate(found):
        trained = {"SE", "fc", *STAGES[: epoch // 2]}
        assert some == trained, epoch
        assert whole - {"SE"} == trained - {"SE"}, epoch  # the first excitation layers follow the second ones


def test_with_se_alone_the_head_is_the_first_stage(network: Network, config: Config, digits: NamedData) -> None:
    recipe = config(trainable="se", unfreeze_every=1, epochs=3)
    found = changes_by_epoch(network(), Subset(digits.train, range(64)), recipe)
    assert [some for some, _ in found] == [{"SE"}, {"SE", "fc"}, {"SE", "fc", "layer4"}]


def test_what_was_frozen_before_stays_frozen(network: Network, config: Config, digits: NamedData) -> None:
    model = network()
    model.layer4[0].conv1.weight.requires_grad_(False)
    kept, other = model.layer4[0].conv1.weight.clone(), model.layer4[0].conv2.weight.clone()
    recipe = config(trainable="se+head", unfreeze_every=1, epochs=2)
    finetune(model, Subset(digits.train, range(64)), config=recipe, quiet=True)
    assert torch.equal(model.layer4[0].conv1.weight, kept)
    assert not torch.equal(model.layer4[0].conv2.weight, other)


@pytest.mark.parametrize("at", swept([4], [5, 9]))
def test_a_run_that_is_broken_off_around_an_unfreezing_gives_the_same_weights(
    network: Network, config: Config, digits: NamedData, tmp_path: Path, same: Same, at: int
) -> None:
    recipe = config(
        trainable="se+head", unfreeze_every=1, epochs=3, batch_size=16, ema_decay=0.9, layer_decay=0.8,
        checkpoint_minutes=0.0,
    )  # fmt: skip
    train = Subset(digits.train, range(64))  # four updates an epoch

    def fail(facts: Facts) -> None:
        if facts.update == at:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finetune(
            network(), train, config=recipe, output_dir=tmp_path, quiet=True, callbacks=Callbacks(after_update=fail)
        )
    again, whole = network(), network()
    result = finetune(again, train, config=recipe, output_dir=tmp_path, resume=True, quiet=True)
    expected = finetune(whole, train, config=recipe, quiet=True)
    assert same(again.state_dict(), whole.state_dict())
    assert result.trained_parameters == expected.trained_parameters


def test_a_run_that_is_over_is_extended_into_further_stages(
    network: Network, config: Config, digits: NamedData, tmp_path: Path
) -> None:
    recipe = config(trainable="se+head", unfreeze_every=1, epochs=1)
    train = Subset(digits.train, range(64))
    model = network()
    finetune(model, train, config=recipe, output_dir=tmp_path, quiet=True)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    more = network()
    finetune(more, train, config=recipe.replace(epochs=3), output_dir=tmp_path, resume=True, quiet=True)
    moved = {part_of(key) for key, value in more.state_dict().items() if not torch.equal(value, first[key])}
    assert moved == {"SE", "fc", "layer4", "layer3"}


def test_it_is_said_when_each_stage_is_unfrozen_and_which_never_is(
    network: Network, config: Config, digits: NamedData, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = config(trainable="se+head", unfreeze_every=1, epochs=3)
    result = finetune(network(), Subset(digits.train, range(32)), config=recipe)
    said = capsys.readouterr().out
    assert "trained besides: layer4 from epoch 2 on; layer3 from epoch 3 on" in said
    assert "3 epochs are too few for layer2; layer1; conv1, bn1" in said
    assert f"epoch 3: layer3 is trained from here on, {result.trained_parameters:,} parameters" in said


def test_networks_that_timm_does_not_know_have_their_children_as_stages() -> None:
    recipe = FinetuneConfig(trainable="se+head", unfreeze_every=1)
    names = [stage.name for stage in stages_of(add_se(torchvision.models.resnet18(num_classes=3)), recipe)]
    assert names == ["layer4", "layer3", "layer2", "layer1", "bn1", "conv1"]
    stages = stages_of(add_se(torchvision.models.vgg11(num_classes=3)), recipe)
    assert [stage.name for stage in stages][:3] == ["features.18, classifier", "features.16", "features.13"]


def test_each_tensor_is_in_one_stage_statistics_without_parameters_included(network: Network) -> None:
    model = network(norm_layer=partial(nn.BatchNorm2d, affine=False))
    for trainable in ("se", "se+head"):
        stages = stages_of(model, FinetuneConfig(trainable=trainable, unfreeze_every=1))
        held = [name for stage in stages for name in stage.tensors]
        assert sorted(held) == sorted(model.state_dict())
        last = next(stage for stage in stages if stage.name == "layer4")
        assert {key for key in model.state_dict() if key.startswith("layer4.")} <= last.tensors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unfreeze_every": 2}, r'unfreeze_every=2 needs trainable="se" or "se\+head": "all" freezes nothing'),
        ({"unfreeze_every": 0, "trainable": "se"}, r"unfreeze_every must be at least 1, got 0"),
        ({"unfreeze_every": 1, "unfreeze_epoch": 3, "trainable": "se"}, r"unfreeze_epoch=3 unfreezes all at once"),
    ],
)
def test_wrong_unfreezing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RetrofitError, match=message):
        FinetuneConfig(**fields)


@pytest.mark.sweep
def test_two_processes_unfreeze_as_one_does(tmp_path: Path) -> None:
    fields = {**RECIPE, "epochs": 3, "trainable": "se+head", "unfreeze_every": 1}
    for number, (processes, batch_size) in enumerate(((1, 32), (2, 16))):
        done = launch(processes, tmp_path / str(number), {**fields, "batch_size": batch_size})
        assert done.returncode == 0, done.stderr
    (curve, _, weights), (curve2, _, weights2) = read(tmp_path / "0"), read(tmp_path / "1")
    assert curve2 == pytest.approx(curve, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(weights2[key], value, rtol=1e-3, atol=1e-5)
