"""Images and networks that are not what one expects: either right or refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import Mixup
from tiny import classifier, config, network, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from se_retrofit import RetrofitError, add_se, load_retrofitted
from se_retrofit.finetune import NamedData, engine, evaluate, finetune, parts, predict
from se_retrofit.finetune.learning import mixed
from se_retrofit.finetune.parts import layout_of
from se_retrofit.models import Base

# Mixup and cutmix


def test_cutmix_of_volumes_cuts_as_much_as_the_labels_say() -> None:
    images = torch.arange(2.0)[:, None, None, None, None].expand(2, 1, 5, 8, 16).contiguous()  # 5 slices of 8x16
    for _ in range(5):
        inputs, labels = mixed(Mixup(0.0, 1.0, label_smoothing=0.0, num_classes=2), images, torch.tensor([0, 1]))
        assert inputs.shape == images.shape
        torch.testing.assert_close(inputs.mean((1, 2, 3, 4)), labels[:, 1])


def test_cutmix_of_signals_is_refused_and_mixup_is_not() -> None:
    signals, targets = torch.randn(8, 2, 6), torch.arange(8) % 2
    with pytest.raises(RetrofitError, match=r"\(8, 2, 6\).*cutmix=0"):
        mixed(Mixup(0.0, 0.5, num_classes=2), signals, targets)
    inputs, labels = mixed(Mixup(0.5, 0.0, num_classes=2), signals, targets)
    assert inputs.shape == signals.shape
    assert labels.shape == (8, 2)


def test_the_odd_image_of_a_mixed_batch_keeps_its_class(digits: NamedData) -> None:
    images, targets = torch.rand(5, 3, 8, 8), torch.arange(5)
    blend, labels = mixed(Mixup(1.0, num_classes=5, label_smoothing=0.0), images, targets)
    assert blend.shape == images.shape
    assert torch.equal(blend[4], images[4])
    assert labels.shape == (5, 5)
    assert torch.equal(labels[4], torch.eye(5)[4])
    for batch_size, number in ((7, 21), (1, 3)):
        loader = DataLoader(Subset(digits.train, range(number)), batch_size)
        assert trained(network(), loader, recipe={"mixup": 0.4, "cutmix": 0.4, "freeze_bn": True}).updates == 3


def test_a_class_that_the_network_lacks_is_found_before_the_images_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mix(*_: object) -> None:
        raise AssertionError("mixed")

    monkeypatch.setattr(Mixup, "__call__", mix)
    data = TensorDataset(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 10]))
    with pytest.raises(RetrofitError, match=r"class 10, .* 0 to 9"):
        trained(network(), data, recipe={"mixup": 0.2, "batch_size": 4})


# Images


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(8, 1, 16, 16), r"\(8, 1, 16, 16\), torch.float32: Given groups=1"),
        (torch.zeros(8, 16, 16, 3), r"\(8, 16, 16, 3\)"),
        (torch.zeros(8, 3, 16, 16).byte(), "torch.uint8"),
        (torch.zeros(8, 3, 16, 16).double(), "torch.float64"),
    ],
    ids=["channels", "channels last", "bytes", "doubles"],
)
def test_images_that_the_network_does_not_take_are_described(images: Tensor, says: str) -> None:
    data = TensorDataset(images, torch.arange(8))
    for val in (None, data):
        with pytest.raises(RetrofitError, match=says):
            trained(network(), data, val)


RAGGED = [(torch.zeros(3, 16 + number % 2, 16), 0) for number in range(8)]
PLAIN = TensorDataset(torch.zeros(8, 3, 16, 16), torch.zeros(8).long())


@pytest.mark.parametrize(
    ("data", "fields", "says"),
    [
        (RAGGED, {}, r"\(3, 16, 16\), \(3, 17, 16\)"),
        (RAGGED, {"workers": 1}, r"^the images of a batch .*\(3, 16, 16\), \(3, 17, 16\)$"),  # and no traceback
        ([torch.zeros(3, 16, 16)] * 8, {}, r"^train_data .*\(image, class\) pairs.*Tensor"),
        ([{"photo": torch.zeros(3, 16, 16), "label": 0}] * 8, {}, r"keys photo, label.*keys="),
        ([{"image": torch.zeros(3, 16, 16), "name": "a"}] * 8, {}, r"^train_data .*keys image, name.*keys="),
        ([{"image": torch.zeros(3, 16, 16), "label": 0}] * 8, {"keys": ["image", "kind"]}, "not kind"),
        (DataLoader(PLAIN, batch_size=None), {}, r"train_data .*\(3, 16, 16\) and shape \(\)"),
        (Subset(PLAIN, [0]), {}, "freeze_bn=True"),  # too small for a batch norm
    ],
    ids=["shapes", "in a loading process", "no pairs", "photo", "no class", "keys", "no batches", "one image"],
)
def test_data_that_make_no_batches_are_refused_in_words(data: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RetrofitError, match=says):
        trained(network(), data, recipe=fields)


def test_an_epoch_without_a_number_is_not_the_best() -> None:
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
    result = trained(Overflowing(), data, data, {"epochs": 4, "best_metric": "loss", "patience": 3})
    assert [math.isnan(row["val_loss"]) for row in result.history] == [True, True, True, False, False]
    assert result.best_epoch in (3, 4)


def test_labels_that_no_image_has_score_zero() -> None:
    data = TensorDataset(torch.randn(8, 3), torch.zeros(8, 2))
    assert evaluate(classifier(3, 2), data, config=config(multi_label=True, loss="bce")).map == 0.0


def test_each_of_several_labels_has_a_probability_of_its_own(tmp_path: Path) -> None:
    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    picture.save(tmp_path / "picture.png")
    data = [(picture, torch.tensor([1.0, 0.0, 1.0]))] * 4
    model = Base.of("test_resnet", num_classes=3).build()
    recipe = {"multi_label": True, "loss": "bce", "image_size": 32}
    result = trained(model, data, data, recipe, output_dir=tmp_path / "run")
    assert result.directory is not None
    (found,), (row,) = (
        predict(n, [tmp_path / "picture.png"], top=3) for n in (load_retrofitted(result.directory), model)
    )
    assert found == row
    assert abs(sum(found.probabilities) - 1) > 1e-3


# Networks


class Residual(nn.Module):
    def __init__(self, conv: type[nn.Module], norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(8, 8, 3, padding=1), norm(8)
        self.conv2, self.norm2 = conv(8, 8, 3, padding=1), norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(out))).relu()


@pytest.mark.parametrize(
    ("conv", "norm", "size"), [(nn.Conv1d, nn.BatchNorm1d, (16,)), (nn.Conv3d, nn.BatchNorm3d, (4, 6, 6))]
)
def test_1d_and_3d_networks_are_trained(
    conv: type[nn.Module], norm: type[nn.Module], size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout that they get on CUDA."""
    for module in (parts, engine):
        monkeypatch.setattr(module, "layout_of", lambda value, _: layout_of(value, torch.device("cuda")))
    pool = nn.AdaptiveAvgPool1d(1) if len(size) == 1 else nn.AdaptiveAvgPool3d(1)
    bare = nn.Sequential(conv(3, 8, 3, padding=1), Residual(conv, norm), pool, nn.Flatten(), nn.Linear(8, 2))
    model = add_se(bare, example_inputs=torch.zeros(2, 3, *size))
    data = TensorDataset(torch.randn(8, 3, *size), torch.arange(8) % 2)
    assert trained(model, data, data, {"batch_size": 4}).updates == 2
    if len(size) == 3:
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_sharded_network_is_refused(digits: NamedData) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(RetrofitError, match=r"fully_shard"):
            finetune(model, digits.train, config=config(), quiet=True)
    finally:
        destroy_process_group()


@pytest.mark.parametrize("own", ["new", "old"])
def test_the_callers_precision_of_float32_products_is_given_back(own: str) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, legacy = (products.fp32_precision, convolutions.fp32_precision), torch.get_float32_matmul_precision()
    try:
        if own == "new":
            products.fp32_precision = convolutions.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        theirs = products.fp32_precision, convolutions.fp32_precision
        for precision, value in (("auto", "tf32"), ("fp32", "ieee")):
            with engine.fast_math(precision):
                assert (products.fp32_precision, convolutions.fp32_precision) == (value, value)
            assert (products.fp32_precision, convolutions.fp32_precision) == theirs
        if own == "old":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(legacy)
        products.fp32_precision, convolutions.fp32_precision = before
