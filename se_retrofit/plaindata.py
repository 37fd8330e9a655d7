"""Reading untrusted JSON and YAML: the result is plain data, or an error that says what is wrong with which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import RetrofitError, brief

DEEPEST = 100  # nesting of dicts and lists; well below Python's recursion limit, wherever the data goes
MOST = 100_000  # values in YAML, where a few lines of aliases can expand to billions


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except FileNotFoundError as error:
        raise RetrofitError(
            f"no file {path}; the folder is not one that save_retrofitted or a fine-tune wrote"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RetrofitError(f"{path} can't be read, it may be cut short: {error}") from error
    return parse_json(text, path)


def parse_json(text: str, where: object) -> Any:
    """Return the content of JSON text from ``where``.

    Raises:
        RetrofitError: If it is not valid JSON, has a duplicate key, or is nested too deeply.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
        json.dumps(data, ensure_ascii=False).encode()  # lone surrogates could be neither printed nor written
    except json.JSONDecodeError as error:
        raise RetrofitError(f"{where} can't be read, it may be cut short: {error}") from error
    except (RecursionError, ValueError) as error:  # such as a number with 5,000 digits
        raise RetrofitError(f"{where} can't be read: {error}") from error
    _check_nesting(data, where)
    return data


def parse_yaml(text: str, where: object) -> Any:
    """Return the content of YAML text from ``where``, which may only hold plain data."""
    import yaml  # from the extra "finetune"

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if repeated := [value for at, (_, value) in enumerate(keys) if keys[at] in keys[:at]]:
                raise ValueError(f"{brief(repeated[0])} stands in it twice")
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

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
