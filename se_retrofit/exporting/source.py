"""A retrofitted network as a Python file: its changed classes and the attention in plain PyTorch, weights beside it."""

from __future__ import annotations

import contextlib
import inspect
import operator
import runpy
import sys
import textwrap
import types
from pathlib import Path

import torch
from torch import fx, nn

from ..errors import RetrofitError
from ..fusion.attention import check_unfused
from ..models import Base
from ..retrofit import has_se, plan_of
from ..saving.atomic import replaced_file
from ..saving.base import base_of
from ..saving.tensors import save_tensors, tensors_of, untied
from ..surgery.record.copying import copied
from ..surgery.record.inputs import Inputs, tensors_in
from ..surgery.record.methods import unwrapped
from ..surgery.splice.derived import Recipe, RetrofittedBlock
from ..surgery.splice.undo import strip
from .attentions import arguments_of, classes_text
from .images import images_text

_HEAD = '''"""{name} with {what}. ``load()`` builds it and loads the weights, from the file beside this one."""

from __future__ import annotations

import sys
import types
from pathlib import Path
{imports}
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_suffix(".safetensors")
{images}

{attentions}

def method_of(owner: type):
    """The names in a method are those of the module that it was copied from, and its ``super()`` is that of its class."""

    def moved(function: types.FunctionType) -> types.FunctionType:
        code = function.__code__
        cells = tuple(types.CellType(owner) for _ in code.co_freevars)  # of __class__ alone
        names = vars(sys.modules[owner.__module__])
        new = types.FunctionType(code, names, function.__name__, function.__defaults__, cells)
        new.__kwdefaults__ = function.__kwdefaults__
        return new

    return moved

'''

_TAIL = '''
# the inserted modules: their class, and the arguments of its constructor
SITES = {sites}

# the modules that call them
BLOCKS = {{
{blocks}
}}

# names of one and the same tensor
TIED: dict[str, str] = {tied}


def load({argument}) -> nn.Module:
    """The network with its weights, in eval mode{argument_note}."""
{build}
    for path, (attention, *arguments) in SITES.items():
        holder, _, name = path.rpartition(".")
        model.get_submodule(holder).add_module(name, attention(*arguments))
    for path, cls in BLOCKS.items():
        model.get_submodule(path).__class__ = cls
    state = load_file(WEIGHTS)
    state.update({{alias: state[name] for alias, name in TIED.items()}})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = tensor.data.to(state[name].dtype) if name in state else tensor.data
    model.load_state_dict(state)
    model.eval()
    return model
'''


def export_source(model: nn.Module, copy: nn.Module, file: Path, inputs: Inputs) -> Path:
    """Write the file and its weights, load them like any program, and compare the outputs; all or nothing."""
    if file.suffix != ".py":
        raise RetrofitError(f"the source is a Python file, so its name must end in .py, got {file.name}")
    check_unfused(model, "an exported source")
    stored, tied = untied(tensors_of(copy))
    base, _ = base_of(model)
    text = source_text(copy, base, tied)
    with replaced_file(file) as fresh:
        save_tensors(stored, fresh.with_suffix(".safetensors"), {"format": "pt"})
        fresh.write_text(text, encoding="utf-8")
        _check(copy, fresh, base, inputs)
    return file


def source_text(model: nn.Module, base: Base | None, tied: dict[str, str]) -> str:
    classes: dict[Recipe, str] = {}
    bodies: list[str] = []
    blocks: list[str] = []
    imports: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule) and has_se(module):
            raise RetrofitError(f"{path or 'the model'} is a GraphModule, whose code is generated: it has no source")
        if not isinstance(module, RetrofittedBlock):
            continue
        recipe: Recipe = type(module).se_recipe
        if recipe not in classes:
            taken = f"SE{recipe.base.__name__}"
            same = sum(name.startswith(taken) for name in classes.values())
            classes[recipe] = taken + (str(same + 1) if same else "")
            _check_importable(recipe.base)
            bodies.append(_class_text(type(module), recipe, classes[recipe]))
            imports |= {recipe.base.__module__, *(splice.owner.__module__ for splice in recipe.splices)}
        blocks.append(f"    {path!r}: {classes[recipe]},")
    plan = plan_of(model) if has_se(model) else None
    inserted = {site.path: model.get_submodule(site.path) for site in plan.sites} if plan is not None else {}
    sites = {path: arguments_of(path, module) for path, module in inserted.items()}
    if base is not None:
        imports.add(base.library)
    images, needed = images_text(model)
    imports |= needed
    head = _HEAD.format(
        name=type(model).__name__, imports="".join(f"\nimport {m}" for m in sorted(imports)),
        attentions=classes_text(inserted.values()), images=images,
        what="Squeeze-and-Excitation" if plan is None or plan.what == "SE" else f"{plan.what} modules",
    )  # fmt: skip
    tail = _TAIL.format(
        sites=_pretty(sites), blocks="\n".join(blocks), tied=_pretty(tied),
        argument="" if base is not None else "model: nn.Module",
        argument_note="" if base is not None else "; give the bare network, whose weights don't matter",
        build=_build_text(base),
    )  # fmt: skip
    return "\n".join([head, *bodies, tail])


def _pretty(values: object) -> str:
    if not isinstance(values, dict) or not values:
        return "{}"
    return "{\n" + "".join(f"    {key!r}: {value!r},\n" for key, value in values.items()) + "}"


def _build_text(base: Base | None) -> str:
    if base is None:
        return ""
    builder = "timm.create_model" if base.library == "timm" else "torchvision.models.get_model"
    arguments = ", ".join([repr(base.name), *(f"{key}={value!r}" for key, value in base.kwargs.items())])
    return f"    model = {builder}({arguments})"


def _check_importable(cls: type) -> None:
    if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
        raise RetrofitError(
            f"the class {cls.__qualname__} of {cls.__module__} can't be imported by another program, so its source can't be exported; "
            "move it to a module"
        )


def _named(cls: type) -> str:
    """Return an expression for a class. A function may hide the module of its name, as torchvision's googlenet does."""
    top, _, path = f"{cls.__module__}.{cls.__qualname__}".partition(".")
    with contextlib.suppress(AttributeError):
        if operator.attrgetter(path)(sys.modules[top]) is cls:
            return f"{top}.{path}"
    return f"sys.modules[{cls.__module__!r}].{cls.__qualname__}"


def _class_text(derived: type, recipe: Recipe, name: str) -> str:
    lines = ["", f"class {name}({_named(recipe.base)}):"]
    if not recipe.splices:
        call = f"self.{recipe.returned}(super().forward(*args, **kwargs))"
        lines += ["    def forward(self, *args, **kwargs):", f"        return {call}"]
    for method, owner in dict.fromkeys((s.method, s.owner) for s in recipe.splices):
        function, called = vars(derived).get(method), f"{owner.__qualname__}.{method}"
        if not isinstance(function, types.FunctionType) or unwrapped(function) is not function:
            raise RetrofitError(
                f"{called} is decorated or called through super(), so its source can't be exported on its own"
            )
        if set(function.__code__.co_freevars) - {"__class__"}:
            raise RetrofitError(f"{called} uses variables of an enclosing function, so it can't be exported")
        if any(n.startswith(f"_{owner.__name__.lstrip('_')}__") for n in function.__code__.co_names):
            raise RetrofitError(f"{called} uses private names of its class, so it can't be exported")
        lines.append(f"    @method_of({_named(owner)})")
        lines += textwrap.indent(textwrap.dedent(inspect.getsource(function)), "    ").rstrip().splitlines()
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _check(model: nn.Module, file: Path, base: Base | None, inputs: Inputs) -> None:
    bare = []
    if base is None:
        bare = [copied(model)]
        strip(bare[0])
    try:
        with torch.no_grad():
            loaded = runpy.run_path(str(file))["load"](*bare)
            wanted, got = (tensors_in(net(*inputs.args, **inputs.kwargs)) for net in (model, loaded))
    except Exception as error:  # the file is code, which can raise anything
        raise RetrofitError(f"the exported source does not run: {type(error).__name__}: {error}") from error
    if not (len(wanted) == len(got) and all(map(torch.equal, wanted, got))):
        raise RetrofitError("the exported source does not compute what the network computes")
