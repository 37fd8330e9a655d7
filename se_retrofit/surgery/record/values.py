"""Which operation computed a tensor: tensors are told apart by identity, and tracked through aliases and writes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

from torch import Tensor, nn

from .graph import Op
from .inputs import tensors_in


class Values:
    """The operations that computed the tensors of a run.

    Args:
        model: the model that is run.
        given: creates the operation for a tensor that none computed, from the path of its parameter or buffer, if any.
        changed: creates the operation for a tensor changed through an alias, from its previous one and the writing one.
    """

    def __init__(
        self, model: nn.Module, given: Callable[[Tensor, str | None], Op], changed: Callable[[Tensor, Op, Op], Op]
    ) -> None:
        self._given = given
        self._changed = changed
        self._known: dict[int, Op] = {}
        self._kept: list[Tensor] = []  # ids are of living tensors
        self._by_storage: dict[int, list[Tensor]] = {}
        self._stale: dict[int, tuple[Op, Op]] = {}  # tensors whose data was changed through an alias
        self._later: dict[int, tuple[Tensor, Callable[[], Op]]] = {}
        modules = list(model.named_modules())
        self._paths = {
            id(t): f"{path}.{name}" if path else name
            for own in ("_buffers", "_parameters")  # the name as a parameter counts, and of several names the first
            for path, module in reversed(modules)
            for name, t in reversed(getattr(module, own).items())
        }

    def known(self, tensor: Tensor) -> Op | None:
        """Return the operation that is known to have computed a tensor, whatever has changed its data since."""
        return self._known.get(id(tensor))

    def keep(self, tensor: Tensor, op: Op) -> None:
        if id(tensor) not in self._known:
            self._kept.append(tensor)
            key = _storage(tensor)
            if key:
                self._by_storage.setdefault(key, []).append(tensor)
        self._known[id(tensor)] = op
        self._stale.pop(id(tensor), None)

    def keep_for_later(self, tensor: Tensor, make: Callable[[], Op]) -> None:
        """Note how to create the operation of a tensor, in case something uses it."""
        if id(tensor) not in self._known:
            self._later[id(tensor)] = (tensor, make)

    def op_of(self, tensor: Tensor) -> Op:
        """Return the operation that computed a tensor, or the one that stands for a tensor from elsewhere."""
        found = self._known.get(id(tensor))
        if id(tensor) in self._stale:
            before, by = self._stale.pop(id(tensor))
            found = self._changed(tensor, before, by)
            self._known[id(tensor)] = found
        if found is None:
            found = self._alias_of(tensor)
            if found is None and id(tensor) in self._later:
                found = self._later[id(tensor)][1]()
            elif found is None:
                found = self._given(tensor, self._paths.get(id(tensor)))
            self.keep(tensor, found)
        return found

    def _alias_of(self, tensor: Tensor) -> Op | None:
        """Return the last operation whose output is an alias of the same data (``x.data``, or one made by autograd)."""
        for other in reversed(self._by_storage.get(_storage(tensor), [])):
            if all(of(other) == of(tensor) for of in (Tensor.size, Tensor.stride, Tensor.storage_offset)):
                return self.op_of(other)
        return None

    def change_aliases(self, written: list[Tensor], changed: Collection[int]) -> None:
        """Mark tensors that share their data with a tensor that was written to as changed."""
        for tensor in written:
            source = self._known.get(id(tensor))
            if source is None:
                continue
            for other in self._by_storage.get(_storage(tensor), []):
                before = self._known[id(other)]
                if other is tensor or id(other) in changed or before is source or before.name == "param":
                    continue
                self._stale[id(other)] = (before, source)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor, a functorch wrapper
        return 0


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(func)]
    return [t for t in tensors_in(values) if not isinstance(t, nn.Parameter)]


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


@cache
def makes(func: Any) -> bool:
    """Return whether an operation creates a new tensor, using at most the shape of another (``zeros_like``)."""
    name = func._schema.name.rpartition("::")[2]
    return name.endswith("_like") or name.startswith("new_") or name in ("bernoulli", "rand", "randn")
