"""Reading untrusted JSON and YAML: the result is plain data, or an error that says what is wrong with which file."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import RetrofitError, brief

DEEPEST = 100  # nesting of dicts and lists; well below Python's recursion limit, wherever the data goes
MOST = 100_000  # values in YAML, where a few lines of aliases can expand to billions


def read_json(path: Path) -> Any:
    if not path.exists():
        raise RetrofitError(f"no file {path}; the folder is not one that save_retrofitted or a fine-tune wrote")
    return parse_json(_text_of(path), path)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise RetrofitError(f"{path} can't be read, it may be cut short: {error}") from error


def parse_json(text: str, where: object) -> Any:
    """Return the content of JSON text, without duplicate keys or deep nesting."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
        json.dumps(data, ensure_ascii=False).encode()  # lone surrogates could be neither printed nor written
    except json.JSONDecodeError as error:
        raise RetrofitError(f"{where} can't be read, it may be cut short: {error}") from error
    except (RecursionError, ValueError) as error:  # such as a number with 5,000 digits
        raise RetrofitError(f"{where} can't be read: {error}") from error
    _check_nesting(data, where)
    return data


def read_yaml(path: Path) -> Any:
    return parse_yaml(_text_of(path), path)


def parse_yaml(text: str, where: object) -> Any:
    """Return the content of YAML text from ``where``, which may only hold plain data."""
    import yaml  # from the extra "finetune"

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := [value for at, (_, value) in enumerate(keys) if keys[at] in keys[:at]]:
                raise ValueError(f"{brief(repeated[0])} stands in it twice")
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(text, Loader)
    except Exception as error:  # constructors raise all kinds: a date without a month, a number without digits
        raise RetrofitError(f"{where} can't be read as YAML: {error or type(error).__name__}") from error
    _check_nesting(data, where, MOST)
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{brief(next(name for name in names if names.count(name) > 1))} stands in it twice")
    return made


def _check_nesting(data: Any, where: object, most: float = float("inf")) -> None:
    """Raise an error if data are nested too deeply, contain themselves, or repeat a part too often."""
    level, seen = [data], 0
    for _ in range(DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [entry for entries in inner for entry in entries]
        seen += len(level)
        if not level:
            return
        if seen > most:
            raise RetrofitError(f"{where} holds more than {most:,} values, by aliases of aliases")
    raise RetrofitError(f"{where} is nested more than {DEEPEST} levels deep")


def read_as(value: Any, kind: Any, where: str) -> Any:
    """Convert plain data to the type that a field is annotated with; an error names the field."""
    base, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any or (value is None and type(None) in inner):
        return value
    if base is UnionType:
        return read_as(value, inner[0], where)
    if is_dataclass(base) and isinstance(value, dict):
        return _read_fields(value, base, where)
    if base is tuple and isinstance(value, (list, tuple)):
        return tuple(read_as(item, inner[0], f"{where}[{index}]") for index, item in enumerate(value))
    if base is list and isinstance(value, list):
        return [read_as(item, inner[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if base is dict and isinstance(value, dict):
        return {key: read_as(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    if type(value) is base or (base is float and type(value) is int):
        return value
    expected = "dict" if is_dataclass(base) else "list" if base is tuple else base.__name__
    raise RetrofitError(f"{where} is of type {type(value).__name__}, expected {expected}: {brief(value)}")


def _read_fields(data: dict[str, Any], cls: Any, where: str) -> Any:
    kinds = get_type_hints(cls)
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    wrong = {"missing": needed - data.keys(), "unknown": data.keys() - kinds.keys()}
    if told := [f"{what}: {', '.join(sorted(map(str, names)))}" for what, names in wrong.items() if names]:
        raise RetrofitError(f"{where} is broken, or of another version of se-retrofit; {'; '.join(told)}")
    return cls(**{name: read_as(value, kinds[name], f"{where}.{name}") for name, value in data.items()})
