"""Targets, images and losses that are not what one expects: either right or refused in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sweeps import swept
from timm.data import Mixup
from tiny import config, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from se_retrofit import RetrofitError, add_se, load_retrofitted
from se_retrofit.finetune import FinetuneConfig, NamedData, evaluate, finetune, parts, predict, run, transform_of
from se_retrofit.finetune.criteria import FocalLoss, MultiLabelFocalLoss
from se_retrofit.finetune.data import stream
from se_retrofit.finetune.engine import fast_math
from se_retrofit.finetune.parts import layout_of
from se_retrofit.finetune.train import mixed


def classifier(inputs: int, outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


# Targets


@pytest.mark.parametrize("in_memory", [True, False])
def test_fractions_are_no_classes_and_whole_numbers_are(in_memory: bool) -> None:
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
def test_targets_of_other_kinds_are_shown(targets: list[Any], says: str) -> None:
    data = [(torch.zeros(4), target) for target in targets]
    with pytest.raises(RetrofitError, match=says):
        finetune(classifier(4, 2), data, config=config(), quiet=True)


@pytest.mark.parametrize("in_memory", swept([True], [False]))
def test_a_single_label_that_is_there_or_not_is_learned(in_memory: bool) -> None:
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    data: Any = TensorDataset(points, (points[:, :1] > 0).float())
    recipe = config(epochs=5, lr=0.05, multi_label=True, loss="bce", best_metric="f1", weight_decay=0.0)
    items = data if in_memory else [data[at] for at in range(len(data))]
    result = finetune(classifier(3, 1), items, items, config=recipe, quiet=True)
    assert result.best_score is not None
    assert result.best_score > 0.95
    assert result.history[-1]["val_map"] > 0.95


def test_labels_that_no_image_has_score_zero() -> None:
    data = TensorDataset(torch.randn(8, 3), torch.zeros(8, 2))
    assert evaluate(classifier(3, 2), data, config=config(multi_label=True, loss="bce")).map == 0.0


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


def test_a_batch_too_small_for_batch_norm_says_what_helps() -> None:
    data = TensorDataset(torch.randn(1, 3, 16, 16), torch.zeros(1).long())
    with pytest.raises(RetrofitError, match="a larger batch_size, larger images, or freeze_bn=True"):
        finetune(network(), data, config=config(), quiet=True)
    finetune(network(), data, config=config(freeze_bn=True, epochs=1), quiet=True)


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
def test_images_that_the_network_does_not_take_are_described(images: Tensor, says: str) -> None:
    data = TensorDataset(images, torch.arange(8))
    for val in (None, data):
        with pytest.raises(RetrofitError, match=f"the network fails on a batch of .*{says}"):
            finetune(network(), data, val, config=config(), quiet=True)


def test_images_of_several_shapes_and_items_that_are_no_pairs_are_told() -> None:
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


def test_a_loader_that_gives_no_batches_is_told() -> None:
    data = TensorDataset(torch.zeros(8, 3, 16, 16), torch.zeros(8).long())
    with pytest.raises(RetrofitError, match=r"train_data must give batches.*got shape \(3, 16, 16\) and shape \(\)"):
        finetune(network(), DataLoader(data, batch_size=None), config=config(), quiet=True)


def test_a_mistake_that_a_loading_process_finds_is_told_without_its_traceback() -> None:
    ragged = [(torch.zeros(3, 16 + number % 2, 16), 0) for number in range(8)]
    with pytest.raises(RetrofitError, match=r"^the images of a batch must be .*got \(3, 16, 16\), \(3, 17, 16\)$"):
        finetune(network(), ragged, config=config(workers=1), quiet=True)


def test_grey_pictures_go_into_a_network_of_one_channel(tmp_path: Any) -> None:
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
def test_the_focal_loss_of_sure_answers_has_a_gradient(multi_label: bool) -> None:
    loss = MultiLabelFocalLoss(0.5) if multi_label else FocalLoss(0.5)
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
def test_a_loss_that_cannot_be_learned_from_is_refused(criterion: Any, says: str) -> None:
    data = TensorDataset(torch.randn(4, 3), torch.arange(4) % 2)
    with pytest.raises(RetrofitError, match=f"mean loss of the batch as a scalar tensor .*{says}"):
        finetune(classifier(3, 2), data, config=config(), criterion=criterion, quiet=True)


# Predictions


def test_each_of_several_labels_has_a_probability_of_its_own(tmp_path: Any) -> None:
    from se_retrofit.models import Base

    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    picture.save(tmp_path / "picture.png")
    data = [(picture, torch.tensor([1.0, 0.0, 1.0]))] * 4
    model = Base.of("resnet10t", num_classes=3).build()
    recipe = config(epochs=1, multi_label=True, loss="bce", image_size=32)
    result = finetune(model, data, data, config=recipe, output_dir=tmp_path / "run", quiet=True)
    assert result.directory is not None
    loaded = load_retrofitted(result.directory)
    (found,) = predict(loaded, [tmp_path / "picture.png"], top=3)
    (row,) = predict(model, [tmp_path / "picture.png"], top=3)
    assert found == row
    assert abs(sum(found.probabilities) - 1) > 1e-3


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
    monkeypatch.setattr(parts, "layout_of", lambda value, _: layout_of(value, torch.device("cuda")))
    monkeypatch.setattr(run, "layout_of", parts.layout_of)
    pool = nn.AdaptiveAvgPool1d(1) if len(size) == 1 else nn.AdaptiveAvgPool3d(1)
    bare = nn.Sequential(conv(3, 8, 3, padding=1), Residual(conv, norm), pool, nn.Flatten(), nn.Linear(8, 2))
    model = add_se(bare, example_inputs=torch.zeros(2, 3, *size))
    data = TensorDataset(torch.randn(8, 3, *size), torch.arange(8) % 2)
    recipe = config(epochs=1, batch_size=4)
    result = finetune(model, data, data, config=recipe, quiet=True)
    assert result.updates == 2
    if len(size) == 3:
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    evaluate(model, data, config=recipe)


def test_mixup_takes_odd_batches_and_batches_of_one(digits: NamedData) -> None:
    recipe = config(epochs=1, mixup=0.4, cutmix=0.4, freeze_bn=True)
    for batch_size, images in ((7, 21), (1, 3)):
        loader = DataLoader(Subset(digits.train, range(images)), batch_size)
        assert finetune(network(), loader, config=recipe).updates == 3


def test_the_odd_image_of_a_mixed_batch_keeps_its_class() -> None:
    images, targets = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    blend, labels = mixed(Mixup(1.0, num_classes=5, label_smoothing=0.0), images, targets)
    assert blend.shape == images.shape
    assert labels.shape == (5, 5)
    assert torch.equal(blend[4], images[4])
    assert torch.equal(labels[4], torch.eye(5)[4])


def test_a_class_that_the_network_lacks_is_found_before_the_images_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mix(*_: object) -> None:
        raise AssertionError("mixed")

    monkeypatch.setattr(Mixup, "__call__", mix)
    data = TensorDataset(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 10]))
    with pytest.raises(RetrofitError, match=r"the data has class 10, and the network has classes 0 to 9"):
        finetune(network(), data, config=config(mixup=0.2, batch_size=4), quiet=True)


@pytest.mark.parametrize("own", ["new", "old"])
def test_the_callers_precision_of_float32_products_is_given_back(own: str) -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    legacy = None
    try:
        if own == "new":
            products.fp32_precision = convolutions.fp32_precision = "tf32"
        else:
            legacy = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
        theirs = products.fp32_precision, convolutions.fp32_precision
        for precision, value in (("auto", "tf32"), ("fp32", "ieee")):
            with fast_math(FinetuneConfig(precision=precision)):
                assert (products.fp32_precision, convolutions.fp32_precision) == (value, value)
            assert (products.fp32_precision, convolutions.fp32_precision) == theirs
        if own == "old":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        products.fp32_precision, convolutions.fp32_precision = before


@pytest.mark.parametrize("folder", ["last", "best"])
def test_a_foreign_file_where_checkpoints_go_is_found_before_the_first_step(
    digits: NamedData, tmp_path: Path, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "thesis.tex").write_text("")
    with pytest.raises(RetrofitError, match=rf"{folder} holds files of other kinds \(thesis.tex\)"):
        finetune(network(), digits.train, config=config(), output_dir=tmp_path, quiet=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([folder, "thesis.tex"])


@pytest.mark.parametrize(
    ("optimizer", "options", "says"),
    [
        ("adahessian", {}, "can't make an update from gradients alone"),
        ("adamw", {"foreach": True, "fused": True}, "can't be made with"),
    ],
)
def test_optimizers_that_would_fail_later_are_refused_at_once(
    digits: NamedData, optimizer: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RetrofitError, match=says):
        finetune(network(), digits.train, config=config(optimizer=optimizer, optimizer_options=options), quiet=True)


def test_an_optimizer_whose_state_cannot_be_written_is_refused_or_resumes(digits: NamedData, tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match=r"the state of optimizer 'adafactorbv' can't be written"):
        finetune(network(), digits.train, config=config(optimizer="adafactorbv"), output_dir=tmp_path, quiet=True)


def test_a_sharded_network_is_refused(digits: NamedData) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(RetrofitError, match=r"spread over processes \(fully_shard\)"):
            finetune(model, digits.train, config=config(), quiet=True)
    finally:
        destroy_process_group()


def test_tensors_in_memory_come_as_a_whole_batch(digits: NamedData) -> None:
    from se_retrofit.finetune.data import stream

    class Slow(TensorDataset):
        """The same, read item by item."""

    plain = TensorDataset(*digits.train.dataset.tensors)

    def first(data: Any) -> Any:
        return next(stream(data, name="data", train=True, batch_size=16, transform=None).batches(3))

    fast, slow = first(plain), first(Slow(*plain.tensors))
    assert torch.equal(fast.images, slow.images)
    assert torch.equal(fast.targets, slow.targets)
    assert torch.equal(fast.counts, slow.counts)
