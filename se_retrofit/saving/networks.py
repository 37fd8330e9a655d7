"""Saving of a whole network: a folder with its weights and the recipe to rebuild it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..attention import Attention
from ..errors import RetrofitError, brief, check_module, check_unwrapped
from ..models import IMAGES, Base, own_images
from ..plan import noted_options
from ..retrofit import check_retrofitted, has_se, plan_of
from ..surgery.record.copying import copied, in_mode
from .atomic import replaced_directory, settled
from .base import base_of, check_base, named_base
from .recipe import FORMAT, RECIPE, WEIGHTS, carried_out, network_in, read_recipe, version_of
from .tensors import load_strictly, read_weights, tensors_of, tie, untied, write_tensors


def save_retrofitted(model: nn.Module, directory: str | Path, *, base: Base | str | None = None) -> Path:
    """Save a retrofitted network, its weights and the recipe to rebuild it; return the folder.

    An existing folder of this kind is replaced as a whole: whatever stops it leaves either the old network or the new one.

    Args:
        model: a network from ``add_se``.
        directory: the folder to write; parent folders are created.
        base: how the network was built before the retrofit: a name such as ``"torchvision/resnet18"``, or, with
            arguments, ``Base.of("torchvision/resnet18", num_classes=10)``. It is known for timm's networks and for
            those that ``Base.build`` built or that were loaded. If it is unknown, loading requires the bare network.

    Raises:
        RetrofitError: If the model has no SE modules or is wrapped (by DistributedDataParallel, say), ``base`` builds
            another network, or the folder holds other files or can't be written.
        TypeError: If ``model`` is not an nn.Module, or ``base`` is neither a name nor a ``Base``.

    Warns:
        UserWarning: If it is unknown how the network was built, so that loading it requires the bare network.

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
    check_unwrapped(model)
    check_retrofitted(model, "so there is nothing to save; add_se returns the retrofitted one: model = add_se(model)")
    with replaced_directory(Path(directory), (WEIGHTS, RECIPE)) as fresh:
        note = write_network(model, fresh, base=Base.of(base) if isinstance(base, str) else base)
    if note:
        warnings.warn(f"{directory}: {note}", stacklevel=2)
    return Path(directory)


def load_retrofitted(
    directory: str | Path,
    *,
    base: nn.Module | Base | str | None = None,
    attention: Attention | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Load a network saved by ``save_retrofitted``: build the base, carry out the plan, and load the weights.

    Args:
        directory: the folder written by ``save_retrofitted``, or that of a fine-tune, whose result is in ``best/``.
        base: the bare network, or its name, for folders whose recipe names none. A network is copied, not changed; its
            weights don't matter, because all of them are replaced.
        attention: the class or factory that the network was retrofitted with, which is not saved; None if the attention
            has a name.
        example_inputs: inputs to use if the network has to be planned again, instead of inputs with the shapes that it
            was retrofitted with.

    Returns:
        The network, on the CPU (or the device of ``base``) and in eval mode.

    Raises:
        RetrofitError: If there is no such folder; a file is missing, truncated, has unknown fields, or has a format
            newer than this version reads; the base or the attention is unknown; or plan or weights don't fit the base.

    Warns:
        UserWarning: If the code of a block has changed since the network was saved (in another version of its library,
            say). The network was then planned again, with the same sites.

    Example:
        >>> import tempfile, timm, torch
        >>> from se_retrofit import add_se, load_retrofitted, save_retrofitted
        >>> model = add_se(timm.create_model("resnet10t", num_classes=10)).eval()
        >>> again = load_retrofitted(save_retrofitted(model, tempfile.mkdtemp()))
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.equal(model(x), again(x))
        True
    """
    folder = settled(network_in(Path(directory)))
    recipe = read_recipe(folder)
    state = read_weights(folder / WEIGHTS)
    tie(state, recipe["tied"], folder / RECIPE)
    model = _bare(recipe, Base.of(base) if isinstance(base, str) else base, folder)
    if recipe["plan"] is not None:
        model = carried_out(model, recipe["plan"], folder, example_inputs, attention, inplace=True)
    load_strictly(model, state, str(folder / WEIGHTS))
    if recipe["images"] is not None:
        vars(model)[IMAGES] = recipe["images"]
    return in_mode(model, False)


def write_network(model: nn.Module, folder: Path, *, base: Base | None = None) -> str:
    """Write weights and recipe into a folder; return a remark if the recipe can't say how to build the base."""
    state, images = tensors_of(model), vars(model).get(IMAGES)
    plan = plan_of(model) if has_se(model) else None
    note = ""
    if base is None:
        base, note = base_of(model)
    else:
        if isinstance(base, Base) and ":" in base.name:  # the folder is self-contained: loading downloads nothing
            base, images = base.in_library(), images or own_images(model)
        check_base(model, base)
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
    write_tensors(stored, folder / WEIGHTS, {"format": "pt"})
    (folder / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return without_name(note) if base is None else ""


def without_name(note: str) -> str:
    return f"{note}; to load it, give the bare network: load_retrofitted(folder, base=network)"


def _bare(recipe: dict[str, Any], base: nn.Module | Base | None, folder: Path) -> nn.Module:
    """Return the network to retrofit: a copy of the given one, or one built from the given base or the recipe."""
    if isinstance(base, nn.Module):
        return copied(base)
    if base is None:
        base = named_base(recipe, folder)
    if base is None:
        reason = f" ({recipe['base_note']})" if recipe["base_note"] else ""
        raise RetrofitError(
            f"{folder} does not say how to build its base network{reason}; "
            "give the bare one: load_retrofitted(directory, base=model)"
        )
    if not isinstance(base, Base):
        raise TypeError(f"base must be a network, a name or a Base, got {brief(base)} of type {type(base).__name__}")
    try:
        return base.build()
    except RetrofitError as error:
        raise RetrofitError(f"the base network of {folder}, {base!r}, can't be built: {error}") from error
