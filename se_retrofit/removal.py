"""Telling the SE that a retrofit put in, and taking it out again."""

from __future__ import annotations

from torch import fx, nn

from .attention import SEAttention
from .derived import RetrofittedBlock

__all__ = ["graphs_of", "is_retrofitted", "strip"]


def graphs_of(module: nn.Module) -> list[fx.Graph]:
    """The graphs of a GraphModule; one that keeps a graph for each mode (torchvision's) has several."""
    graphs = [g for g in (module.graph, *vars(module).values()) if isinstance(g, fx.Graph)]
    return list({id(g): g for g in graphs}.values())


def is_retrofitted(module: nn.Module) -> bool:
    """Whether a module is an SE module that a retrofit put in."""
    return isinstance(module, SEAttention) and module.__dict__.get("site") is not None


def strip(model: nn.Module) -> None:
    """Take all SE that a retrofit put in out again, in place."""
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            _strip_graphs(module)
        if isinstance(module, RetrofittedBlock):
            base = type(module).se_base
            object.__setattr__(module, "__class__", base)
    for module in list(model.modules()):
        for name in [n for n, child in module.named_children() if is_retrofitted(child)]:
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
