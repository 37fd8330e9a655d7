"""Places that a user names: on what modules return."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from ...errors import RetrofitError
from ..record.graph import Call, Op, Record
from .place import Found, Place, problem_of

__all__ = ["places_at"]


def places_at(record: Record, patterns: Sequence[str]) -> Found:
    """The places on what the modules return whose paths match one of some patterns.

    Raises:
        RetrofitError: a pattern matches no module, or none that was called.
    """
    found = Found()
    called = _returned(record)
    modules = [path for path, module in record.model.named_modules() if not isinstance(module, _CONTAINERS)]
    for pattern in patterns:
        matched = fnmatch.filter(modules, pattern)
        if not any(path in called for path in matched):
            what = f"the modules that {pattern!r} matches are not called on these inputs" if matched else (
                f"the pattern {pattern!r} matches none of the {len(modules)} modules"
            )  # fmt: skip
            raise RetrofitError(
                f"{what}; called are {', '.join(list(called)[1:5])}, ...: see record(model).graph for all of them"
            )
        for path in matched:
            if path not in called:
                found.skipped.setdefault(path, "it is not called on these inputs")
    wanted = [path for path in called if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)]
    taken: set[Op] = set()
    for path in wanted:
        for call, op in called[path]:
            problem = "it does not return one tensor" if op is None else problem_of(op)
            if problem is not None or op is None:
                found.skipped[path] = str(problem)
            elif op not in taken:  # what an outer module returns, an inner one may have made
                taken.add(op)
                layers = frozenset([path])
                found.places.append(Place(path, "named", call, op, layers=layers, named=True))
    found.places.sort(key=lambda place: place.op.index)
    return found


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _returned(record: Record) -> dict[str, list[tuple[Call, Op | None]]]:
    """For each module that was called, what each of its calls returned and the call in whose code that appears."""
    found: dict[str, list[tuple[Call, Op | None]]] = {}
    for call in record.calls:
        found.setdefault(call.path, []).append((call, call.returned))
    for op in record.ops:
        if op.module is not None and op.path is not None:
            found.setdefault(op.path, []).append((op.call, op))
    return found
