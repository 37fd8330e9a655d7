"""Targets, images and losses that are not what one expects: either right or refused in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sweeps import swept
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from se_retrofit import RetrofitError, load_retrofitted
from se_retrofit.finetune import FinetuneConfig, evaluate, finetune, predict, transform_of
from se_retrofit.finetune.criteria import FocalLoss, criterion_of
from se_retrofit.finetune.data import stream
from se_retrofit.finetune.train import mixed

Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]


def classifier(inputs: int, outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


# Targets


@pytest.mark.parametrize("in_memory", [True, False])
def test_fractions_are_no_classes_and_whole_numbers_are(config: Config, in_memory: bool) -> None:
    def trained(targets: Tensor) -> float:
        data: Any = TensorDataset(torch.eye(4).repeat(8, 1), targets)
        items = data if in_memory else [(image, target.item()) for image, target in data]
        result = finetune(classifier(4, 4), items, config=config(epochs=1), quiet=True)
        return float(result.history[-1]["train_loss"])

    classes = torch.arange(32) % 4
    assert trained(classes.float()) == trained(classes)
    with pytest.raises(RetrofitError, match=r"targets must be class numbers, got torch.float32 of shape \(32,\)"):
        trained(classes + 0.5)


@pytest.mark.parametrize(
    ("targets", "says"), [(["cat"] * 8, "got 'cat', 'cat', 'cat'"), ([None] * 8, "got None"), ([[0, 1], [1]] * 4, "one length")]
)  # fmt: skip
def test_targets_of_other_kinds_are_shown(config: Config, targets: list[Any], says: str) -> None:
    data = [(torch.zeros(4), target) for target in targets]
    with pytest.raises(RetrofitError, match=says):
        finetune(classifier(4, 2), data, config=config(), quiet=True)


@pytest.mark.parametrize("in_memory", swept([True], [False]))
def test_a_single_label_that_is_there_or_not_is_learned(config: Config, in_memory: bool) -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    data: Any = TensorDataset(points, (points[:, :1] > 0).float())
    recipe = config(epochs=5, lr=0.05, multi_label=True, criterion="bce", best_metric="f1", weight_decay=0.0)
    items = data if in_memory else [data[at] for at in range(len(data))]
    result = finetune(classifier(3, 1), items, items, config=recipe, quiet=True)
    assert result.best_score is not None
    assert result.best_score > 0.95
    assert result.history[-1]["val_map"] > 0.95


def test_labels_that_no_image_has_score_zero(config: Config) -> None:
    data = TensorDataset(torch.randn(8, 3), torch.zeros(8, 2))
    assert evaluate(classifier(3, 2), data, config=config(multi_label=True, criterion="bce")).map == 0.0


# Images


def test_cutmix_of_volumes_cuts_as_much_as_the_labels_say() -> None:
    images = torch.arange(2.0)[:, None, None, None, None].expand(2, 1, 5, 8, 16).contiguous()  # 5 slices of 8x16
    for _ in range(5):
        inputs, labels = mixed(Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=2), images, torch.tensor([0, 1]))
        assert inputs.shape == images.shape
        torch.testing.assert_close(inputs.mean((1, 2, 3, 4)), labels[:, 1])


def test_cutmix_of_signals_is_refused_and_mixup_is_not() -> None:
    signals, targets = torch.randn(8, 2, 6), torch.arange(8) % 2
    with pytest.raises(RetrofitError, match=r"cutmix cuts rectangles .* shape \(8, 2, 6\); set cutmix=0"):
        mixed(Mixup(0.0, 0.5, num_classes=2), signals, targets)
    inputs, labels = mixed(Mixup(0.5, 0.0, num_classes=2), signals, targets)
    assert inputs.shape == signals.shape
    assert labels.shape == (8, 2)


def test_a_batch_too_small_for_batch_norm_says_what_helps(network: Network, config: Config) -> None:
    data = TensorDataset(torch.randn(1, 3, 16, 16), torch.zeros(1).long())
    with pytest.raises(RetrofitError, match="a larger batch_size, larger images, or freeze_bn=True"):
        finetune(network(), data, config=config(), quiet=True)
    finetune(network(), data, config=config(freeze_bn=True, epochs=1), quiet=True)


def test_an_epoch_without_a_number_is_not_the_best(config: Config) -> None:
    """Logits that overflow in the first epochs, and then no more."""

    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.evaluations = nn.Linear(3, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.evaluations += 1
            return self.fc(x) + (0 if self.training or self.evaluations > 3 else math.nan)

    data = TensorDataset(torch.randn(16, 3), torch.arange(16) % 2)
    result = finetune(Overflowing(), data, data, config=config(epochs=4, best_metric="loss", patience=3), quiet=True)
    assert [math.isnan(row["val_loss"]) for row in result.history] == [True, True, True, False, False]
    assert result.best_epoch in (3, 4)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(8, 1, 16, 16), r"shape \(8, 1, 16, 16\), torch.float32: Given groups=1.*channels first"),
        (torch.zeros(8, 16, 16, 3), r"shape \(8, 16, 16, 3\)"),
        (torch.zeros(8, 3, 16, 16).byte(), r"torch.uint8: .*dtype"),
        (torch.zeros(8, 3, 16, 16).double(), "torch.float64"),
    ],
    ids=["channels", "channels last", "bytes", "doubles"],
)
def test_images_that_the_network_does_not_take_are_described(
    network: Network, config: Config, images: Tensor, says: str
) -> None:
    data = TensorDataset(images, torch.arange(8))
    for val in (None, data):
        with pytest.raises(RetrofitError, match=f"the network fails on a batch of .*{says}"):
            finetune(network(), data, val, config=config(), quiet=True)


def test_images_of_several_shapes_and_items_that_are_no_pairs_are_told(network: Network, config: Config) -> None:
    ragged = [(torch.zeros(3, 16 + number % 2, 16), 0) for number in range(8)]
    with pytest.raises(RetrofitError, match=r"tensors of one shape, got \(3, 16, 16\), \(3, 17, 16\)"):
        finetune(network(), ragged, config=config(), quiet=True)
    with pytest.raises(RetrofitError, match=r"^train_data must give \(image, class\) pairs, got a dict"):
        finetune(network(), [{"image": torch.zeros(3, 16, 16), "label": 0}] * 8, config=config(), quiet=True)


class Numbers(IterableDataset[Any]):
    """Each item tells its number; it does not divide itself among loading processes."""

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((1,), float(number)), number % 2) for number in range(40)])


def test_an_iterable_data_set_gives_each_item_once_with_several_workers() -> None:
    batches = stream(Numbers(), name="val_data", train=False, batch_size=16, transform=None, workers=2).batches(0)
    assert torch.cat([batch.images for batch in batches])[:, 0].tolist() == list(range(40))


def test_a_loader_that_gives_no_batches_is_told(network: Network, config: Config) -> None:
    data = TensorDataset(torch.zeros(8, 3, 16, 16), torch.zeros(8).long())
    with pytest.raises(RetrofitError, match=r"train_data must give batches.*got shape \(3, 16, 16\) and shape \(\)"):
        finetune(network(), DataLoader(data, batch_size=None), config=config(), quiet=True)


def test_a_mistake_that_a_loading_process_finds_is_told_without_its_traceback(network: Network, config: Config) -> None:
    ragged = [(torch.zeros(3, 16 + number % 2, 16), 0) for number in range(8)]
    with pytest.raises(RetrofitError, match=r"^the images of a batch must be .*got \(3, 16, 16\), \(3, 17, 16\)$"):
        finetune(network(), ragged, config=config(workers=1), quiet=True)


def test_grey_pictures_go_into_a_network_of_one_channel(tmp_path: Any, config: Config) -> None:
    picture = Image.effect_noise((40, 30), 50)
    picture.save(tmp_path / "picture.png")
    for colours in (picture, picture.convert("RGB")):
        model = timm.create_model("resnet10t", in_chans=1, num_classes=2)
        data = [(colours, number % 2) for number in range(4)]
        finetune(model, data, data, config=config(epochs=1, image_size=32), quiet=True)
        prepared = transform_of(model)(colours)
        assert prepared.shape == (1, 32, 32)
        assert -3 < prepared.min() < prepared.max() < 3
        assert len(list(predict(model, [tmp_path / "picture.png"]))) == 1


# Losses


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_focal_loss_of_sure_answers_has_a_gradient(config: Config, multi_label: bool) -> None:
    loss = criterion_of(
        config(criterion="focal", focal_gamma=0.5, label_smoothing=0.0, multi_label=multi_label), None, None, 2
    )
    logits = torch.tensor([[200.0, -200.0], [0.5, 0.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value = loss(logits, targets if multi_label else targets.argmax(1))
    value.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.equal(logits.grad[0], torch.zeros(2))
    assert logits.grad[1, 0] < 0
    if not multi_label:
        p = logits[1].softmax(0)[0].detach()
        torch.testing.assert_close(value.detach(), -((1 - p) ** 0.5) * p.log() / 2)


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        (lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"), r"shape \(4,\)"),
        (lambda logits, targets: torch.tensor(1.0), "without a gradient"),
        (lambda logits, targets: 1.0, r"got 1\.0"),
    ],
    ids=["each image", "constant", "number"],
)
def test_a_loss_that_cannot_be_learned_from_is_refused(config: Config, criterion: Any, says: str) -> None:
    data = TensorDataset(torch.randn(4, 3), torch.arange(4) % 2)
    with pytest.raises(RetrofitError, match=f"mean loss of the batch as a scalar tensor .*{says}"):
        finetune(classifier(3, 2), data, config=config(), criterion=criterion, quiet=True)


def test_focal_loss_of_no_focus_is_cross_entropy_for_sure_answers() -> None:
    logits = torch.tensor([[200.0, 0.0]])
    assert float(FocalLoss(0.0)(logits, torch.tensor([1]))) == float(F.cross_entropy(logits, torch.tensor([1])))


# Predictions


def test_each_of_several_labels_has_a_probability_of_its_own(tmp_path: Any, network: Network, config: Config) -> None:
    from se_retrofit.models import Base

    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    picture.save(tmp_path / "picture.png")
    data = [(picture, torch.tensor([1.0, 0.0, 1.0]))] * 4
    model = Base.of("resnet10t", num_classes=3).build()
    recipe = config(epochs=1, multi_label=True, criterion="bce", image_size=32)
    result = finetune(model, data, data, config=recipe, output_dir=tmp_path / "run", quiet=True)
    assert result.directory is not None
    loaded = load_retrofitted(result.directory)
    (found,) = predict(loaded, [tmp_path / "picture.png"], top=3)
    (row,) = predict(model, [tmp_path / "picture.png"], top=3)
    assert found == row
    assert abs(sum(found.probabilities) - 1) > 1e-3
