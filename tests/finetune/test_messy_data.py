"""Pictures and batches as people have them: read right, or named."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import said
from pictures import make_folder
from PIL import Image
from tiny import config, network, trained
from torch.utils.data import DataLoader
from torchvision.datasets.folder import pil_loader

from se_retrofit import RetrofitError, fold_se
from se_retrofit.finetune import FinetuneConfig, evaluate, load_data, transform_of
from se_retrofit.finetune.datasets import limited
from se_retrofit.finetune.targets import targets_of
from se_retrofit.finetune.transforms import class_names_of, load_image, transforms_for
from se_retrofit.inspection import excitations


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_grey_pictures_of_16_bits_are_scaled_by_their_range(ending: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 320).astype(np.uint16).reshape(8, 40)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(values).save(tmp_path / name / f"{number}.{ending}")
    image = load_data(tmp_path).train[0][0]
    assert np.allclose(np.asarray(image), values[..., None].repeat(3, 2) / 65535 * 255, rtol=0, atol=0.5001)
    prepare = transforms_for(network(), FinetuneConfig(image_size=8), train=False)
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
        for most in (1, 2):
            few = limited(part, most)
            assert [whole.train.dataset.targets[index] for index in few.indices] == [0] * most + [1] * most
        assert few.indices == limited(part, 2).indices
        assert {*few.indices} <= {*part.indices}
        assert class_names_of(few) == ["blue", "red"]
    with pytest.raises(RetrofitError, match="does not tell"):
        limited([(torch.zeros(1), 0)], 2)


NAMES = [f"kind {number}" for number in range(10)]


class Rows:
    """Dicts, and columns by name, as a data set of Hugging Face's has them."""

    def __init__(self, image: str, label: str) -> None:
        generator = np.random.default_rng(0)
        noise = generator.integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
        self.columns = {
            "id": list("ab" * 20),
            label: [n % 4 for n in range(40)],
            image: list(map(Image.fromarray, noise)),
        }
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
    assert transform_of(model)(pairs[0][0]).shape == (3, 16, 16)
    assert class_names_of(rows, keys) == NAMES
    assert targets_of(rows, keys).tolist() == [target for _, target in pairs]  # type: ignore[union-attr]

    prepare = transform_of(model)
    batches = [
        {
            "name": ["a"] * 20,
            label: torch.tensor([t for _, t in part]),
            image: torch.stack([prepare(i) for i, _ in part]),
        }
        for part in (pairs[:20], pairs[20:])
    ]
    ways = [rows, pairs, batches, DataLoader([(prepare(i), t) for i, t in pairs], 20)]
    gates = [excitations(model, data, keys=keys) for data in ways]
    folded = [fold_se(model, data, keys=keys, tolerance=1.0).fold_report for data in ways]
    for seen, report in zip(gates, folded, strict=True):
        assert (seen.inputs, report.inputs) == (40, 40)  # type: ignore[union-attr]
        torch.testing.assert_close(seen.sites[0].class_means[3], gates[0].sites[0].class_means[3])
        assert report.accuracy_before == folded[0].accuracy_before  # type: ignore[union-attr]

    rows.columns = {
        "bild": rows.columns[image],
        "art": rows.columns[label],
    }  # a transform gives items of other keys than the columns'
    renamed = config(image_size=16, keys=("bild", "art"))
    assert evaluate(model, rows, config=renamed).accuracy == result.best_accuracy
    with pytest.raises(RetrofitError, match="does not tell its targets"):
        trained(model, rows, None, {"image_size": 16, "keys": ("bild", "art"), "balance": "sampling"})
