"""A result stands alone: it knows its classes and transform, is evaluated class by class, and classifies files."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from pathlib import Path

import pytest
import sklearn.metrics
import timm
import torch
from pictures import make_folder
from PIL import Image
from tiny import config, network
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner, Result

from se_retrofit import RetrofitError, add_se, load_retrofitted, plan_of, save_retrofitted
from se_retrofit.cli.commands import app
from se_retrofit.cli.folders import run_settings
from se_retrofit.finetune import FinetuneConfig, NamedData, evaluate, finetune, load_data, predict, transform_of

pytestmark = pytest.mark.usefixtures("drawn_pictures")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The folder of a run on red and blue pictures."""
    data = load_data(pictures)
    torch.manual_seed(0)
    model = add_se(timm.create_model("resnet10t", num_classes=2))
    config = FinetuneConfig(
        epochs=2, batch_size=8, image_size=64, workers=0, transform_options={"scale": (0.8, 1.0)}, cpu=True
    )
    folder = tmp_path_factory.mktemp("run")
    finetune(model, data.train, data.val, config=config, output_dir=folder, quiet=True)
    return folder


@pytest.mark.sweep
def test_the_result_gives_the_transform_of_its_validation(result: Path, pictures: Path) -> None:
    model = load_retrofitted(result / "best")
    data = load_data(pictures).val
    image = data[0][0]
    prepared = transform_of(model)(image)
    assert prepared.shape == (3, 64, 64)
    config = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=timm.create_model("resnet10t"))
    assert torch.equal(prepared, timm.data.create_transform(**config)(image))
    # so evaluation needs to be told no size, and gives what the run measured
    best = max(json.loads(line)["val_accuracy"] for line in (result / "metrics.jsonl").read_text().splitlines())
    assert evaluate(model, data, config=FinetuneConfig(cpu=True, workers=0)).accuracy == best
    again = load_retrofitted(save_retrofitted(copy.deepcopy(model), result.parent / "again"))
    assert torch.equal(transform_of(again)(image), prepared)


def test_a_network_that_was_trained_on_tensors_does_not_pretend_to_know(digits: NamedData) -> None:
    model = network()
    finetune(model, digits.train, config=config(epochs=1), quiet=True)
    with pytest.raises(RetrofitError, match="does not tell how its images are prepared"):
        transform_of(model)


def test_evaluate_prints_a_table_and_draws_the_confusion(result: Path, pictures: Path, tmp_path: Path) -> None:
    said = run(
        "evaluate", result, "--data", pictures, "--confusion", tmp_path / "confusion.png", "--output", tmp_path / "e.json",
        "--cpu", "--workers", "0",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    assert lines[0] == f"val of {pictures}: 10 images"
    assert lines[1].split() == ["class", "images", "precision", "recall", "F1"]
    assert [line.split()[:2] for line in lines[3:5]] == [["blue", "5"], ["red", "5"]]
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (figures["split"], figures["about"]) == ("val", lines[0])
    assert f"10 images: accuracy {figures['accuracy']:.2%}, mean F1" in lines[5]
    assert figures["confusion"][0][0] + figures["confusion"][0][1] == 5
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size[0] > 300


def test_predict_writes_what_the_network_computes(result: Path, pictures: Path, tmp_path: Path) -> None:
    said = run(
        "predict", result / "best", pictures / "val", pictures / "train" / "red" / "0.jpg", "--top", "2", "--cpu"
    )
    assert said.exit_code == 0, said.output
    rows = list(csv.DictReader(said.output.splitlines()))
    assert [Path(row["file"]).parent.name for row in rows] == ["blue"] * 5 + ["red"] * 6
    model = load_retrofitted(result / "best")
    with Image.open(rows[7]["file"]) as image, torch.no_grad():
        shares = model(transform_of(model)(image)[None]).softmax(1)[0]
    assert rows[7]["class_1"] == ("blue", "red")[int(shares.argmax())]
    assert float(rows[7]["probability_1"]) == pytest.approx(float(shares.max()), abs=1e-5)
    assert float(rows[7]["probability_1"]) + float(rows[7]["probability_2"]) == pytest.approx(1, abs=1e-5)
    written = run("predict", result, pictures / "val", "--output", tmp_path / "p.csv", "--cpu")
    assert written.output == ""
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "file,class,probability"
    assert len(list(predict(model, [pictures / "val"], batch_size=3))) == 10


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("predict", "RUN", "nowhere.jpg"), "no file or folder nowhere.jpg", 1),
        (("predict", "RUN", "README"), "can't be read as an image", 1),
        (("predict", "RUN", "empty"), "empty holds no images", 1),
        (("predict", "empty", "README"), "holds no network that add, finetune or fold wrote", 1),
        (("evaluate", "empty", "--data", "digits"), "holds no network that add, finetune or fold wrote", 1),
        (("evaluate", "RUN", "--data", "digits", "--split", "tests"), "--split", 2),
        (("predict", "RUN", "README", "--top", "0"), "--top", 2),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], said: str, code: int, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "README").write_text("no image")
    found = run(*(result if argument == "RUN" else argument for argument in arguments))
    if code == 2:
        assert found.exit_code == 2
        assert said in found.output
    else:
        assert isinstance(found.exception, RetrofitError)
        assert said in str(found.exception)


def test_a_folder_of_classes_alone_is_split_the_same_way_every_time(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "train", tmp_path / "flowers")
    first, second = (load_data(tmp_path / "flowers", val_fraction=0.25) for _ in range(2))
    assert first.val.indices == second.val.indices
    assert sorted([*first.train.indices, *first.val.indices]) == list(range(24))
    targets = ImageFolder(str(tmp_path / "flowers")).targets
    assert [targets[index] for index in first.val.indices] == [0] * 3 + [1] * 3  # of each class as many
    assert "6 of its 24 images, of each class, are for validation" in first.note
    for file in sorted((tmp_path / "flowers" / "red").iterdir())[1:]:
        file.unlink()
    with pytest.raises(RetrofitError, match=r"flowers.red has 1 images, too few"):
        load_data(tmp_path / "flowers")


@pytest.mark.sweep
def test_what_convert_wrote_is_fine_tuned_as_it_is(tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    assert (
        run("add", "timm/test_resnet", "--reduction", "4", "--include", "layer4.*", "--output", converted).exit_code
        == 0
    )
    arguments = ("--data", "digits", "--image-size", "32", "--epochs", "1", "--cpu", "--output", tmp_path / "run")
    said = run("finetune", converted, *arguments)
    assert said.exit_code == 0, said.output
    trained = load_retrofitted(tmp_path / "run" / "best")
    assert [site.block for site in plan_of(trained).sites] == ["layer4.0"]
    assert plan_of(trained).options["reduction"] == 4
    assert trained.num_classes == 10
    assert run("finetune", converted, "--reduction", "8", *arguments).exit_code == 2


@pytest.mark.sweep
def test_a_run_is_evaluated_at_the_size_that_it_was_trained_at(tmp_path: Path) -> None:
    data = load_data("digits", image_size=16)  # of tensors nothing else tells the size
    recipe = config(epochs=1, image_size=16)
    best = finetune(network(), data.train, data.val, config=recipe, output_dir=tmp_path / "run", quiet=True)
    saved = tmp_path / "run" / "best"
    recipe_file = json.loads((saved / "recipe.json").read_text())
    assert recipe_file["base"] is None  # the tiny network is of no library
    assert run_settings(saved)["image_size"] == 16
    assert run_settings(tmp_path / "run" / "last") == {}
    again = load_retrofitted(saved, base=network(se=False))
    chosen = FinetuneConfig(**run_settings(saved), cpu=True)
    assert evaluate(again, data.val, config=chosen).accuracy == best.best_accuracy


def test_data_with_other_classes_is_refused_rather_than_miscounted(
    result: Path, pictures: Path, tmp_path: Path
) -> None:
    for part in ("train", "val"):
        shutil.copytree(pictures / part / "red", tmp_path / part / "green")
        shutil.copytree(pictures / part / "red", tmp_path / part / "red")
    said = run("evaluate", result, "--data", tmp_path, "--cpu")
    assert isinstance(said.exception, RetrofitError)
    assert "fine-tuned on the classes blue, red, and the data has green, red" in str(said.exception)


def test_a_head_for_more_classes_than_the_data_names_is_evaluated(pictures: Path) -> None:
    found = evaluate(
        timm.create_model("resnet10t", num_classes=4), load_data(pictures).val,
        config=FinetuneConfig(cpu=True, workers=0, image_size=32),
    )  # fmt: skip
    assert [scores.name for scores in found.classes] == ["blue", "red", "2", "3"]
    assert found.confusion.shape == (4, 4)


CLASSES = 7
CONFIG = FinetuneConfig(cpu=True, batch_size=16)


class Answers(nn.Module):
    """Images are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.scale


def one_class(images: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(CLASSES - 2, (images,), generator=generator)  # the last two classes have no image
    logits = torch.randn(images, CLASSES, generator=generator)
    logits[torch.arange(images), targets] += 1.0
    logits[:, CLASSES - 1] -= 100.0  # and the last is never answered
    return logits, targets


def several_labels(images: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    targets = (torch.rand(images, CLASSES, generator=generator) < torch.linspace(0.05, 0.6, CLASSES)).long()
    targets[:, 2] = 0  # a label that no image has
    return torch.randn(images, CLASSES, generator=generator) + targets, targets


@pytest.mark.parametrize("loader", [False, True])
def test_scores_of_classes_agree_with_scikit_learn(loader: bool) -> None:
    logits, targets = one_class()
    data = TensorDataset(logits[:, :, None, None], targets)
    scores = evaluate(Answers(), DataLoader(data, 7) if loader else data, config=CONFIG)
    said, true = logits.argmax(1).numpy(), targets.numpy()
    labels = range(CLASSES)
    each = sklearn.metrics.precision_recall_fscore_support(true, said, labels=labels, zero_division=0.0)
    for at, name in enumerate(("precision", "recall", "f1", "images")):
        assert [getattr(found, name) for found in scores.classes] == pytest.approx(each[at].tolist())
        if name != "images":  # a class that neither is nor is answered has no part in the mean
            assert getattr(scores, name) == pytest.approx(each[at][: CLASSES - 1].mean())
    assert scores.confusion.tolist() == sklearn.metrics.confusion_matrix(true, said, labels=labels).tolist()
    assert scores.right.tolist() == (said == true).tolist()
    assert scores.accuracy == pytest.approx(sklearn.metrics.accuracy_score(true, said))
    top5 = sklearn.metrics.top_k_accuracy_score(true, logits.numpy(), k=5, labels=range(CLASSES))
    assert scores.top5 == pytest.approx(top5)
    assert scores.loss == pytest.approx(
        sklearn.metrics.log_loss(true, logits.double().softmax(1).numpy(), labels=range(CLASSES)), rel=1e-5
    )


def test_scores_of_several_labels_agree_with_scikit_learn() -> None:
    logits, targets = several_labels()
    config = CONFIG.replace(multi_label=True, loss="bce")
    data = TensorDataset(logits[:, :, None, None], targets)
    scores = evaluate(Answers(), data, config=config)
    said, true, probable = (logits > 0).long().numpy(), targets.numpy(), logits.sigmoid().numpy()
    assert scores.f1 == pytest.approx(
        sklearn.metrics.f1_score(true, said, average="macro", zero_division=0.0), rel=1e-6
    )
    held = [label for label in range(CLASSES) if true[:, label].any()]
    assert len(held) == CLASSES - 1
    averages = []
    for label in held:  # of each image that has it: the share of those that have it among the images no less probable
        before = probable[:, label] >= probable[true[:, label] == 1, label][:, None]
        averages.append((before * true[:, label]).sum(1) / before.sum(1))
    assert scores.map == pytest.approx(sum(average.mean() for average in averages) / len(held))
    assert scores.accuracy == pytest.approx((said == true).mean())
    assert "average precision" in str(scores)
    assert json.loads(json.dumps(scores.to_dict()))["map"] == scores.map
    with pytest.raises(RetrofitError, match="no class is taken for another"):
        _ = scores.confusion


def test_soft_labels_count_as_their_greatest_class() -> None:
    logits, targets = one_class()
    soft = nn.functional.one_hot(targets, CLASSES) * 0.7 + 0.3 / CLASSES
    hard = evaluate(Answers(), TensorDataset(logits[:, :, None, None], targets), config=CONFIG)
    scores = evaluate(Answers(), TensorDataset(logits[:, :, None, None], soft), config=CONFIG)
    assert scores.f1 == hard.f1
    assert scores.loss > hard.loss
