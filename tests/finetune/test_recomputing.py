from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from sweeps import swept
from test_processes import RECIPE, launch, read
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import Subset, TensorDataset

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import Callbacks, Facts, FinetuneConfig, NamedData, finetune

Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]
Same = Callable[[dict[str, Any], dict[str, Any]], bool]


class Block(nn.Module):
    """A residual unit with dropout, and weights with a power iteration."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(channels, channels, 3, padding=1))
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(self.bn1(self.conv1(x)).relu())
        return (x + self.bn2(self.conv2(y))).relu()


class Own(nn.Module):
    """A network of no library."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(block(8), block(8), block(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def own_network() -> nn.Module:
    torch.manual_seed(0)
    return add_se(Own())


def plain_network() -> nn.Module:
    """Without SE: the blocks are those that it would go into."""
    torch.manual_seed(0)
    return Own()


def part_of_another() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), add_se(Own()))


def chain() -> nn.Module:
    """VGG's kind: lone layers in a sequence."""
    torch.manual_seed(0)
    layers = [torchvision.ops.Conv2dNormActivation(3, 8).children()]
    layers += [torchvision.ops.Conv2dNormActivation(8, 8).children() for _ in range(3)]
    features = [layer for group in layers for layer in group]
    return add_se(nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(8, 10)))


def torchvision_network() -> nn.Module:
    torch.manual_seed(0)
    return add_se(torchvision.models.shufflenet_v2_x0_5(num_classes=10))


def timm_network() -> nn.Module:
    torch.manual_seed(0)
    return add_se(timm.create_model("resnet10t", num_classes=10, drop_path_rate=0.2, drop_rate=0.2))


def densenet() -> nn.Module:
    torch.manual_seed(0)
    return add_se(timm.models.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=10))


BUILDERS = [own_network, plain_network, part_of_another, chain, torchvision_network, timm_network, densenet]


class Bytes:
    """Counts what autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.saved = 0

    def pack(self, value: torch.Tensor) -> torch.Tensor:
        self.saved += value.numel() * value.element_size()
        return value


def trained(
    build: Callable[[], nn.Module], data: Any, recipe: FinetuneConfig, **options: Any
) -> tuple[nn.Module, list[float], int]:
    """The trained network, the loss of each update, and the bytes that were kept after the first update."""
    losses: list[float] = []
    counted, kept = Bytes(), []
    model = build()

    def note(facts: Facts) -> None:
        losses.append(facts.loss.item())
        kept.append(counted.saved)

    callbacks = Callbacks(after_update=note)
    with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda value: value):
        finetune(model, data, config=recipe, quiet=True, callbacks=callbacks, **options)
    return model, losses, kept[-1] - kept[0]


@pytest.mark.parametrize(
    "build", swept([build for build in BUILDERS if build is not torchvision_network], [torchvision_network])
)
def test_the_losses_and_weights_are_the_same_and_less_is_kept(
    build: Callable[[], nn.Module], config: Config, digits: NamedData, same: Same
) -> None:
    recipe = config(epochs=1, batch_size=16, grad_accum_steps=2)
    train = Subset(digits.train, range(64))
    plain, losses, kept = trained(build, train, recipe)
    less, losses2, kept2 = trained(build, train, recipe.replace(grad_checkpointing=True))
    assert losses2 == pytest.approx(losses, rel=1e-5)
    # The blocks' own inputs, which are kept, are not counted; a DenseNet keeps its concats, ShuffleNet has short branches
    assert kept2 < {densenet: 0.9, torchvision_network: 0.6}.get(build, 0.3) * kept
    # running statistics, counters of batches and power iterations included: all moved once an update
    assert less.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(
            less.state_dict()[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("build", BUILDERS)
def test_classes_and_switches_are_the_networks_own_outside_of_a_step(
    build: Callable[[], nn.Module], config: Config, digits: NamedData
) -> None:
    model = build()
    before = [
        (type(module), set(vars(module)), getattr(module, "grad_checkpointing", None)) for module in model.modules()
    ]

    def look(facts: Facts) -> None:
        now = [(type(m), set(vars(m)), getattr(m, "grad_checkpointing", None)) for m in facts.model.modules()]
        assert now == before

    recipe = config(epochs=1, grad_checkpointing=True)
    finetune(
        model, Subset(digits.train, range(32)), Subset(digits.val, range(16)), config=recipe, quiet=True,
        callbacks=Callbacks(look, look, look, look),
    )  # fmt: skip
    look(Facts(model, model, 0, 0, 0, 0.0, None, (), None, 0))


def test_frozen_parts_stay_and_a_run_goes_on_with_and_without(
    config: Config, digits: NamedData, tmp_path: Path, same: Same
) -> None:
    recipe = config(epochs=2, trainable="se+head", unfreeze_epoch=2, checkpoint_minutes=0.0)
    train = Subset(digits.train, range(64))

    def fail(facts: Facts) -> None:
        if facts.update == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finetune(
            own_network(), train, config=recipe, output_dir=tmp_path, quiet=True, callbacks=Callbacks(after_update=fail)
        )
    again = own_network()
    more = recipe.replace(grad_checkpointing=True)
    finetune(again, train, config=more, output_dir=tmp_path, resume=True, quiet=True)
    whole = own_network()
    finetune(whole, train, config=recipe, quiet=True)
    assert same(again.state_dict(), whole.state_dict())


@pytest.mark.sweep
def test_a_network_that_recomputed_already_has_its_statistics_moved_once(
    config: Config, digits: NamedData, same: Same
) -> None:
    recipe, train = config(epochs=1), Subset(digits.train, range(64))

    def switched() -> nn.Module:
        model = timm_network()
        model.set_grad_checkpointing(True)
        return model

    (one, _, _), (other, _, _) = trained(switched, train, recipe), trained(timm_network, train, recipe)
    assert same(one.state_dict(), other.state_dict())
    assert one.grad_checkpointing is True


@pytest.mark.sweep
def test_two_processes_recompute_as_one_process_keeps(tmp_path: Path) -> None:
    for number, (processes, batch_size) in enumerate(((1, 32), (2, 16))):
        fields = {**RECIPE, "batch_size": batch_size, "grad_checkpointing": processes == 2}
        done = launch(processes, tmp_path / str(number), fields)
        assert done.returncode == 0, done.stderr
    (curve, _, weights), (curve2, _, weights2) = read(tmp_path / "0"), read(tmp_path / "1")
    assert curve2 == pytest.approx(curve, rel=1e-4)
    for key, value in weights.items():
        torch.testing.assert_close(weights2[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at the block's inputs
def test_compiled_training_recomputes_to_the_same_losses(
    config: Config, digits: NamedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("se_retrofit.finetune.engine.BACKEND", "aot_eager")
    recipe, train = config(epochs=1, compile=True, batch_size=16), Subset(digits.train, range(32))
    _, losses, _ = trained(own_network, train, recipe)
    _, losses2, _ = trained(own_network, train, recipe.replace(grad_checkpointing=True))
    assert losses2 == pytest.approx(losses, rel=1e-4)


class InPlace(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.silu(x, inplace=True))


def test_a_block_that_changes_its_input_is_refused_by_name(config: Config, digits: NamedData) -> None:
    model = add_se(Own(InPlace))
    with pytest.raises(RetrofitError, match=r"grad_checkpointing=True: SEInPlace changes its input in place"):
        finetune(model, digits.train, config=config(grad_checkpointing=True), quiet=True)


def test_a_network_without_blocks_is_refused(config: Config) -> None:
    data = TensorDataset(torch.randn(32, 4), torch.zeros(32, dtype=torch.long))
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(RetrofitError, match=r"grad_checkpointing=True: no blocks were found in Sequential"):
        finetune(model, data, config=config(grad_checkpointing=True), quiet=True)
    assert type(model) is nn.Sequential
