"""The functions ``add_se``, ``remove_se`` and ``has_se``, which belong together; and ``plan_se``, which shows what
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
from .surgery.blocks.table import Recognise
from .surgery.planning import fitted, planned
from .surgery.record.copying import copied
from .surgery.record.isolation import without_collections
from .surgery.splice.carry import carry_out, structure_of
from .surgery.splice.derived import RetrofittedBlock
from .surgery.splice.undo import is_retrofitted, lost_sites, strip
from .tables import counted, few

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
    """Add Squeeze-and-Excitation (arXiv:1709.01507) to each convolutional block of a network, where the paper puts it.

    The result has the same class, methods, parameters and checkpoint keys (plus those of SE). With the default gate,
    its outputs are the same bit for bit until it is trained.

    Args:
        model: a network from torchvision, timm or your own code. It is not changed unless ``inplace=True``.
        reduction: the bottleneck of SE and CBAM has ``max(channels // reduction, min_hidden)`` units.
        attention: ``"se"``, ``"eca"``, ``"cbam"``, ``"static"`` (a factor for each channel, as a control), a class that is
            called as ``cls(channels)``, or a factory ``(slot) -> nn.Module``; see docs/attentions.md.
        placement: ``"auto"``, or for residual units the paper's ``"standard"``, ``"pre"``, ``"post"``, ``"identity"``, ``"3x3"``.
        gate: ``"identity"``, a ``2 * sigmoid`` that starts at exactly 1; or the paper's ``"sigmoid"``, starting at 1/2.
        bias: whether the bottleneck's layers have biases.
        include, exclude: patterns of block paths (``"layer4.*"``): use only matching blocks (or chains), or all others.
        at: patterns of paths of modules whose outputs SE scales; only with ``auto=True`` does it scale the blocks, too.
        recognisers: additional functions ``(record) -> Iterable[Block]``, called before those of the package.
        example_inputs: a tensor, a tuple of positional inputs, a dict of keyword inputs or ``(args, kwargs)``. Only
            shapes and dtypes are read. By default, the model's config and common sizes are tried.
        plan: a plan from ``plan_se`` to carry out, instead of the options above; see docs/how-it-works.md.
        inplace: change the given model instead of a deep copy; its parameters stay the same objects.

    Raises:
        RetrofitError: If nothing can be retrofitted, or an option, the plan or a factory's module does not fit.
        TypeError: If an argument is of the wrong type. Whatever is raised, the model is unchanged.

    Warns:
        UserWarning: If a factory's module draws random numbers in train mode, or a method has changed since the plan.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> model = add_se(timm.create_model("resnet18"), reduction=16)
        >>> model.layer1[0].se_attention.fc[0]
        Linear(in_features=64, out_features=4, bias=False)
    """
    options = Options(reduction, placement, gate, bias, min_hidden, include, exclude, attention, at, auto, recognisers)
    check_arguments(model, options, example_inputs, plan, inplace)
    with told_as_fault(), without_collections():  # keeps the classes derived to try edits
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
    """Return what ``add_se`` would do with the same arguments, without doing it.

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
    """Undo ``add_se``: restore the original structure, class by class and key by key. SE's weights are lost.

    Args:
        model: a retrofitted network.
        inplace: change the given model instead of a copy.

    Raises:
        RetrofitError: If the model has no retrofitted SE, or the classes of its blocks were changed since the retrofit.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, remove_se
        >>> model = timm.create_model("resnet18")
        >>> list(remove_se(add_se(model)).state_dict()) == list(model.state_dict())
        True
    """
    check_flag("inplace", inplace)
    check_retrofitted(model, "so there is nothing to remove")
    check_removable(model, "remove_se")
    with told_as_fault():
        target = model if inplace else copied(model)
        strip(target)
    return target


def check_removable(model: nn.Module, caller: str) -> None:
    """Raise an error if something else has derived classes from retrofitted blocks since."""
    for path, module in model.named_modules():
        if isinstance(module, RetrofittedBlock) and "se_recipe" not in vars(type(module)):
            raise RetrofitError(
                f"the class of block {path} was changed after the retrofit, to {type(module).__name__} (by "
                f"torch.nn.utils.parametrize or FSDP, say); undo that first, then call {caller}"
            )


def has_se(model: nn.Module) -> bool:
    """Return whether ``add_se`` has added SE to this model (a network's own, native SE does not count).

    Raises:
        TypeError: If ``model`` is not an nn.Module.

    Warns:
        UserWarning: If modules that held SE were replaced after the retrofit, so that SE is gone; it names the sites.

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


def check_retrofitted(model: nn.Module, otherwise: str) -> None:
    """Raise an error, which ends with ``otherwise``, if ``add_se`` has not added SE to this model."""
    if not has_se(model):
        raise RetrofitError(f"{type(model).__name__} has no SE inserted by add_se, {otherwise}")


def warn_of_lost_sites(model: nn.Module) -> None:
    """Warn if modules that held SE were replaced after the retrofit (VGG's ReLU by a GELU, say)."""
    lost = lost_sites(model)
    if lost:
        warnings.warn(
            f"{type(model).__name__} has lost {counted(len(lost), 'SE module')} that add_se inserted ({few(lost)}): the modules "
            "around were replaced after the retrofit. Replace modules first, then call add_se",
            stacklevel=3,
        )


def plan_of(model: nn.Module) -> Plan:
    """Return the plan by which a model was retrofitted.

    Raises:
        RetrofitError: If the model is not retrofitted.
        TypeError: If ``model`` is not an nn.Module.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se, plan_of
        >>> plan_of(add_se(timm.create_model("resnet18"), reduction=16)).options["reduction"]
        16
    """
    check_module(model)
    modules = dict(model.named_modules())
    ses = [(path, module) for path, module in modules.items() if is_retrofitted(module)]
    if not ses:
        raise RetrofitError(f"{type(model).__name__} has no SE inserted by add_se")
    plan: Plan = ses[0][1].plan
    sites = tuple(_moved(module, path) for path, module in ses)
    return replace(plan, sites=sites, structure=structure_of(modules))


def _moved(module: Any, path: str) -> Site:
    """Return the site of a module, adapted to a network that is now part of another. In a part of the network itself, its
    edits don't apply. If channels have been pruned since, it has those that are left."""
    site: Site = module.site
    if module.channel != site.channels:
        shape, left = list(site.shape), sum(parameter.numel() for parameter in module.parameters())
        shape[site.channel_dim] = module.channel
        site = replace(site, channels=module.channel, parameters=left, shape=tuple(shape))
    outer = path.removesuffix(site.path)
    edits = [replace(edit, holder=f"{outer}{edit.holder}".rstrip(".")) for edit in site.edits]
    return replace(site, path=path, edits=tuple(edits) if outer + site.path == path else ())


class InsertSE(PassBase):
    """A torch.fx pass that does what ``add_se`` does: it inserts SE into the graph of a GraphModule, in place.

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
            raise TypeError(f"InsertSE takes a GraphModule, got {type(graph_module).__name__}; for others, call add_se")
        return PassResult(add_se(graph_module, self.reduction, **self.options, inplace=True), True)
