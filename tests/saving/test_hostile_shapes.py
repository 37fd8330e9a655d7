"""JSON and YAML of any shape, and inputs of any class: loaded, or one error that says what is wrong; never run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sweeps import swept
from torch import nn

from se_retrofit import RetrofitError, add_se, load_retrofitted, save_retrofitted
from se_retrofit.plaindata import parse_json, parse_yaml
from se_retrofit.plan import Plan
from se_retrofit.saving import load_se, save_se
from se_retrofit.surgery.record.inputs import described_inputs

NETWORK = "test_resnet"  # timm's smallest
MODULE = nn.Conv2d(3, 4, 3)
IMAGES = {
    "input_size": [3, 64, 64], "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop_pct": 0.9,
    "crop_mode": "center", "classes": ["a", "b"], "multi_label": False,
}  # fmt: skip


class Gone:
    def __repr__(self) -> str:
        return "gone"


GONE = Gone()
HOSTILE = swept([GONE, 10**30], [None, [], True, -1, float("nan"), "", "../x", [[1]], {"a": 1}])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = add_se(timm.create_model(NETWORK, num_classes=2))
    vars(network)["_se_images"] = IMAGES
    folder = tmp_path_factory.mktemp("sound")
    save_se(network, folder / "se.safetensors")
    return save_retrofitted(network, folder / "saved")


def places(data: Any, depth: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value; of lists, to the first entry alone."""
    yield path
    entries = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in entries if depth else ():
        yield from places(value, depth - 1, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    data = copy.deepcopy(data)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    if value is GONE:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return data


def refusals(data: Any, value: Any, load: Callable[[Any], Any], depth: int = 99) -> list[str]:
    """What ``load`` says with ``value`` in each place of the data in turn; any error that is not ours is raised."""
    said = []
    for path in places(data, depth):
        if path or value is not GONE:
            try:
                load(changed(data, path, value))
            except RetrofitError as error:
                said.append(str(error))
    return said


@pytest.mark.filterwarnings("ignore:.*the plan of this ResNet was made again")
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_whatever_stands_in_a_recipe_it_loads_or_is_refused(value: Any, saved: Path) -> None:
    file = saved / "recipe.json"

    def load(recipe: Any) -> None:
        file.write_text(json.dumps(recipe))
        load_retrofitted(saved)

    said = refusals(json.loads(file.read_text()), value, load)
    assert len(said) > 30
    assert all(str(saved) in text for text in said)


@pytest.mark.filterwarnings("ignore:.*the plan of this ResNet was made again")
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_whatever_stands_in_the_header_of_se_modules_they_load_or_are_refused(
    value: Any, sound: Path, tmp_path: Path
) -> None:
    source, file = sound.parent / "se.safetensors", tmp_path / "se.safetensors"
    with safe_open(source, "pt") as handle:
        header = json.loads(handle.metadata()["se_retrofit"])
    tensors, bare = load_file(source), timm.create_model(NETWORK, num_classes=2)

    def load(header: Any) -> None:
        save_file(tensors, file, {"se_retrofit": json.dumps(header)})
        load_se(bare, file)

    said = refusals(header, value, load, depth=2)  # the plan inside is read as that of a recipe is
    assert len(said) > 3
    assert all(str(file) in text for text in said)


TEXTS = {
    "deep": ("[" * 100_000, "recursion"),
    "deep dicts": ('{"a":' * 100_000, "recursion"),
    "deep and whole": ("[" * 200 + "]" * 200, "nested more than 100 levels deep"),
    "digits": ("9" * 5000, "4300 digits"),
    "twice": ('{"format": 2, "format": 1}', "'format' stands in it twice"),
    "half a character": ('{"\\ud800": 1}', "surrogates not allowed"),
    "cut short": ('{"format": 2', "cut short"),
    "nothing": ("", "cut short"),
    "no JSON": ("!!python/object/apply:os.system ['true']", "cut short"),
    "no mapping": ("NaN", "must hold a mapping, got float"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_json_of_a_hostile_shape_is_one_error_that_names_the_file(case: str, saved: Path) -> None:
    text, said = TEXTS[case]
    (saved / "recipe.json").write_text(text)
    with pytest.raises(RetrofitError, match=f"recipe.json .*{said}"):
        load_retrofitted(saved)


def test_bytes_that_are_no_text_are_one_error(saved: Path) -> None:
    (saved / "recipe.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RetrofitError, match=r"recipe.json can't be read"):
        load_retrofitted(saved)


def test_sound_json_is_read_as_it_is() -> None:
    data = {"a": [1, 2.5, None, True, "ü"], "b": {"c": [[]]}}
    assert parse_json(json.dumps(data), "file") == data


BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "a command": ("lr: !!python/object/apply:os.mkdir [code-ran]", "could not determine a constructor"),
    "an import": ("lr: !!python/module:os", "could not determine a constructor"),
    "a billion": (BILLION, "holds more than 100,000 values"),
    "itself": ("a: &a [*a]", "nested more than 100 levels deep"),
    "deep": ("[" * 150 + "]" * 150, "nested"),
    "bottomless": ("[" * 100_000, "recursion"),
    "twice": ("lr: 1\nepochs: 2\nlr: 3", "'lr' stands in it twice"),
    "a date of no calendar": ("lr: 2020-99-99", "month must be in 1..12"),
    "no date": ("lr: !!timestamp x", "can't be read"),
    "no bool": ("lr: !!bool x", "can't be read"),
    "a key that is a list": ("? [a]\n: 1", "unhashable key"),
    "digits": ("lr: " + "9" * 5000, "4300 digits"),
}


@pytest.mark.parametrize("case", swept([case for case in YAML if case != "bottomless"], ["bottomless"]))
def test_yaml_of_a_hostile_shape_is_one_error_that_names_the_file(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, said = YAML[case]
    with pytest.raises(RetrofitError, match=rf"config.yaml (.|\n)*({said})"):
        parse_yaml(text, "config.yaml")
    assert not list(tmp_path.iterdir())


def test_sound_yaml_with_aliases_is_read_as_it_is() -> None:
    assert parse_yaml("a: &x {lr: 1.5}\nb: *x\nc: {<<: *x, lr: 2}", "file") == {
        "a": {"lr": 1.5}, "b": {"lr": 1.5}, "c": {"lr": 2},
    }  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [None, [], {}, {"sites": [], "skipped": [], "options": [], "inputs": None}, {"sites": [1], "skipped": [], "options": {}, "inputs": None}],
)  # fmt: skip
def test_a_plan_of_a_hostile_shape_is_one_error(data: Any) -> None:
    with pytest.raises(RetrofitError, match="plan"):
        Plan.from_dict(data)


# Descriptions of inputs

DESCRIPTIONS: dict[str, Any] = {
    "a class": {"class": "os:system", "fields": {"command": "true"}},
    "too large": {"tensor": [2**62, 2**62], "dtype": "float32"},
    "no size": {"tensor": ["x"], "dtype": "float32"},
    "negative": {"tensor": [-1], "dtype": "float32"},
    "no dtype": {"tensor": [1], "dtype": "load"},
    "a module's lazy name": {"tensor": [1], "dtype": "_dynamo"},
    "a list": [1],
    "an empty dict": {},
    "a number of entries": {"list": 3},
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_inputs_that_are_none_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match="input"):
        described_inputs({"args": [DESCRIPTIONS[case]], "kwargs": {}}, MODULE)
