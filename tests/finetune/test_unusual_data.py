"""Pictures, batches and networks as people have them: read right, or refused in words."""

from __future__ import annotations

import math
import multiprocessing
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import said
from pictures import make_folder
from PIL import Image
from timm.data import Mixup
from tiny import Items, config, digits, network, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets.folder import pil_loader

from se_retrofit import RetrofitError, add_se, fold_se, load_retrofitted
from se_retrofit.finetune import Callbacks, Facts, engine, evaluate, finetune, load_data, parts, predict, transform_of
from se_retrofit.finetune.datasets import limited
from se_retrofit.finetune.learning import mixed
from se_retrofit.finetune.parts import layout_of
from se_retrofit.finetune.targets import targets_of
from se_retrofit.finetune.transforms import class_names_of, load_image, transforms_for
from se_retrofit.finetune.workers import told_plainly
from se_retrofit.inspection import excitations
from se_retrofit.models import Base

# Pictures


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_pictures_of_16_bits_are_scaled_by_their_range(ending: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 320).astype(np.uint16).reshape(8, 40)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(values).save(tmp_path / name / f"{number}.{ending}")
    image = load_data(tmp_path).train[0][0]
    assert np.allclose(np.asarray(image), values[..., None].repeat(3, 2) / 65535 * 255, rtol=0, atol=0.5001)
    prepare = transforms_for(network(), config(image_size=8), train=False)
    with Image.open(tmp_path / "a" / f"0.{ending}") as unread:  # as a data set of one's own may hand it on
        assert torch.equal(prepare(unread), prepare(image))


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "1"])
def test_palettes_and_transparency_are_as_in_torchvisions_loader(mode: str, tmp_path: Path) -> None:
    picture = Image.effect_noise((9, 7), 80).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.effect_noise((9, 7), 80))
    file = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture.save(file, **({"transparency": bytes(range(256))} if mode == "P" else {}))
    ours = load_image(file)  # without Pillow's warning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pil_loader(str(file))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_limit_takes_so_many_images_of_each_class_everywhere(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "pictures"), tmp_path / "run"
    (folder / "val" / "blue" / "4.jpg").unlink()
    small = ("--image-size", "32", "--cpu", "--workers", "0", "--batch-size", "4")
    for command, says in (
        (("finetune", "test_resnet", "--data", folder, "--limit", "3", "--max-updates", "1", *small, "--output", out), "6 images to train on, 6 to"),
        (("finetune", "--resume", out), "6 images to train on, 6 to"),
        (("evaluate", out, "--data", folder, "--limit", "5", "--cpu", "--workers", "0"), "9 images: accuracy"),
        (("fold", out, "--data", folder, "--limit", "2"), "over 4 inputs"),
    ):  # fmt: skip
        assert says in said(*command)
    whole = load_data(folder / "train")  # which is split by the folder of a run, and then cut
    for part in (whole.train, whole.val):
        few = limited(part, 2)
        assert [whole.train.dataset.targets[index] for index in few.indices] == [0, 0, 1, 1]
        assert few.indices == limited(part, 2).indices
        assert {*few.indices} <= {*part.indices}
        assert class_names_of(few) == ["blue", "red"]
    with pytest.raises(RetrofitError, match="does not tell"):
        limited([(torch.zeros(1), 0)], 2)


NAMES = [f"kind {number}" for number in range(10)]


class Rows:
    """Dicts, and columns by name, as a data set of Hugging Face's has them."""

    def __init__(self, image: str, label: str) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
        pictures = [Image.fromarray(pixels) for pixels in noise]
        self.columns: dict[str, Any] = {"id": list("ab" * 20), label: [n % 4 for n in range(40)], image: pictures}
        self.features = {image: SimpleNamespace(), "id": SimpleNamespace(), label: SimpleNamespace(names=NAMES)}

    def __len__(self) -> int:
        return 40

    def __getitem__(self, key: Any) -> Any:
        return self.columns[key] if isinstance(key, str) else {name: self.columns[name][key] for name in self.columns}


@pytest.mark.parametrize(("image", "label", "keys"), [("img", "fine_label", ()), ("photo", "kind", ("photo", "kind"))])
def test_dicts_of_pictures_are_the_same_data_everywhere(image: str, label: str, keys: tuple[str, str]) -> None:
    rows = Rows(image, label)
    pairs = [(row[image], row[label]) for row in (rows[n] for n in range(40))]
    model, recipe = network(), config(image_size=16, keys=keys)
    assert evaluate(model, rows, config=recipe).scores() == evaluate(model, pairs, config=recipe).scores()
    result = trained(model, rows, rows, {"image_size": 16, "keys": keys, "balance": "sampling"})
    assert result.best_accuracy == evaluate(model, pairs, config=recipe).accuracy
    prepare = transform_of(model)
    assert prepare(pairs[0][0]).shape == (3, 16, 16)
    assert class_names_of(rows, keys) == NAMES
    assert targets_of(rows, keys).tolist() == [target for _, target in pairs]  # type: ignore[union-attr]
    images, targets = torch.stack([prepare(picture) for picture, _ in pairs]), torch.tensor(rows[label])
    batches = [{"name": ["a"] * 20, label: targets[half], image: images[half]} for half in (slice(20), slice(20, 40))]
    ways = [rows, pairs, batches, DataLoader(TensorDataset(images, targets), 20)]
    gates = [excitations(model, data, keys=keys) for data in ways]
    folded = [fold_se(model, data, keys=keys, tolerance=1.0).fold_report for data in (rows, batches)]
    assert [seen.inputs for seen in gates] == [40] * 4
    for seen in gates:
        torch.testing.assert_close(seen.sites[0].class_means[3], gates[0].sites[0].class_means[3])
    assert [report.inputs for report in folded] == [40] * 2  # type: ignore[union-attr]
    assert folded[1].accuracy_before == folded[0].accuracy_before  # type: ignore[union-attr]

    # a transform gives items other keys than the columns have
    rows.columns = {"bild": rows.columns[image], "art": rows.columns[label]}
    renamed = config(image_size=16, keys=("bild", "art"))
    assert evaluate(model, rows, config=renamed).accuracy == result.best_accuracy
    with pytest.raises(RetrofitError, match="its targets"):
        trained(model, rows, None, {"image_size": 16, "keys": ("bild", "art"), "balance": "sampling"})


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


def test_the_odd_image_of_a_mixed_batch_keeps_its_class() -> None:
    images, targets = torch.rand(5, 3, 8, 8), torch.arange(5)
    blend, labels = mixed(Mixup(1.0, num_classes=5, label_smoothing=0.0), images, targets)
    assert blend.shape == images.shape
    assert torch.equal(blend[4], images[4])
    assert torch.equal(labels[4], torch.eye(5)[4])
    for batch_size, number in ((7, 21), (1, 3)):
        loader = DataLoader(Subset(digits().train, range(number)), batch_size)
        assert trained(data=loader, recipe={"mixup": 0.4, "cutmix": 0.4, "freeze_bn": True}).updates == 3


# What makes no batches, and labels


RAGGED = [(torch.zeros(3, 16 + number % 2, 16), 0) for number in range(8)]


def made_of(images: Tensor) -> TensorDataset:
    return TensorDataset(images, torch.zeros(len(images)).long())


PLAIN = made_of(torch.zeros(8, 3, 16, 16))


@pytest.mark.parametrize(
    ("data", "fields", "says"),
    [
        (made_of(torch.zeros(8, 1, 16, 16)), {}, r"\(8, 1, 16, 16\), torch.float32: Given groups=1"),
        (made_of(torch.zeros(8, 16, 16, 3)), {}, r"\(8, 16, 16, 3\)"),
        (made_of(torch.zeros(8, 3, 16, 16).byte()), {}, "torch.uint8"),
        (made_of(torch.zeros(8, 3, 16, 16).double()), {}, "torch.float64"),
        (RAGGED, {}, r"\(3, 16, 16\), \(3, 17, 16\)"),
        pytest.param(
            RAGGED, {"workers": 1}, r"^the images of a batch .*\(3, 17, 16\)$", marks=pytest.mark.sweep
        ),  # no traceback
        ([torch.zeros(3, 16, 16)] * 8, {}, r"^train_data .*\(image, class\) pairs.*Tensor"),
        ([{"photo": torch.zeros(3, 16, 16), "label": 0}] * 8, {}, r"keys photo, label.*keys="),
        ([{"image": torch.zeros(3, 16, 16), "name": "a"}] * 8, {}, r"^train_data .*keys image, name.*keys="),
        ([{"image": torch.zeros(3, 16, 16), "label": 0}] * 8, {"keys": ["image", "kind"]}, "not kind"),
        (
            [(torch.zeros(3, 16, 16), [1] * (1 + number // 7)) for number in range(8)],
            {},
            r"got \[1\], \[1, 1\]|got \[1, 1\], \[1\]",
        ),
        (DataLoader(PLAIN, batch_size=None), {}, r"train_data .*\(3, 16, 16\) and shape \(\)"),
        (Subset(PLAIN, [0]), {}, "freeze_bn=True"),  # too small for a batch norm
        (TensorDataset(PLAIN.tensors[0], torch.full((8,), -1)), {"balance": "sampling"}, "class -1, .* from 0"),
        (PLAIN, {"trackers": ["tensorboard"]}, "trackers need output_dir"),
        (DataLoader(Subset(PLAIN, range(3)), batch_size=2), {}, "drop_last=True"),
        (TensorDataset(PLAIN.tensors[0], torch.full((8,), 10)), {"mixup": 0.2}, "class 10, .* 0 to 9.*num_classes=11"),
        (TensorDataset(PLAIN.tensors[0], torch.full((8, 10), 2.5)), {}, r"2\.5 to 2\.5; .* classifiers"),
    ],
)
def test_data_that_make_no_batches_or_do_not_fit_are_refused_in_words(
    data: Any, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(RetrofitError, match=says):
        trained(data=data, recipe=fields)


def test_the_end_of_another_process_is_not_taken_for_a_fault_of_the_network() -> None:
    class Cut(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:545] Connection closed by peer")

    with pytest.raises(RuntimeError, match=r"^\[third_party/gloo"):
        engine.called(Cut(), PLAIN.tensors[0])


def test_an_error_in_a_loading_process_is_told_without_its_traceback() -> None:
    with pytest.raises(RetrofitError, match=r"^as it is$"), told_plainly():
        raise RetrofitError("Caught RetrofitError in worker 0.\nOriginal Traceback: ...\nRetrofitError: as it is")


@pytest.mark.parametrize("where", ["in loading", "in a step", "nowhere"])
def test_no_loading_process_outlives_its_run(where: str) -> None:
    def item(index: int) -> tuple[Tensor, int]:
        if where == "in loading":
            raise OSError("broken")
        return torch.zeros(3, 16, 16), index % 10

    def after_update(facts: Facts) -> None:
        if where == "in a step":
            raise RetrofitError("broken")

    with nullcontext() if where == "nowhere" else pytest.raises(RetrofitError, match="broken"):
        trained(data=Items(16, item), recipe={"workers": 1}, callbacks=Callbacks(after_update=after_update))
    assert not multiprocessing.active_children()


def test_images_of_the_validation_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(RetrofitError, match=r"\(8, 1, 16, 16\)"):
        trained(None, PLAIN, made_of(torch.zeros(8, 1, 16, 16)))


def test_an_epoch_without_a_number_is_not_the_best() -> None:
    class Overflowing(nn.Linear):
        """In the first epochs, and then no more."""

        evaluations = 0

        def forward(self, x: Tensor) -> Tensor:
            self.evaluations += not self.training
            return super().forward(x) + (0 if self.training or self.evaluations > 3 else math.nan)

    data = TensorDataset(torch.randn(16, 3), torch.arange(16) % 2)
    result = trained(Overflowing(3, 2), data, data, {"epochs": 4, "best_metric": "loss", "patience": 3})
    assert [math.isnan(row["val_loss"]) for row in result.history] == [True, True, True, False, False]
    assert result.best_epoch in (3, 4)


def test_each_of_several_labels_has_a_probability_of_its_own(tmp_path: Path) -> None:
    picture = Image.effect_noise((16, 16), 50).convert("RGB")
    picture.save(tmp_path / "picture.png")
    data = [(picture, torch.tensor([1.0, 0.0, 1.0]))] * 4
    model = Base.of("test_resnet", num_classes=3).build()
    recipe = {"multi_label": True, "loss": "bce", "image_size": 32}
    trained(model, data, data, recipe, output_dir=tmp_path / "run")
    again = load_retrofitted(tmp_path / "run" / "best")
    (found,), (row,) = (predict(net, [tmp_path / "picture.png"], top=3) for net in (again, model))
    assert found == row
    assert abs(sum(found.probabilities) - 1) > 1e-3


# Networks


@pytest.mark.parametrize(
    ("conv", "norm", "pool", "size"),
    [
        (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d, (16,)),
        (nn.Conv3d, nn.BatchNorm3d, nn.AdaptiveAvgPool3d, (4, 6, 6)),
    ],
)
def test_1d_and_3d_networks_are_trained(
    conv: Any, norm: Any, pool: Any, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the layout that they get on CUDA."""
    for module in (parts, engine):
        monkeypatch.setattr(module, "layout_of", lambda value, _: layout_of(value, torch.device("cuda")))
    chain = [layer for channels in (3, 8) for layer in (conv(channels, 8, 3, padding=1), norm(8), nn.ReLU())]
    bare = nn.Sequential(*chain, pool(1), nn.Flatten(), nn.Linear(8, 2))
    model = add_se(bare, example_inputs=torch.zeros(2, 3, *size))
    data = TensorDataset(torch.randn(8, 3, *size), torch.arange(8) % 2)
    assert trained(model, data, data, {"batch_size": 4}).updates == 2
    if len(size) == 3:
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_a_sharded_network_is_refused() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(RetrofitError, match=r"fully_shard"):
            finetune(model, digits().train, config=config(), quiet=True)
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
                # Inductor reads the older settings, up to torch 2.10, and torch raises an error if the two differ
                older = {
                    products.allow_tf32,
                    torch.backends.cudnn.allow_tf32,
                    torch.get_float32_matmul_precision() == "high",
                }
                assert older == {value == "tf32"}
            assert (products.fp32_precision, convolutions.fp32_precision) == theirs
        if own == "old":
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(legacy)
        products.fp32_precision, convolutions.fp32_precision = before
