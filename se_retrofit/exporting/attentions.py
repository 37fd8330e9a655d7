"""The built-in attentions in plain PyTorch, for an exported file: their own methods, and what each module is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

from ..attention import CBAM, ECA, Inserted, SEAttention, StaticFactor
from ..errors import RetrofitError
from ..tables import Name

_BUILT_IN = (SEAttention, ECA, CBAM, StaticFactor)
METHODS = ("gates", "forward")  # by which they differ
_BASE = '''class Inserted(nn.Module):
    """A module that a retrofit inserted: its channel dim, its layers and parameters, and other numbers."""

    def __init__(self, **held) -> None:
        super().__init__()
        for name, value in held.items():
            setattr(self, name, value)
'''


def construction_of(path: str, module: nn.Module) -> Name:
    """Return an expression that builds an inserted module in the file; the weights are loaded later."""
    if type(module) not in _BUILT_IN:
        words = module.summary() if isinstance(module, Inserted) else type(module).__name__
        raise RetrofitError(
            f"{path} is {words}, whose source can't be exported; that of the built-in attentions can. Save the network with "
            "save_retrofitted, or export it to another format"
        )
    held: dict[str, str] = {
        name: repr(vars(module)[name]) for name in ("channel_dim", "inplace", "dims") if name in vars(module)
    }
    held |= {name: _construction(child) for name, child in module.named_children()}
    for name, parameter in module.named_parameters(recurse=False):
        held[name] = f"nn.Parameter(torch.ones{tuple(parameter.shape)})"
    return Name(f"lambda: {type(module).__name__}({', '.join(f'{name}={text}' for name, text in held.items())})")


def _construction(layer: nn.Module) -> str:
    if isinstance(layer, nn.Sequential):
        return f"nn.Sequential({', '.join(map(_construction, layer))})"
    return f"nn.{layer!r}" if _is_torchs(layer) else repr(layer)


def _is_torchs(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("torch.nn.")


def classes_text(modules: Iterable[nn.Module]) -> str:
    """Return the source of the classes of inserted modules, of their own layers, and of the functions that they call."""
    modules = list(modules)
    if not modules:
        return ""
    base: dict[str, Any] = {name: vars(Inserted)[name] for name in ("squeezed", "scaled", "forward")}
    classes = {cls: [vars(cls)[name] for name in METHODS if name in vars(cls)] for cls in map(type, modules)}
    called = dict.fromkeys(f for methods in (base.values(), *classes.values()) for m in methods for f in _called(m))
    layers = dict.fromkeys(type(m) for module in modules for m in module.modules() if not _is_torchs(m))
    parts: list[Any] = [*called, *(layer for layer in layers if layer not in classes)]
    texts = [inspect.getsource(part) for part in parts]
    texts.append("\n".join([_BASE, *map(inspect.getsource, base.values())]))
    for cls, methods in classes.items():
        head = f'class {cls.__name__}(Inserted):\n    """{str(cls.__doc__).partition(")")[0]})."""\n'
        texts.append("\n".join([head, *map(inspect.getsource, methods)]))
    return "\n\n".join(texts)


def _called(function: FunctionType) -> Iterator[FunctionType]:
    """Yield the functions of this package that a function calls, each after those that it calls itself."""
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if isinstance(found, FunctionType):
            yield from _called(found)
            yield found
