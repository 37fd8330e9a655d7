"""Places that a user names: the outputs of modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from ...errors import RetrofitError
from ..record.graph import Call, Op, Record
from .place import Found, Place, problem_of


def places_at(record: Record, patterns: Sequence[str]) -> Found:
    """Return the places at the outputs of the modules whose paths match one of the patterns.

    Raises:
        RetrofitError: If a pattern matches no module, or none that was called.
    """
    found, called, wanted = Found(), _returned(record), set()
    first = {id(module): path for path, module in reversed(list(record.model.named_modules()))}
    modules = {  # a module may be named by any of its paths
        path: first[id(module)]
        for path, module in record.model.named_modules(remove_duplicate=False)
        if not isinstance(module, _CONTAINERS)
    }
    for pattern in patterns:
        matched = {modules[path] for path in fnmatch.filter(modules, pattern)}
        reasons = {path: _why_not(record, path) for path in matched - called.keys()}
        if matched <= reasons.keys():
            what = f"the pattern {pattern!r} matches none of the {len(modules)} modules"
            for path, reason in list(reasons.items())[:1]:
                what = f"the pattern {pattern!r} matches {path!r}, but {reason}"
            raise RetrofitError(
                f"{what}; called are {', '.join(list(called)[1:5])}, ...: see record(model).graph for all of them"
            )
        found.skipped.update(reasons)
        wanted |= matched & called.keys()
    taken: set[Op] = set()
    for path in [path for path in called if path in wanted]:
        for call, op in called[path]:
            problem = "it does not return one tensor" if op is None else problem_of(op)
            if problem is not None or op is None:
                found.skipped[path] = str(problem)
            elif op not in taken:  # the output of an outer module may come from an inner one
                taken.add(op)
                layers, region = frozenset([path]), op.bit if op.path == path else call.mask
                found.places.append(Place(path, "named", call, op, layers=layers, region=region, named=True))
    found.places.sort(key=lambda place: place.op.index)
    return found


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _why_not(record: Record, path: str) -> str:
    if any(path == passed for call in record.calls for _, _, passed in call.passes):
        return "it returns its input as it is: name the module before it"
    return "it is not called on these inputs"


def _returned(record: Record) -> dict[str, list[tuple[Call, Op | None]]]:
    """Return for each module that was called the output of each call, and the call in whose code the output appears."""
    found: dict[str, list[tuple[Call, Op | None]]] = {}
    for call in record.calls:
        found.setdefault(call.path, []).append((call, call.returned))
    for op in record.ops:
        if op.module is not None and op.path is not None:
            found.setdefault(op.path, []).append((op.call, op))
    return found
