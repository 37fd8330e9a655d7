"""Files, JSON and YAML of any shape, and inputs of any class: loaded, or one error that says what is wrong; never run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from recipes import recipe_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sweeps import swept
from torch import nn

from se_retrofit import RetrofitError, load_retrofitted
from se_retrofit.plaindata import parse_yaml
from se_retrofit.saving import load_se, save_se
from se_retrofit.surgery.record.inputs import described_inputs


class Gone:
    def __repr__(self) -> str:
        return "gone"


GONE = Gone()
HOSTILE = swept([GONE, 10**30], [None, [], True, -1, float("nan"), "", "../x", [[1]], {"a": 1}])


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
    def load(recipe: Any) -> None:
        (saved / "recipe.json").write_text(json.dumps(recipe))
        load_retrofitted(saved)

    said = refusals(recipe_of(saved), value, load)
    assert len(said) > 30
    assert all(str(saved) in text for text in said)


@pytest.mark.filterwarnings("ignore:.*the plan of this ResNet was made again")
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_whatever_stands_in_the_header_of_se_modules_they_load_or_are_refused(
    value: Any, sound: Path, tmp_path: Path
) -> None:
    file = save_se(load_retrofitted(sound), tmp_path / "se.safetensors")
    with safe_open(file, "pt") as handle:
        header = json.loads(handle.metadata()["se_retrofit"])
    tensors, bare = load_file(file), timm.create_model("test_resnet", num_classes=3)

    def load(header: Any) -> None:
        save_file(tensors, file, {"se_retrofit": json.dumps(header)})
        load_se(bare, file)

    said = refusals(header, value, load, depth=2)  # the plan inside is read as that of a recipe is
    assert len(said) > 3
    assert all(str(file) in text for text in said)


RECIPE, WEIGHTS = "recipe.json", "weights.safetensors"
FILES: dict[str, tuple[str, str | bytes | None, str]] = {
    "no recipe": (RECIPE, None, "holds no network"),
    "no weights": (WEIGHTS, None, "no file .*weights.safetensors"),
    "empty weights": (WEIGHTS, b"", "can't be read as safetensors"),
    "cut weights": (WEIGHTS, b"\xff" + bytes(7) + b"{", "can't be read as safetensors, it may be cut short"),
    "no text": (RECIPE, b"\xff\xfe\x00", "recipe.json can't be read"),
    "deep": (RECIPE, "[" * 100_000, "recipe.json .*recursion"),
    "deep dicts": (RECIPE, '{"a":' * 100_000, "recipe.json .*recursion"),
    "deep and whole": (RECIPE, "[" * 200 + "]" * 200, "recipe.json .*nested more than 100 levels deep"),
    "digits": (RECIPE, "9" * 5000, "recipe.json .*4300 digits"),
    "twice": (RECIPE, '{"format": 2, "format": 1}', "recipe.json .*'format' stands in it twice"),
    "half a character": (RECIPE, '{"\\ud800": 1}', "recipe.json .*surrogates not allowed"),
    "cut recipe": (RECIPE, '{"format": 2', "recipe.json .*cut short"),
    "nothing": (RECIPE, "", "recipe.json .*cut short"),
    "no JSON": (RECIPE, "!!python/object/apply:os.system ['true']", "recipe.json .*cut short"),
    "no mapping": (RECIPE, "NaN", "recipe is of type float"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_is_one_error_that_names_it(case: str, saved: Path) -> None:
    name, content, says = FILES[case]
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RetrofitError, match=says):
        load_retrofitted(saved)


def named(name: str, **kwargs: Any) -> dict[str, Any]:
    return {"library": "timm", "name": name, "kwargs": kwargs}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("tied", GONE, "missing: tied"),
        ("tied", {"a": "b"}, "a is tied to b"),
        ("mood", 1, "unknown: mood"),
        ("format", 3, "of format 3, newer than this"),
        ("format", True, "format is of type bool"),
        ("plan", "all", "plan is of type str, expected dict"),
        ("plan.sites.0.after", GONE, r"plan\.sites\[0\] is broken.*missing: after"),
        ("add_se", None, "both be given or both be null"),
        ("add_se.glow", 1, "can't be repeated on this base.*glow"),
        ("add_se.reduction", 2, "layer1.0.se_attention has 256 parameters"),
        ("images.mean", [], "mean must be a number for each channel"),
        ("base", named("test_resnett"), "can't be built"),
        ("base", named("test_resnet", num_classes=11), "does not fit the network; other shapes: fc.bias, fc.weight"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(path: str, value: Any, says: str, saved: Path) -> None:
    keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
    (saved / "recipe.json").write_text(json.dumps(changed(recipe_of(saved), keys, value)))
    with pytest.raises(RetrofitError, match=says):
        load_retrofitted(saved)


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
    "description",
    [
        {"class": "os:system", "fields": {"command": "true"}},
        {"tensor": [2**62, 2**62], "dtype": "float32"},
        {"tensor": ["x"], "dtype": "float32"},
        {"tensor": [-1], "dtype": "float32"},
        {"tensor": [1], "dtype": "load"},
        {"tensor": [1], "dtype": "_dynamo"},
        [1],
        {},
        {"list": 3},
    ],
    ids=str,
)
def test_descriptions_of_inputs_that_are_none_are_refused(description: Any) -> None:
    with pytest.raises(ValueError, match="input"):
        described_inputs({"args": [description], "kwargs": {}}, nn.Conv2d(3, 4, 3))
