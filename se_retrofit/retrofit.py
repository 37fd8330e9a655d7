"""Three functions that belong together, ``add_se``, ``remove_se`` and ``has_se``; and ``plan_se``, which shows what
``add_se`` would do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .attention import Attention
from .errors import RetrofitError, check_flag, check_module, told_as_fault
from .plan import Plan, Site
from .surgery.arguments import Options, Patterns, check_arguments
from .surgery.blocks import Recognise
from .surgery.planning import fitted, planned
from .surgery.record.copying import copied
from .surgery.record.isolation import without_collections
from .surgery.splice.carry import carry_out, structure_of
from .surgery.splice.derived import RetrofittedBlock
from .surgery.splice.undo import is_retrofitted, lost_sites, strip
from .tables import counted, few

__all__ = ["InsertSE", "add_se", "has_se", "plan_of", "plan_se", "remove_se"]

M = TypeVar("M", bound=nn.Module)


def add_se(
    model: M,
    reduction: int = 8,
    *,
    attention: Attention = "se",
    placement: str = "auto",
    gate: str = "identity",
    bias: bool = False,
    min_hidden: int = 4,
    include: Patterns = None,
    exclude: Patterns = None,
    at: Patterns = None,
    auto: bool | None = None,
    recognisers: Iterable[Recognise] = (),
    example_inputs: Any = None,
    plan: Plan | None = None,
    inplace: bool = False,
) -> M:
    """Put Squeeze-and-Excitation (arXiv:1709.01507) into each convolutional block of a network, where the paper puts it.

    The result has the same class, methods, parameters and checkpoint keys (plus those of SE) and, with the default gate, gives
    the same outputs bit for bit until it is trained.

    Args:
        model: a network from torchvision, timm or your own code. It is not changed unless ``inplace``.
        reduction: the bottleneck of SE and CBAM has ``max(channels // reduction, min_hidden)`` units.
        attention: ``"se"``, ``"eca"``, ``"cbam"``, ``"static"`` (a factor for each channel, as a control), a class that is
            built as ``cls(channels)``, or a factory ``(slot) -> nn.Module``; see docs/attentions.md.
        placement: ``"auto"``, or for residual units the paper's ``"standard"``, ``"pre"``, ``"post"``, ``"identity"``, ``"3x3"``.
        gate: ``"identity"``, ``2 * sigmoid`` that starts at exactly 1; or ``"sigmoid"``, the paper's, which starts at 1/2.
        bias: whether the bottleneck's layers have biases.
        include, exclude: patterns of block paths (``"layer4.*"``): matching blocks alone, plain chains among them; or all others.
        at: patterns of module paths: SE goes on what these modules return, and into the blocks found only with ``auto=True``.
        recognisers: further functions ``(record) -> Iterable[Block]``, asked before those of the package.
        example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs or ``(args, kwargs)``, of which only
            shapes and dtypes are read. By default the model's config and usual sizes are tried.
        plan: one from ``plan_se``, which is carried out instead of the options above; see docs/how-it-works.md.
        inplace: change the given model, not a deep copy; its parameters stay the same objects.

    Raises:
        RetrofitError: nothing can be retrofitted, or an option, the plan or what a factory makes does not fit.
        TypeError: an argument is of the wrong type. Whatever is raised, the model is unchanged.

    Warns:
        UserWarning: a factory's module draws random numbers in train mode; or a method's source is not the plan's any more.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> model = add_se(timm.create_model("resnet18"), reduction=16)
        >>> model.layer1[0].se_attention.fc[0]
        Linear(in_features=64, out_features=4, bias=False)
    """
    options = Options(reduction, placement, gate, bias, min_hidden, include, exclude, attention, at, auto, recognisers)
    check_arguments(model, options, example_inputs, plan, inplace)
    with told_as_fault(), without_collections():  # classes that were derived to try edits stay at hand
        made = planned(model, options, example_inputs) if plan is None else fitted(model, plan, options, example_inputs)
        target = model if inplace else copied(model)
        carry_out(target, made)
        return target


def plan_se(
    model: nn.Module,
    reduction: int = 8,
    *,
    attention: Attention = "se",
    placement: str = "auto",
    gate: str = "identity",
    bias: bool = False,
    min_hidden: int = 4,
    include: Patterns = None,
    exclude: Patterns = None,
    at: Patterns = None,
    auto: bool | None = None,
    recognisers: Iterable[Recognise] = (),
    example_inputs: Any = None,
) -> Plan:
    """What ``add_se`` would do with the same arguments, without doing it.

    Args, raises: as for ``add_se``.

    Example:
        >>> import timm
        >>> from se_retrofit import plan_se
        >>> plan = plan_se(timm.create_model("resnet18"))
        >>> len(plan.sites), plan.sites[0].path, plan.sites[0].after
        (8, 'layer1.0.se_attention', 'bn2')
    """
    options = Options(reduction, placement, gate, bias, min_hidden, include, exclude, attention, at, auto, recognisers)
    check_arguments(model, options, example_inputs)
    with told_as_fault():
        return planned(model, options, example_inputs)


def remove_se(model: M, *, inplace: bool = False) -> M:
    """Undo ``add_se``: the original structure, class by class and key by key. What the SE modules learned is lost.

    Args:
        model: a retrofitted network.
        inplace: change the given model instead of a copy.

    Raises:
        RetrofitError: there is no retrofitted SE in the model, or the classes of its blocks were changed since.
        TypeError: an argument is of the wrong type.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, remove_se
        >>> model = timm.create_model("resnet18")
        >>> list(remove_se(add_se(model)).state_dict()) == list(model.state_dict())
        True
    """
    check_module(model)
    check_flag("inplace", inplace)
    if not has_se(model):
        raise RetrofitError(f"{type(model).__name__} has no SE inserted by add_se, so there is nothing to remove")
    check_removable(model, "remove_se")
    with told_as_fault():
        target = model if inplace else copied(model)
        strip(target)
    return target


def check_removable(model: nn.Module, caller: str) -> None:
    """Raise if something else has derived classes from retrofitted blocks since."""
    for path, module in model.named_modules():
        if isinstance(module, RetrofittedBlock) and "se_recipe" not in vars(type(module)):
            raise RetrofitError(
                f"the class of block {path} was changed after the retrofit, to {type(module).__name__} (by "
                f"torch.nn.utils.parametrize or FSDP, say); undo that first, then call {caller}"
            )


def has_se(model: nn.Module) -> bool:
    """Whether ``add_se`` has put SE into this model (a network's own, native SE does not count).

    Raises:
        TypeError: it is not an nn.Module.

    Warns:
        UserWarning: modules that contained SE were replaced after the retrofit, so their SE is gone; the warning names the sites.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, has_se
        >>> model = timm.create_model("resnet18")
        >>> has_se(model), has_se(add_se(model))
        (False, True)
    """
    check_module(model)
    warn_of_lost_sites(model)
    return any(map(is_retrofitted, model.modules()))


def warn_of_lost_sites(model: nn.Module) -> None:
    """Warn where modules with SE in them were replaced after the retrofit (VGG's ReLU by a GELU, say)."""
    lost = lost_sites(model)
    if lost:
        warnings.warn(
            f"{type(model).__name__} has lost {counted(len(lost), 'SE module')} that add_se inserted ({few(lost)}): the modules "
            "around were replaced after the retrofit. Replace modules first, then call add_se",
            stacklevel=3,
        )


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a model was retrofitted.

    Raises:
        RetrofitError: the model is not retrofitted.
        TypeError: it is not an nn.Module.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, plan_of
        >>> plan_of(add_se(timm.create_model("resnet18"), reduction=16)).options["reduction"]
        16
    """
    check_module(model)
    ses = [(path, module) for path, module in model.named_modules() if is_retrofitted(module)]
    if not ses:
        raise RetrofitError(f"{type(model).__name__} has no SE inserted by add_se")
    plan: Plan = ses[0][1].plan
    sites = tuple(_moved(module.site, path) for path, module in ses)
    return replace(plan, sites=sites, structure=structure_of(model))


def _moved(site: Site, path: str) -> Site:
    """A site of a network that may be a part of another now. In a part of the network itself, its edits have no meaning."""
    outer = path.removesuffix(site.path)
    edits = [replace(edit, holder=f"{outer}{edit.holder}".rstrip(".")) for edit in site.edits]
    return replace(site, path=path, edits=tuple(edits) if outer + site.path == path else ())


class InsertSE(PassBase):
    """``add_se`` as a torch.fx pass: inserts SE into the graph of one GraphModule, in place.

    Args: as for ``add_se``, except ``inplace``.

    Example:
        >>> import torch, torchvision
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> from se_retrofit import InsertSE
        >>> traced = torch.fx.symbolic_trace(torchvision.models.resnet18())
        >>> result = PassManager(passes=[InsertSE(reduction=16)])(traced)
        >>> result.modified, sum(node.name.endswith("se_attention") for node in result.graph_module.graph.nodes)
        (True, 8)
    """

    def __init__(self, reduction: int = 8, **options: Any) -> None:
        super().__init__()
        self.reduction = reduction
        self.options = options

    def call(self, graph_module: torch.fx.GraphModule) -> PassResult:
        if not isinstance(graph_module, torch.fx.GraphModule):
            raise TypeError(
                f"InsertSE takes a GraphModule, got {type(graph_module).__name__}; for other modules call add_se"
            )
        return PassResult(add_se(graph_module, self.reduction, **self.options, inplace=True), True)
