"""Finding and removing SE that a retrofit has inserted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TypeGuard

from torch import fx, nn

from ...attention import Inserted
from .derived import Recipe, RetrofittedBlock, derived_class
from .graphs import graphs_of

PLAN = "_se_plan"  # the attribute in which a retrofitted model stores its plan


def is_retrofitted(module: object) -> TypeGuard[Inserted]:
    """Return whether a module was inserted by a retrofit."""
    return isinstance(module, Inserted) and module.site is not None


def lost_sites(model: nn.Module) -> list[str]:
    """Return the paths of SE modules that are gone because the module holding them was replaced after the retrofit."""
    lost = []
    for path, module in model.named_modules():
        plan = vars(module).get(PLAN)
        modules = {} if plan is None else dict(module.named_modules(remove_duplicate=False))
        for site in plan.sites if plan is not None else ():
            if not is_retrofitted(modules.get(site.path)):
                lost.append(f"{path}.{site.path}" if path else site.path)
    return lost


def strip(model: nn.Module, only: Collection[nn.Module] | None = None) -> None:
    """Remove SE inserted by a retrofit, in place: all of it, or ``only`` these modules."""
    chosen = {id(m) for m in (model.modules() if only is None else only) if is_retrofitted(m)}
    modules, gone = list(model.modules()), None if only is None else chosen
    # before anything is changed, because deriving a class can fail
    classes = {id(m): _class_without(m, gone) for m in modules if isinstance(m, RetrofittedBlock)}
    for module in modules:
        if isinstance(module, fx.GraphModule):
            _strip_graphs(module, chosen)
        if id(module) in classes:
            object.__setattr__(module, "__class__", classes[id(module)])
    _forget_sites(modules, gone)
    for module in modules:
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in chosen:
                del module._modules[name]


def _forget_sites(modules: list[nn.Module], chosen: set[int] | None) -> None:
    """Remove the chosen SE modules (None for all) from the plan that the model stores."""
    for module in modules:
        plan = vars(module).get(PLAN)
        if plan is None:
            continue
        children = dict(module.named_modules())
        sites = tuple(s for s in plan.sites if chosen is not None and id(children.get(s.path)) not in chosen)
        if sites:
            vars(module)[PLAN] = replace(plan, sites=sites)
        else:
            del vars(module)[PLAN]


def _class_without(module: RetrofittedBlock, chosen: set[int] | None) -> type:
    """Return the class of a block that no longer calls the chosen SE modules (None for all)."""
    recipe = type(module).se_recipe
    if chosen is None:
        return recipe.base
    children: dict[str, nn.Module | None] = module._modules  # type: ignore[attr-defined]
    gone = {name for name in recipe.names if id(children.get(name)) in chosen}
    if gone >= set(recipe.names):
        return recipe.base
    if not gone:
        return type(module)
    rest: Recipe = replace(recipe, splices=tuple(s for s in recipe.splices if s.child not in gone))
    return derived_class(rest)


def _strip_graphs(module: fx.GraphModule, chosen: set[int]) -> None:
    changed = False
    for graph in graphs_of(module):
        for node in list(graph.nodes):
            if node.op == "call_module" and id(module.get_submodule(str(node.target))) in chosen:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                changed = True
    if changed:
        module.recompile()
