"""Which SE modules of a network can be fused, and changing the classes of their blocks accordingly and back."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from ..attention import SEAttention
from ..errors import RetrofitError, check_flag, check_module
from ..plan import Skipped
from ..surgery.record.copying import copied
from ..surgery.splice.derived import Recipe, RetrofittedBlock, derived_class, source_as_before
from ..surgery.splice.source import Splice, span_of
from ..surgery.splice.undo import is_retrofitted
from .attention import FusedSEAttention
from .norms import why_no_norm

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Fusion:
    """A plan of what ``fuse_se`` does.

    Attributes:
        fused: paths of the SE modules that are fused with the norm before them.
        skipped: paths of the others with the reasons, as ``Skipped(block, reason)``.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.fusion import plan_fusion
        >>> plan_fusion(add_se(timm.create_model("densenet121"), include="*denselayer1")).skipped[0].reason
        'Conv2d is not a norm that is known to be an affine map of each channel'
    """

    fused: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def plan_fusion(model: nn.Module) -> Fusion:
    """Return the SE modules that ``fuse_se`` fuses, or has fused, and those that it skips.

    Args:
        model: a retrofitted network. It is not changed.

    Raises:
        TypeError: If ``model`` is not an nn.Module.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.fusion import plan_fusion
        >>> plan_fusion(add_se(timm.create_model("resnet18"))).fused[:2]
        ('layer1.0.se_attention', 'layer1.1.se_attention')
    """
    check_module(model)
    called: dict[str, tuple[Any, str]] = {}
    for path, block in model.named_modules():
        if isinstance(block, RetrofittedBlock):
            for name in type(block).se_recipe.names:
                called[f"{path}.{name}" if path else name] = (block, name)
    ses = [path for path, se in model.named_modules() if is_retrofitted(se)]
    reasons = {path: _why_not(*called.get(path, (None, ""))) for path in ses}
    skipped = tuple(Skipped(path, reason) for path, reason in reasons.items() if reason is not None)
    return Fusion(tuple(path for path in ses if reasons[path] is None), skipped)


def fuse_se(model: M, *, inplace: bool = False) -> M:
    """Fuse each norm and the SE after it into one map, so that ``torch.compile`` reads their input only once.

    This is meant for compiled training. Without ``torch.compile``, the fused network is slower than the original.
    Outputs, gradients and running statistics are equal up to rounding, not bit for bit; parameters and state dict stay
    the same. A fused network can't be scripted or traced by torch.fx: call ``unfuse_se`` first.

    Args:
        model: a network from ``add_se``. It is not changed unless ``inplace=True``.
        inplace: change the given model; its parameters stay the same objects.

    Returns:
        The fused network: a deep copy, or ``model`` itself if ``inplace``. ``plan_fusion`` shows which SE modules are
        fused, and why others are not.

    Raises:
        RetrofitError: If no SE module can be fused. The model is unchanged then.
        TypeError: If ``model`` is not an nn.Module.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, fuse_se
        >>> model = fuse_se(add_se(timm.create_model("resnet18")))
        >>> type(model.layer1[0].se_attention).__name__
        'FusedSEAttention'
    """
    check_flag("inplace", inplace)
    fusion = plan_fusion(model)
    if not fusion.fused:
        reason = f": {fusion.skipped[0].block}: {fusion.skipped[0].reason}" if fusion.skipped else "; call add_se first"
        raise RetrofitError(f"{type(model).__name__} has no SE after a norm that can be fused{reason}")
    target = model if inplace else copied(model)
    _put(target, FusedSEAttention, lambda path, s: _fused(s) if path in fusion.fused and s.form == "wrap" else s)
    return target


def unfuse_se(model: M, *, inplace: bool = False) -> M:
    """Undo ``fuse_se``: norm and SE run one after the other again, with everything they have learned.

    Args:
        model: a fused network.
        inplace: change the given model instead of a copy.

    Raises:
        RetrofitError: If no SE module of the model is fused.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, fuse_se
        >>> from se_retrofit.fusion import unfuse_se
        >>> model = unfuse_se(fuse_se(add_se(timm.create_model("resnet18"))))
        >>> type(model.layer1[0].se_attention).__name__
        'SEAttention'
    """
    check_flag("inplace", inplace)
    if not isinstance(model, nn.Module) or not any(isinstance(m, FusedSEAttention) for m in model.modules()):
        raise RetrofitError(f"{type(model).__name__} has no SE that fuse_se has fused, so there is nothing to undo")
    target = model if inplace else copied(model)
    _put(target, SEAttention, lambda path, s: replace(s, form="wrap", target="") if s.form == "norm" else s)
    return target


def _put(model: nn.Module, cls: type, change: Callable[[str, Splice], Splice]) -> None:
    """Change the splices of blocks by ``change(path, splice)``, and the class of their SE to ``cls``, or nothing."""
    todo: list[tuple[Any, type, set[str]]] = []
    for path, block in model.named_modules():
        if isinstance(block, RetrofittedBlock) and "se_recipe" in vars(type(block)):
            recipe: Recipe = type(block).se_recipe
            splices = tuple(change(f"{path}.{s.child}" if path else s.child, s) for s in recipe.splices)
            names = {s.child for s, new in zip(recipe.splices, splices, strict=True) if new is not s}
            todo.append((block, derived_class(replace(recipe, splices=splices)), names))
    for block, derived, names in todo:
        object.__setattr__(block, "__class__", derived)
        for name in names:
            object.__setattr__(block._modules[name], "__class__", cls)


def _why_not(block: Any, name: str) -> str | None:
    """Return why the SE module of this name can't be fused in a block; None if it can be, or is."""
    if block is None:
        return "SE is called by a graph or an nn.Sequential"
    cls, se = type(block), block._modules[name]
    if "se_recipe" not in vars(cls):
        return f"the class of its block was changed after the retrofit, to {cls.__name__}"
    splices = [s for s in cls.se_recipe.splices if s.child == name]
    if all(s.form == "norm" for s in splices) and isinstance(se, FusedSEAttention) and splices:
        return None
    if type(se) is not SEAttention:
        return f"it is of the class {type(se).__name__}: SEAttention alone is fused"
    if not splices or any(s.form != "wrap" for s in splices):
        return "SE does not wrap an expression of the block's code"
    for splice in splices:
        child = _norm_called(splice)
        if child is None:
            return "the expression that SE wraps is not a call of one of the block's norms"
        reason = why_no_norm(block._modules.get(child))
        if reason is not None:
            return reason
        if se.channel_dim == -1:
            return "its channels are in the last dim, where a batch norm or a group norm does not have them"
    return None


def _norm_called(splice: Splice) -> str | None:
    """Return the child that the spliced expression calls with one positional argument; None for other expressions."""
    source = source_as_before(splice)
    first, last, column, end = splice.span
    wanted = (first + source.first, last + source.first, column, end)
    for node in source.nodes:
        if not isinstance(node, ast.Call) or span_of(node) != wanted:
            continue
        callee, text = node.func, source.text(node)
        if not isinstance(callee, ast.Attribute) or not isinstance(callee.value, ast.Name):
            return None
        if callee.value.id != source.self_name or node.keywords or len(node.args) != 1:
            return None
        if isinstance(node.args[0], (ast.Starred, ast.GeneratorExp)) or text[:-1].rstrip().endswith(","):
            return None
        return callee.attr if text.startswith(f"{source.text(callee)}(") else None
    return None


def _fused(splice: Splice) -> Splice:
    return replace(splice, form="norm", target=f"{source_as_before(splice).self_name}.{_norm_called(splice)}")
