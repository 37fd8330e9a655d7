"""A unified diff of a block's source before and after its retrofit: the author's code, and the lines that changed."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..surgery.record.copying import copied, on_meta
from ..surgery.record.methods import unwrapped
from ..surgery.splice.derived import RetrofittedBlock
from ..surgery.splice.undo import strip
from .blocks import BlockPair, class_name


def diff_lines(pair: BlockPair) -> list[str]:
    """Return the diff of an inspected block."""
    lines: list[str] = []
    for source in sources(pair):
        before, after = ("".join(text).expandtabs().splitlines() for text in (source.before, source.after))
        lines += difflib.unified_diff(before, after, source.name, f"{source.name} with SE", n=3, lineterm="")
    return [line.rstrip() for line in lines]


@dataclass(frozen=True)
class ChangedSource:
    """A method (or container) of a block, as lines before and after."""

    name: str
    before: list[str]
    after: list[str]


def sources(pair: BlockPair) -> list[ChangedSource]:
    """Return the methods in which the SE modules of a block are called."""
    found: list[ChangedSource] = []
    for holder in dict.fromkeys(_holder(pair, site.path) for site in pair.sites):
        module = pair.root.get_submodule(holder)
        title = f"{holder or '(model)'}, {class_name(module)}"
        if isinstance(module, RetrofittedBlock):
            found += _of_class(type(module), title)
        else:
            bare = copied(module, on_meta, independent=True)
            strip(bare)
            found.append(ChangedSource(title, _lines(_text(bare)), _lines(_text(module))))
    return found


def _holder(pair: BlockPair, path: str) -> str:
    """Return the module whose source calls an SE module: the one that holds it, or a GraphModule around that."""
    outer = holder = path.rpartition(".")[0]
    if isinstance(pair.root.get_submodule(holder), RetrofittedBlock):
        return holder
    while outer and not isinstance(pair.root.get_submodule(outer), fx.GraphModule):
        outer = outer.rpartition(".")[0]
    return outer if isinstance(pair.root.get_submodule(outer), fx.GraphModule) else holder


def _of_class(cls: Any, title: str) -> list[ChangedSource]:
    recipe = cls.se_recipe
    found = []
    for owner, method in dict.fromkeys((s.owner, s.method) for s in recipe.splices):
        before = unwrapped(vars(owner)[method])
        functions = [f for c in cls.__mro__ if (f := unwrapped(vars(c).get(method))) and f is not before]
        after = next((f for f in functions if before is not None and f.__qualname__ == before.__qualname__), None)
        if before is not None and after is not None:
            texts = (inspect.getsourcelines(function)[0] for function in (before, after))
            found.append(ChangedSource(f"{title}.{method}", *texts))
    if recipe.returned:
        call, head = "super().forward(*args, **kwargs)", "def forward(self, *args, **kwargs):\n"
        both = ([head, f"    return {made}\n"] for made in (call, f"self.{recipe.returned}({call})"))
        found.append(ChangedSource(f"{title}.forward", *both))
    return found


def _text(module: nn.Module) -> str:
    """Return the generated code of a GraphModule, or the elements of a container."""
    if isinstance(module, fx.GraphModule):
        return module.code
    rows = [f"    ({name}): {class_name(child)}({child.extra_repr()})" for name, child in module.named_children()]
    return "\n".join([f"{class_name(module)}(", *rows, ")"])


def _lines(text: str) -> list[str]:
    return text.lstrip("\n").rstrip().splitlines(keepends=True)
