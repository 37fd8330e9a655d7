"""A run of the model at no cost: a ghost of it, all of whose tensors are on the meta device, is called once.

The ghost shows which modules are really called, in which order and on what shapes. The model itself is not touched:
the ghost has its own modules, no hooks, and parameters without storage.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import RetrofitError

__all__ = ["Call", "Ghosts", "Rehearsal", "base_class", "rehearse", "rehearse_call"]


@dataclass(eq=False)
class Call:
    """One call of one (ghost) module: what it was given, what it returned, and the calls it made in turn."""

    module: nn.Module
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parent: Call | None
    output: Any = None
    children: list[Call] = field(default_factory=list)

    def walk(self) -> Iterator[Call]:
        """This call and all below it, in the order in which they began."""
        yield self
        for child in self.children:
            yield from child.walk()


class Ghosts:
    """What the ghosts of one model share: the calls recorded so far, and the tracer that listens at present."""

    def __init__(self) -> None:
        self.current: Call | None = None
        self.tracer: Any = None
        self.paths: dict[int, str] = {}

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What calling a ghost does: tell the tracer if one listens, else record the call and run it."""
        if self.tracer is not None and self.tracer.listens_to(module):
            return self.tracer.record_call(module, args, kwargs)
        call = Call(module, self.paths.get(id(module), ""), snapshot(args), snapshot(kwargs), self.current)
        if self.current is not None:
            self.current.children.append(call)
        before, self.current = self.current, call
        try:
            output = run_forward(module, args, kwargs)
        finally:
            self.current = before
        call.output = snapshot(output)
        return output


@dataclass(eq=False)
class Rehearsal:
    """A ghost, the call of its root, and why that call broke off, if it did."""

    ghost: nn.Module
    ghosts: Ghosts
    root: Call
    broke_off: str | None = None


def snapshot(value: Any) -> Any:
    """A copy of the containers in ``value``: a module may change a list that it was given."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([snapshot(v) for v in value])
    if kind is dict or kind is OrderedDict:
        return kind((k, snapshot(v)) for k, v in value.items())
    return value


def run_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a ghost's forward (it has no hooks); through ``__call__`` where its class has one of its own."""
    own_call = base_class(module).__call__
    if own_call is not nn.Module.__call__ and not isinstance(module, torch.fx.GraphModule):
        return own_call(module, *args, **kwargs)
    return module.forward(*args, **kwargs)


# Ghosts ------------------------------------------------------------------


class Ghostly:
    """Mixed into the class of each module of a ghost, so that nothing need be patched to listen to it."""

    _ghosts: Ghosts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_ghosts"].called(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if isinstance(value, Tensor):
            tracer = self.__dict__["_ghosts"].tracer
            if tracer is not None:
                return tracer.attribute(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        ghosts = self.__dict__.get("_ghosts")
        if ghosts is not None and ghosts.tracer is not None:
            ghosts.tracer.attribute_set(name)
        super().__setattr__(name, value)


_ghost_classes: dict[type, type] = {}


def _ghost_class(cls: type) -> type:
    if cls not in _ghost_classes:
        _ghost_classes[cls] = type(cls)(cls.__name__, (Ghostly, cls), {"__module__": cls.__module__, "_of": cls})
    return _ghost_classes[cls]


def base_class(module: nn.Module) -> type:
    """The class of the module that a ghost stands for; of any other module, its own."""
    return getattr(type(module), "_of", type(module))


def _meta_like(t: Tensor) -> Tensor:
    if isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise RetrofitError(
            "the model has lazy parameters, whose shapes are not known yet: call the model once, then retrofit it"
        )
    empty = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")
    return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty


def make_ghost(model: nn.Module, prepare: Callable[[nn.Module], None] | None = None) -> tuple[nn.Module, Ghosts]:
    """Copy the model's modules, but none of its tensors' data and none of its hooks; ``prepare`` may change the copy."""
    memo: dict[int, Any] = {}
    kept = []  # deepcopy's memo is keyed by id: what it names has to live as long as it does
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                if isinstance(value, dict):
                    memo[id(value)] = OrderedDict()
            elif name in ("_parameters", "_buffers") or isinstance(value, (Tensor, list, tuple, dict)):
                if name == "_modules":
                    continue
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor) and id(leaf) not in memo:
                        memo[id(leaf)] = _meta_like(leaf)
                        kept.append(leaf)
    try:
        ghost = copy.deepcopy(model, memo)
    except RetrofitError:
        raise
    except Exception as error:
        raise RetrofitError(
            f"the model ({type(model).__name__}) can't be copied: copy.deepcopy raised {type(error).__name__}: {error}"
        ) from error
    if prepare is not None:
        prepare(ghost)
    ghosts = Ghosts()
    for path, module in ghost.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        module.__dict__["_ghosts"] = ghosts
        object.__setattr__(module, "__class__", _ghost_class(type(module)))
        ghosts.paths[id(module)] = path
    return ghost, ghosts


# Inputs ------------------------------------------------------------------

# Sizes to try where neither the caller nor the model says what it takes. A classifier that flattens its features takes
# one size only; that is why there are so many.
_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: tuple((n,) for n in (16000, 1024, 4096, 512, 256, 128, 100, 64, 32, 2048, 8000, 8192, 32000, 44100, 48000)),
    2: tuple((n, n) for n in (224, 32, 64, 28, 128, 256, 96, 299, 48, 16, 8, 384, 512, 112, 160, 192, 320, 448, 227)),
    3: (
        (16, 112, 112),
        (16, 224, 224),
        (32, 32, 32),
        (64, 64, 64),
        (16, 16, 16),
        (96, 96, 96),
        (8, 64, 64),
        (128, 128, 128),
        (32, 224, 224),
    ),
}


def _first_conv(model: nn.Module) -> nn.modules.conv._ConvNd | None:
    return next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)


def _config_size(model: nn.Module) -> tuple[int, ...] | None:
    """The input size in the model's own config, where it has one (timm)."""
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        if isinstance(config, dict) and isinstance(config.get("input_size"), (tuple, list)):
            return tuple(config["input_size"])
    return None


def _required_inputs(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


def guess_inputs(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Inputs (on meta) that the model may take, the likeliest first."""
    conv = _first_conv(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = _required_inputs(model)
    config = _config_size(model)
    shapes: list[tuple[int, ...]] = []
    if config is not None:
        shapes.append(config)
    if conv is not None:
        if config is not None and len(config) == 3:
            shapes.append((conv.in_channels, *config[1:]))
        dims = len(conv.kernel_size)
        shapes += [(conv.in_channels, *size) for size in _SIZES[dims]]
        if dims == 2 and conv.in_channels != 3:
            shapes.append((3, 224, 224))  # the first conv registered need not be the first one called
    for shape in dict.fromkeys(shapes):
        yield tuple(torch.empty(2, *shape, dtype=dtype, device="meta") for _ in range(inputs))
    if conv is not None and len(conv.kernel_size) == 2 and inputs == 1:  # detection models take a list of images
        yield ([torch.empty(conv.in_channels, 320, 320, dtype=dtype, device="meta")],)


def _given_inputs(example_inputs: Any) -> tuple[Any, ...]:
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple):
        raise TypeError(
            f"example_inputs must be a tensor or a tuple of positional inputs, got {type(example_inputs).__name__}"
        )
    return tree_map_only(Tensor, _meta_like, example_inputs)


# The run ------------------------------------------------------------------


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leave the global random states of python, numpy and torch as they are."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _needs_data(error: Exception) -> bool:
    """Whether the run stopped only because meta tensors hold no data (``nonzero``, ``item`` and the like)."""
    return isinstance(error, (RuntimeError, NotImplementedError)) and "meta" in str(error).lower()


def _attempt(ghost: nn.Module, ghosts: Ghosts, inputs: tuple[Any, ...], on_meta: bool) -> tuple[Call, Exception | None]:
    holder = Call(ghost, "", inputs, {}, None)
    ghosts.current = holder
    try:
        # Tensors that a forward makes of itself are on the CPU unless it says otherwise; a model that combines such
        # a tensor with its input needs it on meta, one that reads a number off it needs it where it is.
        with torch.no_grad(), torch.device("meta") if on_meta else nullcontext():
            ghost(*copy.copy(inputs))
        error = None
    except Exception as raised:
        error = raised
    finally:
        ghosts.current = None
    return holder.children[0], error


def rehearse_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], prepare: Callable[[nn.Module], None] | None = None
) -> Rehearsal:
    """Rehearse one call of a module with (real or meta) arguments; whatever its forward raises is raised."""
    ghost, ghosts = make_ghost(model, prepare)
    with untouched_randomness(), torch.no_grad():
        ghost.eval()
        holder = Call(ghost, "", (), {}, None)
        ghosts.current = holder
        args, kwargs = tree_map_only(Tensor, _meta_like, (args, kwargs))
        ghost(*args, **kwargs)
        ghosts.current = None
    return Rehearsal(ghost, ghosts, holder.children[0])


def rehearse(model: nn.Module, example_inputs: Any = None) -> Rehearsal:
    """Run a ghost of the model once, in eval mode.

    Args:
        model: any module; it is not touched.
        example_inputs: a tensor or a tuple of positional inputs, of which only shapes and dtypes are read. Without
            it: the model's own config, then sizes that fit its first convolution, until one goes through.

    Raises:
        RetrofitError: the forward raises with the inputs given, or with all that were tried.
    """
    ghost, ghosts = make_ghost(model)
    ghost.eval()
    candidates: Callable[[], Iterator[tuple[Any, ...]]]
    if example_inputs is not None:
        given = _given_inputs(example_inputs)
        candidates = lambda: iter((given,))  # noqa: E731
    else:
        candidates = lambda: guess_inputs(ghost)  # noqa: E731
    first_error: Exception | None = None
    furthest: tuple[int, Call, Exception] | None = None
    with untouched_randomness():
        for inputs in candidates():
            for on_meta in (False, True):
                root, error = _attempt(ghost, ghosts, inputs, on_meta)
                if error is None:
                    return Rehearsal(ghost, ghosts, root)
                first_error = first_error or error
                if _needs_data(error):
                    reached = sum(1 for _ in root.walk())
                    if furthest is None or reached > furthest[0]:
                        furthest = (reached, root, error)
                else:
                    break
            if furthest is not None and example_inputs is None and furthest[0] > 10:
                break  # this input fits; another would stop at the same place
    if furthest is not None:
        reason = str(furthest[2]).strip().splitlines()[0]
        return Rehearsal(ghost, ghosts, furthest[1], broke_off=f"{type(furthest[2]).__name__}: {reason}")
    name = type(model).__name__
    if first_error is None:
        raise RetrofitError(f"{name} has no convolution, so there is nothing to retrofit")
    reason = f"{type(first_error).__name__}: {str(first_error).strip()}"
    if example_inputs is not None:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor))
        raise RetrofitError(
            f"{name} can't be run on the example_inputs that were given, of shape {shapes}; give inputs that it takes. Its "
            f"forward raised {reason}"
        ) from first_error
    raise RetrofitError(
        f"{name} can't be run on any input that was tried; give add_se(..., example_inputs=...) a tensor (or a tuple of "
        f"inputs) of the right shape. On the first one tried its forward raised {reason}"
    ) from first_error
