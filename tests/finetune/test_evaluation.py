"""A result stands alone: it knows its classes and transform, is evaluated class by class, classifies files, and is trained on."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.metrics
import timm
import torch
from command_line import called as run
from command_line import said
from matplotlib.figure import Figure
from pictures import cut_short, make_folder
from PIL import Image
from safetensors.torch import load_file
from tiny import config, network, rows_in, state_of, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from se_retrofit import RetrofitError, load_retrofitted, save_retrofitted
from se_retrofit.cli.starting import run_settings
from se_retrofit.finetune import Callbacks, Facts, FinetuneConfig, engine, evaluate, load_data, predict, transform_of
from se_retrofit.finetune.transforms import class_names
from se_retrofit.models import IMAGES, Base, load_checkpoint


def test_the_result_gives_the_transform_of_its_validation(result: Path, pictures: Path) -> None:
    model = load_retrofitted(result / "best")
    data = load_data(pictures).val
    image = data[0][0]
    prepared = transform_of(model)(image)
    assert prepared.shape == (3, 64, 64)
    config = timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=timm.create_model("test_resnet"))
    assert torch.equal(prepared, timm.data.create_transform(**config)(image))
    # so evaluation needs to be told no size, and gives what the run measured
    best = max(row["val_accuracy"] for row in rows_in(result / "metrics.jsonl"))
    assert evaluate(model, data, config=FinetuneConfig(cpu=True, workers=0)).accuracy == best
    again = load_retrofitted(save_retrofitted(copy.deepcopy(model), result.parent / "again"))
    assert torch.equal(transform_of(again)(image), prepared)


def test_a_run_on_tensors_tells_no_transform_but_the_size_that_it_is_evaluated_at(tmp_path: Path) -> None:
    val = load_data("digits", image_size=16).val  # of tensors nothing else tells the size
    best = trained(None, val, val, {"batch_size": 90, "image_size": 16}, output_dir=tmp_path / "run")
    with pytest.raises(RetrofitError, match="how its images are prepared"):
        transform_of(best.model)
    saved = tmp_path / "run" / "best"
    assert json.loads((saved / "recipe.json").read_text())["base"] is None  # the tiny network is of no library
    assert run_settings(saved)["image_size"] == 16
    assert run_settings(tmp_path / "run" / "last") == {}
    again = load_retrofitted(saved, base=network(se=False))
    chosen = FinetuneConfig(**run_settings(saved), cpu=True)
    assert evaluate(again, val, config=chosen).accuracy == best.best_accuracy


@pytest.mark.usefixtures("drawn_pictures")
def test_evaluate_prints_a_table_and_draws_the_confusion(
    result: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("--confusion", tmp_path / "confusion.png", "--output", tmp_path / "e.json")
    command = ("evaluate", result, "--data", pictures, *files, "--cpu", "--workers", "0")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "processes", lambda: (1, 2))  # the other one prints and writes
        assert said(*command) == ""
        assert not any(tmp_path.iterdir())
    lines = said(*command).splitlines()
    assert lines[1].split() == ["class", "images", "precision", "recall", "F1"]
    assert [line.split()[:2] for line in lines[3:5]] == [["blue", "5"], ["red", "5"]]
    figures = json.loads((tmp_path / "e.json").read_text())
    assert (figures["split"], figures["about"]) == ("val", lines[0])
    assert f"10 images: accuracy {figures['accuracy']:.2%}, mean F1" in lines[5]
    assert figures["confusion"][0][0] + figures["confusion"][0][1] == 5
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.size[0] > 300


def test_predict_writes_what_the_network_computes(result: Path, pictures: Path, tmp_path: Path) -> None:
    one = pictures / "train" / "red" / "0.jpg"
    output = said("predict", result / "best", pictures / "val", one, "--top", "2", "--cpu")
    rows = list(csv.DictReader(output.splitlines()))
    assert [Path(row["file"]).parent.name for row in rows] == ["blue"] * 5 + ["red"] * 6
    model = load_retrofitted(result / "best")
    with Image.open(rows[7]["file"]) as image, torch.no_grad():
        shares = model(transform_of(model)(image)[None]).softmax(1)[0]
    assert rows[7]["class_1"] == ("blue", "red")[int(shares.argmax())]
    assert float(rows[7]["probability_1"]) == pytest.approx(float(shares.max()), abs=1e-5)
    assert float(rows[7]["probability_1"]) + float(rows[7]["probability_2"]) == pytest.approx(1, abs=1e-5)
    assert said("predict", result, pictures / "val", "--output", tmp_path / "p.csv", "--cpu") == ""
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "file,class,probability"
    assert said("predict", result, one, "--output", "-", "--cpu").startswith("file,class,probability")
    shutil.copytree(pictures / "val", tmp_path / "more")
    shutil.copytree(pictures / "val", tmp_path / "more" / "red" / ".ipynb_checkpoints")
    assert len(list(predict(model, [tmp_path / "more"], batch_size=3))) == 10
    half = next(predict(model.bfloat16(), one))
    assert (half.classes[0], round(half.probabilities[0], 1)) == (rows[-1]["class_1"], round(float(shares.max()), 1))
    assert evaluate(model, load_data(pictures).val, config=FinetuneConfig(cpu=True, workers=0)).images == 10
    vars(model)[IMAGES]["classes"] = ["blue"]  # fewer than the head has, as where a head of 1000 is kept
    assert {*next(predict(model, [one], top=2)).classes} == {"blue", "1"}


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("predict", "RUN", "pictures/val", "--batch-size", "2"), 1),  # which could not do all
        (("evaluate", "RUN", "--data", "pictures", "--workers", "0", "--output", "-"), 0),
        (("fold", "RUN", "--data", "pictures", "--tolerance", "100", "--json", "fold.json"), 0),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_images_that_cannot_be_read_are_named_and_skipped_where_so_asked(
    command: tuple[str, ...], code: int, result: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "pictures")
    bad = cut_short(Path("pictures", "val", "blue", "1.png"))
    words = [result if word == "RUN" else word for word in command]
    with pytest.raises(RetrofitError, match=rf"{bad}.*skip"):
        raise run(*words).exception or AssertionError(command)
    skipped = run(*words, "--bad-images", "skip")
    assert skipped.output.count(str(bad)) == 1
    assert skipped.exit_code == code
    if command[0] == "predict":
        rows = list(csv.DictReader(skipped.stdout.splitlines()))
        names = ["0.jpg", "1.png", "2.jpg", "3.png", "4.jpg"]
        assert [Path(row["file"]).name for row in rows] == [*names[:1], *names[2:], *names]
    elif command[0] == "evaluate":
        assert "9 images: accuracy" in skipped.stderr
        assert json.loads(skipped.stdout)["images"] == 9  # and nothing else
    else:
        assert json.loads(Path("fold.json").read_text())["inputs"] == 9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("predict", "RUN", "nowhere.jpg"), "nowhere.jpg"),
        (("predict", "RUN", "README"), "README can't be read"),
        (("predict", "RUN", "empty"), "empty holds no images"),
        (("evaluate", "nowhere", "--data", "nothing", "--confusion", "matrix.xyz"), "matrix.xyz has no suffix"),
        (("evaluate", "empty", "--data", "digits"), "empty holds no network"),
        (("evaluate", "RUN", "--data", "others"), "classes blue, red, .* green, red"),
        (("fold", "RUN", "--data", "others"), "classes blue, red, .* green, red"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], says: str, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("README").write_text("no image")
    make_folder(Path("others"), ("green", "red"))
    with pytest.raises(RetrofitError, match=says):
        raise run(*(result if word == "RUN" else word for word in arguments)).exception or AssertionError(arguments)


def test_a_head_for_more_classes_than_the_data_names_is_evaluated(pictures: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    found = evaluate(model, load_data(pictures).val, config=config(image_size=32))
    assert [scores.name for scores in found.classes] == ["blue", "red", "2", "3"]
    assert found.confusion.shape == (4, 4)


# Training on


@pytest.mark.parametrize(
    ("names", "recipe", "becomes"),
    [
        (("blue", "red"), {"num_classes": 2}, ""),
        (("green", "yellow"), {}, "the data has green, yellow: the head is kept, "),
        (("green", "yellow"), {"num_classes": 2}, "the data has green, yellow: the head is new"),
        (("blue", "green", "red"), {"num_classes": 3}, "the data has blue, green, red: the head is new"),
    ],
)
def test_a_run_begins_with_the_weights_of_a_result_and_says_what_becomes_of_its_head(
    names: tuple[str, ...], recipe: dict[str, Any], becomes: str, result: Path, tmp_path: Path, capsys: Any
) -> None:
    data, begun = load_data(make_folder(tmp_path / "data", names)), {}

    def note(facts: Facts) -> None:
        if facts.epoch == 0:
            begun.update(state_of(facts.model))

    model = load_retrofitted(result / "best")
    recipe = {"batch_size": 8, **recipe}  # the image size is the result's own
    options: dict[str, Any] = {"output_dir": tmp_path, "callbacks": Callbacks(after_evaluation=note), "quiet": False}
    found = trained(model, data, recipe=recipe, **options)
    said = [line for line in capsys.readouterr().out.splitlines() if "was fine-tuned on the classes" in line]
    assert len(said) == bool(becomes)
    assert all(f"on the classes blue, red, and {becomes}" in line for line in said)
    for key, value in load_file(result / "best" / "weights.safetensors").items():
        same = begun[key].shape == value.shape and torch.equal(begun[key], value)
        assert same == ("new" not in becomes or not key.startswith("fc.")), key
    again = load_retrofitted(tmp_path / "best")
    assert class_names(again) == list(names)
    assert evaluate(again, data.val, config=config()).accuracy == found.best_accuracy


def test_a_result_that_is_given_as_a_checkpoint_is_told_where_it_goes(result: Path) -> None:
    bare = Base.of("timm/test_resnet", num_classes=2).build()
    with pytest.raises(RetrofitError, match=r"is a folder, .* its folder goes in MODEL's place"):
        load_checkpoint(bare, result)
    with pytest.raises(RetrofitError, match=r"holds SE: give its folder to load_retrofitted, or in MODEL's place"):
        load_checkpoint(bare, result / "best" / "weights.safetensors")


# Scores

CLASSES = 7
CONFIG = FinetuneConfig(cpu=True, batch_size=16)


# whose images are the logits
ANSWERS = nn.Sequential(nn.Flatten(), nn.PReLU(init=1.0))


def one_class(images: int = 150) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(CLASSES - 2, (images,), generator=generator)  # the last two classes have no image
    logits = torch.randn(images, CLASSES, generator=generator)
    logits[torch.arange(images), targets] += 1.0
    logits[:, CLASSES - 1] -= 100.0  # and the last is never answered
    return logits, targets


@pytest.mark.parametrize("loader", [False, True])
def test_scores_of_classes_agree_with_scikit_learn(loader: bool) -> None:
    logits, targets = one_class()
    data = TensorDataset(logits[:, :, None, None], targets)
    scores = evaluate(ANSWERS, DataLoader(data, 7) if loader else data, config=CONFIG)
    said, true, labels = logits.argmax(1).numpy(), targets.numpy(), range(CLASSES)
    each = sklearn.metrics.precision_recall_fscore_support(true, said, labels=labels, zero_division=0.0)
    for at, name in enumerate(("precision", "recall", "f1", "images")):
        assert [getattr(found, name) for found in scores.classes] == pytest.approx(each[at].tolist())
        if name != "images":  # a class that neither is nor is answered has no part in the mean
            assert getattr(scores, name) == pytest.approx(each[at][: CLASSES - 1].mean())
    assert scores.confusion.tolist() == sklearn.metrics.confusion_matrix(true, said, labels=labels).tolist()
    assert scores.right.tolist() == (said == true).tolist()
    assert scores.accuracy == pytest.approx(sklearn.metrics.accuracy_score(true, said))
    assert scores.top5 == pytest.approx(sklearn.metrics.top_k_accuracy_score(true, logits.numpy(), k=5, labels=labels))
    shares = logits.double().softmax(1).numpy()
    assert scores.loss == pytest.approx(sklearn.metrics.log_loss(true, shares, labels=labels), rel=1e-5)

    # soft labels count as their greatest class
    soft = nn.functional.one_hot(targets, CLASSES) * 0.7 + 0.3 / CLASSES
    softened = evaluate(ANSWERS, TensorDataset(logits[:, :, None, None], soft), config=CONFIG)
    assert softened.f1 == scores.f1
    assert softened.loss > scores.loss


def test_the_confusion_of_classes_with_long_and_odd_names_has_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets = one_class()
    found = evaluate(ANSWERS, TensorDataset(logits[:, :, None, None], targets), config=CONFIG)
    named = replace(
        found, classes=tuple(replace(c, name=f"$class_{{$ {c.name} {'of a long name ' * 9}") for c in found.classes)
    )
    sizes = []

    def look(figure: Figure, *args: Any, **kwargs: Any) -> None:
        save(figure, *args, **kwargs)
        figure.draw_without_rendering()
        axes = figure.axes[0]
        sizes.append(axes.get_window_extent().width / figure.dpi)
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            assert all(figure.bbox.contains(*corner) for corner in label.get_window_extent().corners())

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", look)
    for evaluation in (found, named):
        evaluation.plot(tmp_path / "confusion.png")
    assert sizes[1] == pytest.approx(sizes[0], rel=0.25)
    assert sizes[1] > 2.2


def test_scores_of_several_labels_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(4)
    targets = (torch.rand(150, CLASSES, generator=generator) < torch.linspace(0.05, 0.6, CLASSES)).long()
    targets[:, 2] = 0  # a label that no image has
    logits = torch.randn(150, CLASSES, generator=generator) + targets
    data = TensorDataset(logits[:, :, None, None], targets)
    scores = evaluate(ANSWERS, data, config=CONFIG.replace(multi_label=True, loss="bce"))
    said, true, probable = (logits > 0).long().numpy(), targets.numpy(), logits.sigmoid().numpy()
    f1 = sklearn.metrics.f1_score(true, said, average="macro", zero_division=0.0)
    assert scores.f1 == pytest.approx(f1, rel=1e-6)
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
    with pytest.raises(RetrofitError, match="several labels"):
        _ = scores.confusion
    empty = TensorDataset(torch.randn(8, CLASSES), torch.zeros(8, CLASSES))
    assert evaluate(ANSWERS, empty, config=CONFIG.replace(multi_label=True, loss="bce")).map == 0.0
