"""What a practitioner meets on the first day: odd batches, 3d networks, optimizers of every kind, full folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import Mixup
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from se_retrofit import RetrofitError, add_se
from se_retrofit.finetune import FinetuneConfig, NamedData, evaluate, finetune
from se_retrofit.finetune.engine import fast_math
from se_retrofit.finetune.train import mixed

Network = Callable[..., nn.Module]
Config = Callable[..., FinetuneConfig]


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
def test_channels_last_trains_1d_and_3d_networks(
    config: Config, conv: type[nn.Module], norm: type[nn.Module], size: tuple[int, ...]
) -> None:
    pool = nn.AdaptiveAvgPool1d(1) if len(size) == 1 else nn.AdaptiveAvgPool3d(1)
    bare = nn.Sequential(conv(3, 8, 3, padding=1), Residual(conv, norm), pool, nn.Flatten(), nn.Linear(8, 2))
    model = add_se(bare, example_inputs=torch.zeros(2, 3, *size))
    data = TensorDataset(torch.randn(8, 3, *size), torch.arange(8) % 2)
    recipe = config(epochs=1, batch_size=4, channels_last=True)
    result = finetune(model, data, data, config=recipe, quiet=True)
    assert result.updates == 2
    if len(size) == 3:
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    evaluate(model, data, config=recipe)


def test_mixup_takes_odd_batches_and_batches_of_one(network: Network, config: Config, digits: NamedData) -> None:
    recipe = config(epochs=1, mixup=0.4, cutmix=0.4)
    for batch_size, images in ((7, 21), (1, 3)):
        loader = DataLoader(Subset(digits.train, range(images)), batch_size)
        assert finetune(network(), loader, config=config(**{**recipe.to_dict(), "freeze_bn": True})).updates == 3


def test_the_odd_image_of_a_mixed_batch_keeps_its_class() -> None:
    images, targets = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    blend, labels = mixed(Mixup(1.0, num_classes=5, label_smoothing=0.0), images, targets)
    assert blend.shape == images.shape
    assert labels.shape == (5, 5)
    assert torch.equal(blend[4], images[4])
    assert torch.equal(labels[4], torch.eye(5)[4])


def test_a_class_that_the_network_lacks_is_found_before_the_images_are_mixed(
    network: Network, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        for tf32, value in ((True, "tf32"), (False, "ieee")):
            with fast_math(FinetuneConfig(tf32=tf32)):
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
    network: Network, config: Config, digits: NamedData, tmp_path: Path, folder: str
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
    network: Network, config: Config, digits: NamedData, optimizer: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RetrofitError, match=says):
        finetune(network(), digits.train, config=config(optimizer=optimizer, optimizer_options=options), quiet=True)


def test_an_optimizer_whose_state_cannot_be_written_is_refused_or_resumes(
    network: Network, config: Config, digits: NamedData, tmp_path: Path
) -> None:
    with pytest.raises(RetrofitError, match=r"the state of optimizer 'adafactorbv' can't be written"):
        finetune(network(), digits.train, config=config(optimizer="adafactorbv"), output_dir=tmp_path, quiet=True)


def test_a_sharded_network_is_refused(network: Network, config: Config, digits: NamedData) -> None:
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


def test_validation_images_may_lack_a_class(tmp_path: Path) -> None:
    import shutil

    from pictures import make_folder

    from se_retrofit.finetune import load_data

    root = make_folder(tmp_path)
    shutil.rmtree(root / "val" / "blue")
    data = load_data(root)
    assert data.num_classes == 2
    assert {target for _, target in data.val} == {data.train.class_to_idx["red"]}
    (root / "val" / "green").mkdir()
    with pytest.raises(RetrofitError, match=r"classes that the training folder lacks: green"):
        load_data(root)


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
