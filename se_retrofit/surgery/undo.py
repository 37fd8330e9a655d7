"""Telling the SE that a retrofit put in, and taking it out again."""

from __future__ import annotations

from torch import fx, nn

from ..attention import SEAttention
from .derived import RetrofittedBlock
from .graphs import graphs_of

__all__ = ["is_retrofitted", "strip"]


def is_retrofitted(module: nn.Module) -> bool:
    """Whether a module is an SE module that a retrofit put in."""
    return isinstance(module, SEAttention) and vars(module).get("site") is not None


def strip(model: nn.Module) -> None:
    """Take all SE that a retrofit put in out again, in place."""
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, fx.GraphModule):
            _strip_graphs(module)
        if isinstance(module, RetrofittedBlock):
            object.__setattr__(module, "__class__", type(module).se_recipe.base)
    for module in modules:
        for name, child in list(module._modules.items()):
            if child is not None and is_retrofitted(child):
                del module._modules[name]


def _strip_graphs(module: fx.GraphModule) -> None:
    changed = False
    for graph in graphs_of(module):
        for node in list(graph.nodes):
            if node.op == "call_module" and is_retrofitted(module.get_submodule(str(node.target))):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
                changed = True
    if changed:
        module.recompile()
