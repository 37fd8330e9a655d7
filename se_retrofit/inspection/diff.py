"""A unified diff of a block's source before and after its retrofit: the author's code, and the lines that changed."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ..surgery.record.copying import copied, on_meta
from ..surgery.record.methods import unwrapped
from ..surgery.splice.derived import RetrofittedBlock
from ..surgery.splice.undo import strip
from .blocks import BlockPair, class_name

Source = tuple[str, str, str]  # its name, and its text before and after


def diff_lines(pair: BlockPair) -> list[str]:
    lines: list[str] = []
    for name, *texts in _sources(pair):
        before, after = (text.expandtabs().splitlines() for text in texts)
        lines += difflib.unified_diff(before, after, name, f"{name} with SE", n=3, lineterm="")
    return [line.rstrip() for line in lines]


def _sources(pair: BlockPair) -> Iterator[Source]:
    """Yield the methods (or containers) in which the SE modules of a block are called, before and after."""
    for holder in dict.fromkeys(_holder(pair, site.path) for site in pair.sites):
        module = pair.root.get_submodule(holder)
        title = f"{holder or '(model)'}, {class_name(module)}"
        if isinstance(module, RetrofittedBlock):
            yield from _of_class(type(module), title)
        else:
            bare = copied(module, on_meta, independent=True)
            strip(bare)
            yield title, _text(bare), _text(module)


def _holder(pair: BlockPair, path: str) -> str:
    """Return the module whose source calls an SE module: the one that holds it, or a GraphModule around that."""
    outer = holder = path.rpartition(".")[0]
    if isinstance(pair.root.get_submodule(holder), RetrofittedBlock):
        return holder
    while outer and not isinstance(pair.root.get_submodule(outer), fx.GraphModule):
        outer = outer.rpartition(".")[0]
    return outer if isinstance(pair.root.get_submodule(outer), fx.GraphModule) else holder


def _of_class(cls: Any, title: str) -> Iterator[Source]:
    recipe = cls.se_recipe
    for owner, method in dict.fromkeys((s.owner, s.method) for s in recipe.splices):
        before = unwrapped(vars(owner)[method])
        functions = [f for c in cls.__mro__ if (f := unwrapped(vars(c).get(method))) and f is not before]
        after = next((f for f in functions if before is not None and f.__qualname__ == before.__qualname__), None)
        if before is not None and after is not None:
            yield f"{title}.{method}", inspect.getsource(before), inspect.getsource(after)
    if recipe.returned:
        call, head = "super().forward(*args, **kwargs)", "def forward(self, *args, **kwargs):\n    return"
        yield f"{title}.forward", f"{head} {call}", f"{head} self.{recipe.returned}({call})"


def _text(module: nn.Module) -> str:
    """Return the generated code of a GraphModule, or the elements of a container."""
    if isinstance(module, fx.GraphModule):
        return module.code.strip()
    rows = [f"    ({name}): {class_name(child)}({child.extra_repr()})" for name, child in module.named_children()]
    return "\n".join([f"{class_name(module)}(", *rows, ")"])
