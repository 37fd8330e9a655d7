"""A whole network on disk: a folder with its weights and the recipe to build it again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..attention import Attention
from ..errors import RetrofitError, brief, check_module
from ..models import Base
from ..plan import noted_options
from ..retrofit import has_se, plan_of
from ..surgery.record.copying import in_mode
from .atomic import replaced_directory, settled
from .base import base_of, check_base, named_base
from .rebuild import carried_out
from .recipe import BASE, FORMAT, IMAGE_FIELDS, IMAGES, RECIPE, WEIGHTS, read_plan, read_recipe, version_of
from .tensors import load_strictly, read_weights, tensors_of, tie, untied, write_tensors

__all__ = ["load_retrofitted", "save_retrofitted", "write_network"]


def save_retrofitted(model: nn.Module, directory: str | Path, *, base: Base | str | None = None) -> Path:
    """Save a retrofitted network: its weights, and the recipe to build it.

    An existing folder of this kind is replaced atomically: a reader finds either the old network or the new one.

    Args:
        model: a network that ``add_se`` made.
        directory: the folder to write; parent folders are created.
        base: where the network came from before the retrofit: a name such as ``"torchvision/resnet18"``, or with
            arguments ``Base.of("torchvision/resnet18", num_classes=10)``. For timm models it is found automatically.
            If it is not known, the bare network has to be passed when loading.

    Returns:
        The folder.

    Raises:
        RetrofitError: the model has no SE modules; ``base`` builds another network; the folder holds other files or
            can't be written.
        TypeError: ``model`` is not an nn.Module, or ``base`` neither a name nor a ``Base``.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se, load_retrofitted, save_retrofitted
        >>> model = add_se(timm.create_model("resnet10t", num_classes=10))
        >>> folder = save_retrofitted(model, tempfile.mkdtemp())
        >>> sorted(file.name for file in folder.iterdir())
        ['recipe.json', 'weights.safetensors']
        >>> type(load_retrofitted(folder)).__name__
        'ResNet'
    """
    check_module(model)
    if not has_se(model):
        raise RetrofitError(
            f"this {type(model).__name__} has no SE modules, so there is no retrofit to save; "
            "add_se returns the retrofitted network: model = add_se(model)"
        )
    with replaced_directory(Path(directory), (WEIGHTS, RECIPE)) as fresh:
        write_network(model, fresh, base=Base.of(base) if isinstance(base, str) else base)
    return Path(directory)


def load_retrofitted(
    directory: str | Path,
    *,
    base: nn.Module | Base | str | None = None,
    attention: Attention | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Load the network that ``save_retrofitted`` saved: build the base, carry out the plan, load the weights.

    Args:
        directory: the folder that ``save_retrofitted`` or a fine-tune wrote.
        base: the bare network, or its name, for folders whose recipe names none. It is copied, not changed; its
            weights don't matter, since all of them are replaced.
        attention: the class or factory that the network was retrofitted with, which is not saved; None where the attention
            has a name.
        example_inputs: where the plan has to be made again, instead of inputs with the shapes that the network was
            retrofitted with.

    Returns:
        The network, on the CPU (or where ``base`` is), in eval mode.

    Raises:
        RetrofitError: there is no such folder; a file is missing, cut short, or holds unknown fields; its format is
            newer than this version reads; the base or the attention is not known; the plan does not fit the base; the
            weights don't fit.

    Warns:
        UserWarning: the code of a block has changed since the network was saved (another version of its library, say). The
            plan was then made again and has the same sites.

    Example:
        >>> import tempfile, timm, torch
        >>> from se_retrofit import add_se, load_retrofitted, save_retrofitted
        >>> model = add_se(timm.create_model("resnet10t", num_classes=10)).eval()
        >>> again = load_retrofitted(save_retrofitted(model, tempfile.mkdtemp()))
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.equal(model(x), again(x))
        True
    """
    folder = settled(Path(directory))
    recipe = read_recipe(folder)
    state = read_weights(folder / WEIGHTS)
    tie(state, recipe["tied"], folder / RECIPE)
    source = _source(recipe, Base.of(base) if isinstance(base, str) else base, folder)
    model = copy.deepcopy(source) if isinstance(source, nn.Module) else _built(source, folder)
    if recipe["plan"] is not None:
        plan = read_plan(recipe["plan"], recipe["add_se"], folder / RECIPE)
        model = carried_out(model, plan, folder, example_inputs, attention, inplace=True)
    load_strictly(model, state, str(folder / WEIGHTS))
    if isinstance(source, Base):
        vars(model)[BASE] = source
    if recipe["images"] is not None:
        vars(model)[IMAGES] = recipe["images"]
    return in_mode(model, False)


def write_network(
    model: nn.Module,
    folder: Path,
    *,
    base: Base | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write weights and recipe of a network, retrofitted or not, into an existing folder.

    ``state`` is the state dict, where the model's own is spread over processes.
    """
    state = tensors_of(model) if state is None else state
    plan = plan_of(model) if has_se(model) else None
    sites = plan.sites if plan else ()
    images = vars(model).get(IMAGES)
    if base is not None:
        if isinstance(base, Base) and ":" in base.name:  # the folder tells all by itself: who loads it fetches nothing
            base, images = base.in_library(), images or _own_images(model)
        check_base(model, base, state)
        note = ""
    else:
        base, note = base_of(model, state, sites)
    stored, tied = untied(state)
    recipe = {
        "format": FORMAT,
        "base": None if base is None else {"library": base.library, "name": base.name, "kwargs": base.kwargs},
        "base_note": note,
        "add_se": None if plan is None else noted_options(plan.options),
        "plan": None if plan is None else {k: v for k, v in plan.to_dict().items() if k != "options"},
        "tied": tied,
        "images": images,
        "versions": {name: version_of(name) for name in ("se-retrofit", "torch", "torchvision", "timm")},
    }
    try:
        text = json.dumps(recipe, indent=2)
    except TypeError as error:
        raise RetrofitError(
            f"the recipe can't be written as JSON: {error}; the arguments of base and add_se must be plain data"
        ) from error
    write_tensors(stored, folder / WEIGHTS, {"format": "pt"})
    (folder / RECIPE).write_text(text + "\n", encoding="utf-8")


def _own_images(model: nn.Module) -> dict[str, Any]:
    """How a network of timm's says that its images are prepared."""
    from timm.data import resolve_data_config  # slow to import

    own = resolve_data_config({}, model=model)
    own = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
    return {**{name: own[name] for name in IMAGE_FIELDS if name in own}, "classes": None, "multi_label": False}


def _source(recipe: dict[str, Any], base: nn.Module | Base | None, folder: Path) -> nn.Module | Base:
    """The bare network, or where it comes from."""
    if base is None:
        named = named_base(recipe, folder)
        if named is None:
            reason = f" ({recipe['base_note']})" if recipe["base_note"] else ""
            raise RetrofitError(
                f"{folder} does not say how to build its base network{reason}; "
                "give the bare one: load_retrofitted(directory, base=model)"
            )
        return named
    if not isinstance(base, (nn.Module, Base)):
        raise TypeError(f"base must be a network, a name or a Base, got {brief(base)} of type {type(base).__name__}")
    return base


def _built(base: Base, folder: Path) -> nn.Module:
    try:
        return base.build()
    except Exception as error:
        raise RetrofitError(f"the base network of {folder}, {base!r}, can't be built: {error}") from error
