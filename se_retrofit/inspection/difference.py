"""A block's code before and after its retrofit, as a unified diff."""

from __future__ import annotations

import difflib
from typing import IO, Any

from torch import nn

from ..errors import RetrofitError
from .graphs import BlockPair, code_of, find_block, inspect_model
from .lines import Line, show

__all__ = ["difference", "difference_lines", "print_difference"]

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def difference(model: nn.Module, block: str, *, example_inputs: Any = None) -> str:
    """A unified diff of a block's code, from that of its original class to what it is now.

    Both are generated from graphs that were traced in the same way, one from the block's original class and one from
    the retrofitted block; so whatever differs between them is in the diff, SE or not.

    Args:
        model: a model that ``add_se`` has retrofitted; it is not touched.
        block: path of a block, such as ``"layer1.0"``, or of an SE module.
        example_inputs: a tensor or a tuple of positional inputs; without it, as in ``add_se``.

    Raises:
        RetrofitError: the model has no SE that ``add_se`` put in or no such block, the block can't be traced, or the
            model can't be run on the inputs.
        TypeError: it is no model, or the inputs are neither a tensor nor a tuple.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.inspection import difference
        >>> print(difference(add_se(timm.create_model("resnet18")), "layer1.0"))  # doctest: +ELLIPSIS
        --- layer1.0, BasicBlock
        +++ layer1.0, BasicBlock with SE
        ...
        +    se_attention = self.se_attention(bn2)
        ...
    """
    return "\n".join(difference_of(find_block(inspect_model(model, example_inputs), block)))


def print_difference(model: nn.Module, block: str, *, example_inputs: Any = None, file: IO[str] | None = None) -> None:
    """Print ``difference``, in a terminal in colour.

    Args, raises: as ``difference``; ``file`` is where to print to, standard output by default.
    """
    show(difference_lines(find_block(inspect_model(model, example_inputs), block)), file)


def difference_of(pair: BlockPair) -> list[str]:
    """The lines of the diff of an inspected block."""
    if pair.before is None or pair.after is None:
        raise RetrofitError(f"block {pair.path or '(model)'} has no graph: {pair.failure}")
    name = f"{pair.path or '(model)'}, {pair.cls}"
    return list(
        difflib.unified_diff(code_of(pair.before), code_of(pair.after), name, f"{name} with SE", n=3, lineterm="")
    )


def difference_lines(pair: BlockPair) -> list[Line]:
    """The diff of an inspected block, in colours."""
    return [
        Line(line, style="bold" if line[:3] in ("---", "+++") else _STYLES.get(line[:1], ""))
        for line in difference_of(pair)
    ]
