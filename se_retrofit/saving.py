"""Retrofitted networks on disk: the weights as safetensors, and a recipe that says how to build the network again.

A folder that ``save_retrofitted`` writes holds two files and no pickle::

    weights.safetensors   every entry of the state dict; tied tensors once
    recipe.json           format, base (library, name, arguments), add_se options, plan, tied names, versions

``save_se`` writes one file, the SE modules alone: a few percent of the network, to be put on the same base again.
"""

from __future__ import annotations

import copy
import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .atomic import replaced_directory, replaced_file, settled
from .errors import RetrofitError
from .models import Base
from .plan import Plan, Site
from .retrofit import add_se, has_se, plan_of
from .surgery.inputs import from_description

__all__ = ["load_retrofitted", "load_se", "save_retrofitted", "save_se"]

FORMAT = 2
WEIGHTS = "weights.safetensors"
RECIPE = "recipe.json"

RECIPE_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "base": (dict, type(None)),
    "base_note": (str,),
    "add_se": (dict, type(None)),
    "plan": (dict, type(None)),
    "tied": (dict,),
    "versions": (dict,),
}


def save_retrofitted(model: nn.Module, directory: str | Path, *, base: Base | str | None = None) -> Path:
    """Save a retrofitted network: its weights, and the recipe to build it.

    An existing folder of this kind is replaced, in one step: whoever reads it finds the old network or the new one.

    Args:
        model: a network that ``add_se`` made.
        directory: the folder to write; its parents are made.
        base: where the network came from before the retrofit: a name such as ``"torchvision/resnet18"``, or with
            arguments ``Base.of("torchvision/resnet18", num_classes=10)``. Found from the model itself where it is timm's. Where
            it is not known, loading asks for the bare network.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}")
    if not has_se(model):
        raise RetrofitError(
            f"this {type(model).__name__} has no SE modules, so there is no retrofit to save; "
            "add_se returns the retrofitted network: model = add_se(model)"
        )
    with replaced_directory(Path(directory), (WEIGHTS, RECIPE)) as fresh:
        write_network(model, fresh, base=Base.of(base) if isinstance(base, str) else base)
    return Path(directory)


def load_retrofitted(
    directory: str | Path, *, base: nn.Module | Base | str | None = None, example_inputs: Any = None
) -> nn.Module:
    """Build the network that ``save_retrofitted`` saved: the base, the same surgery, the weights.

    Args:
        directory: the folder that ``save_retrofitted`` or a fine-tune wrote.
        base: the bare network, or its name, for folders whose recipe names none. It is copied, not changed; its weights don't
            matter, all of them are replaced.
        example_inputs: for ``add_se``, in the place of inputs of the shapes that the network was retrofitted with.

    Returns:
        The network, on the CPU (or where ``base`` is), in eval mode.

    Raises:
        RetrofitError: there is no such folder; a file is missing, cut short, or holds unknown fields; it was written by
            a newer format; the base is not known; the retrofit no longer gives the plan that was saved; the
            weights don't fit.

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
    for alias, kept in recipe["tied"].items():
        if kept not in state:
            raise RetrofitError(f"{folder / RECIPE}: {alias} is tied to {kept}, which {WEIGHTS} does not hold")
        state[alias] = state[kept]
    model = _bare(recipe, Base.of(base) if isinstance(base, str) else base, folder)
    if recipe["plan"] is not None:
        options = _options(recipe["add_se"], recipe["plan"]["inputs"], example_inputs, folder / RECIPE)
        model = _retrofit_again(model, options, recipe["plan"]["sites"], str(folder), inplace=True)
    load_strictly(model, state, str(folder / WEIGHTS))
    return model.eval()


def save_se(model: nn.Module, file: str | Path) -> Path:
    """Save the SE modules alone, to put them on the same base network again with ``load_se``.

    Everything else (a new head, batch-norm statistics) is left out: for a network of which more than the SE modules was
    trained, use ``save_retrofitted``.

    Args:
        model: a network that ``add_se`` made.
        file: the file to write, ``.safetensors``.

    Returns:
        The file.

    Raises:
        RetrofitError: the model has no SE modules, or the file can't be written.
        TypeError: ``model`` is no module.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se, load_se, save_se
        >>> base = timm.create_model("resnet10t")
        >>> file = save_se(add_se(base), tempfile.mkdtemp() + "/se.safetensors")
        >>> model = load_se(base, file)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}")
    if not has_se(model):
        raise RetrofitError(f"this {type(model).__name__} has no SE modules to save; retrofit it first: add_se(model)")
    plan = plan_of(model)
    state = {k: v for k, v in tensors_of(model).items() if _belongs_to(k, plan.sites)}
    stored, tied = untied(state)
    header = {"format": FORMAT, "add_se": dict(plan.options), "sites": plan.to_dict()["sites"], "tied": tied}
    header["inputs"] = plan.inputs
    with replaced_file(Path(file)) as fresh:
        _write_tensors(stored, fresh, {"se_retrofit": json.dumps(header)})
    return Path(file)


def load_se(model: nn.Module, file: str | Path, *, example_inputs: Any = None, inplace: bool = False) -> nn.Module:
    """Put saved SE modules on a network: on a bare one by the same surgery, on a retrofitted one in place of its own.

    Args:
        model: the base network that the SE modules were trained on, bare or retrofitted with the same options.
        file: what ``save_se`` wrote.
        example_inputs: for ``add_se``, in the place of inputs of the shapes that the network was retrofitted with.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The retrofitted network.

    Raises:
        RetrofitError: the file is missing, cut short or of a newer format, or its SE modules don't fit this network,
            which is then unchanged.
        TypeError: ``model`` is no module.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se, load_se, plan_of, save_se
        >>> base = timm.create_model("resnet10t")
        >>> model = load_se(base, save_se(add_se(base, reduction=4), tempfile.mkdtemp() + "/se.safetensors"))
        >>> plan_of(model).options["reduction"]
        4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r} of type {type(model).__name__}")
    file = Path(file)
    state = read_weights(file)
    header = _read_se_header(file)
    for alias, kept in header["tied"].items():
        state[alias] = state[kept]
    if has_se(model):
        _check_plan(plan_of(model).sites, header["sites"], str(file))
        own = {k: v for k, v in tensors_of(model).items() if _belongs_to(k, plan_of(model).sites)}
        _check_keys(own, state, str(file))
        result = model if inplace else copy.deepcopy(model)
    else:
        # The surgery is tried on a copy first: a file that doesn't fit must leave the given model as it is.
        options = _options(header["add_se"], header["inputs"], example_inputs, file)
        retrofitted = _retrofit_again(model, options, header["sites"], str(file), inplace=False)
        own = {k: v for k, v in tensors_of(retrofitted).items() if _belongs_to(k, plan_of(retrofitted).sites)}
        _check_keys(own, state, str(file))
        result = retrofitted
        if inplace:
            result = _retrofit_again(model, options, header["sites"], str(file), inplace=True)
    _retype(result, state)
    result.load_state_dict(state, strict=False)
    return result


# Recipes


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
    if base is not None:
        check_base(model, base, state)
        note = ""
    else:
        base, note = base_of(model, state, sites)
    stored, tied = untied(state)
    recipe = {
        "format": FORMAT,
        "base": None if base is None else {"library": base.library, "name": base.name, "kwargs": base.kwargs},
        "base_note": note,
        "add_se": None if plan is None else dict(plan.options),
        "plan": None if plan is None else {k: v for k, v in plan.to_dict().items() if k != "options"},
        "tied": tied,
        "versions": {name: _version(name) for name in ("se-retrofit", "torch", "torchvision", "timm")},
    }
    try:
        text = json.dumps(recipe, indent=2)
    except TypeError as error:
        raise RetrofitError(
            f"the recipe can't be written as JSON: {error}; the arguments of base and add_se must be plain data"
        ) from error
    _write_tensors(stored, folder / WEIGHTS, {"format": "pt"})
    (folder / RECIPE).write_text(text + "\n", encoding="utf-8")


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a folder, checked field by field.

    Raises:
        RetrofitError: it is missing, no JSON, of a newer format, or has missing, unknown or ill-typed fields.
    """
    if not folder.is_dir():
        raise RetrofitError(f"no folder {folder}; give the folder that save_retrofitted or a fine-tune wrote")
    recipe = read_json(folder / RECIPE)
    check_fields(recipe, RECIPE_FIELDS, folder / RECIPE)
    if recipe["base"] is not None:
        check_fields(recipe["base"], {"library": (str,), "name": (str,), "kwargs": (dict,)}, f"{folder / RECIPE}: base")
    if (recipe["plan"] is None) != (recipe["add_se"] is None):
        raise RetrofitError(f"{folder / RECIPE}: add_se and plan must both be given or both be null")
    if recipe["plan"] is not None:
        check_fields(
            recipe["plan"],
            {"sites": (list,), "skipped": (list,), "inputs": (dict, type(None))},
            f"{folder / RECIPE}: plan",
        )
    if not all(isinstance(v, str) for v in recipe["tied"].values()):
        raise RetrofitError(f"{folder / RECIPE}: tied must map names to names")
    return recipe


def read_json(path: Path) -> Any:
    """A JSON file, or a ``RetrofitError`` that says what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RetrofitError(
            f"no file {path}; the folder is not one that save_retrofitted or a fine-tune wrote"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RetrofitError(f"{path} can't be read, it may be cut short: {error}") from error


def check_fields(data: Any, fields: dict[str, tuple[type, ...]], where: object, newest: int = FORMAT) -> None:
    """Raise unless ``data`` is a mapping with exactly these fields, of these types, and of a format that we know."""
    if not isinstance(data, dict):
        raise RetrofitError(f"{where} must hold a mapping, got {type(data).__name__}")
    if "format" in fields:
        # Before anything else: a newer format may well have other fields.
        version = data.get("format")
        if isinstance(version, int) and version > newest:
            raise RetrofitError(
                f"{where} is of format {version}, newer than this se-retrofit {_version('se-retrofit')} reads "
                f"(up to {newest}); upgrade: pip install -U se-retrofit"
            )
        if type(version) is int and version < newest:
            raise RetrofitError(
                f"{where} is of format {version}, which se-retrofit {_version('se-retrofit')} no longer reads (it reads "
                f"{newest}); load it with the version that wrote it, and save its state dict"
            )
    missing, unknown = sorted(fields.keys() - data.keys()), sorted(data.keys() - fields.keys())
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
        raise RetrofitError(f"{where} has not the fields of format {newest}; {'; '.join(parts)}")
    for name, types in fields.items():
        if not isinstance(data[name], types) or (isinstance(data[name], bool) and bool not in types):
            raise RetrofitError(f"{where}: {name} is of type {type(data[name]).__name__}, expected {types[0].__name__}")


def _read_se_header(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as handle:
        text = (handle.metadata() or {}).get("se_retrofit")
    if text is None:
        raise RetrofitError(f"{file} holds no SE modules by save_se; a whole network is loaded by load_retrofitted")
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise RetrofitError(f"{file} has a broken header: {error}") from error
    fields = {"format": (int,), "add_se": (dict,), "sites": (list,), "tied": (dict,), "inputs": (dict, type(None))}
    check_fields(header, fields, file)
    return dict(header)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a checkout that is not installed


def _options(saved: dict[str, Any], inputs: Any, example_inputs: Any, where: Path) -> dict[str, Any]:
    """The arguments of ``add_se``, with inputs of the shapes that were saved unless others are given."""
    if example_inputs is None and inputs is not None:
        try:
            example_inputs = from_description(inputs)
        except ValueError as error:
            raise RetrofitError(f"{where}: the inputs can't be made again: {error}; or give example_inputs") from error
    return {**saved, "example_inputs": example_inputs}


# The base network


def base_of(
    model: nn.Module, state: dict[str, Tensor] | None = None, sites: tuple[Site, ...] | None = None
) -> tuple[Base | None, str]:
    """Where a network comes from, as far as it tells itself, and if it doesn't, why not.

    timm's networks carry their architecture's name. That a rebuilt one has the same layers is checked, because
    arguments such as ``output_stride`` leave no trace in the name.
    """
    state = tensors_of(model) if state is None else state
    if sites is None:
        sites = plan_of(model).sites if has_se(model) else ()
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    if not name or not isinstance(config, dict):
        return None, f"{type(model).__module__}.{type(model).__qualname__} does not tell the name that it was built by"
    if config.get("tag"):  # the tag brings the mean, std and size that the weights were trained with
        name = f"{name}.{config['tag']}"
    kwargs: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = model.num_classes
    first = config.get("first_conv")
    weight = state.get(f"{first}.weight") if isinstance(first, str) else None
    if weight is not None and weight.dim() > 1 and weight.shape[1] != config.get("input_size", (3,))[0]:
        kwargs["in_chans"] = weight.shape[1]
    base = Base("timm", name, kwargs)
    problem = _difference(base, model, state, sites)
    if problem:
        return None, f"timm's {name} with {kwargs} is another network than the one that was saved: {problem}"
    return base, ""


def check_base(model: nn.Module, base: Base, state: dict[str, Tensor] | None = None) -> None:
    """Raise unless ``base`` builds ``model`` without its SE."""
    if not isinstance(base, Base):
        raise TypeError(f"base must be a name such as 'timm/resnet18', or a Base, got {base!r}")
    sites = plan_of(model).sites if has_se(model) else ()
    problem = _difference(base, model, tensors_of(model) if state is None else state, sites)
    if problem:
        raise RetrofitError(f"base={base!r} does not build the network that is to be saved: {problem}")


def _difference(base: Base, model: nn.Module, state: dict[str, Tensor], sites: tuple[Site, ...]) -> str:
    """What sets the network that ``base`` builds apart from ``model`` without its SE; empty where nothing does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                with torch.device("meta"):  # costs neither time nor memory
                    other = base.build()
            except RuntimeError:  # a network whose constructor computes with tensors
                other = base.build()
        except Exception as error:
            return f"it can't be built: {error}"
    ours = {k: tuple(v.shape) for k, v in state.items() if not _belongs_to(k, sites)}
    theirs = {k: tuple(v.shape) for k, v in other.state_dict().items()}
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            return (
                f"{key} has the shape {ours.get(key, 'none')} in the network and {theirs.get(key, 'none')} in the base"
            )
    own, rebuilt = _layers(model, sites), _layers(other, ())
    for path in [*own, *rebuilt]:
        if own.get(path) != rebuilt.get(path):
            return f"{path} is {own.get(path, 'none')} in the network and {rebuilt.get(path, 'none')} in the base"
    return ""


def _layers(model: nn.Module, sites: tuple[Site, ...]) -> dict[str, str]:
    """Each layer (module without children) as text. Dropout is left out: its rate is no part of the saved network."""
    return {
        path: f"{type(module).__name__}({module.extra_repr()})"
        for path, module in model.named_modules()
        if not any(module.children())
        and not isinstance(module, nn.Identity)
        and not type(module).__name__.startswith(("Drop", "StochasticDepth"))
        and not _belongs_to(path, sites)
    }


def _bare(recipe: dict[str, Any], base: nn.Module | Base | None, folder: Path) -> nn.Module:
    """The base network, anew."""
    if isinstance(base, nn.Module):
        return copy.deepcopy(base)
    if base is None:
        if recipe["base"] is None:
            reason = f" ({recipe['base_note']})" if recipe["base_note"] else ""
            raise RetrofitError(
                f"{folder} does not say how to build its base network{reason}; "
                "give the bare one: load_retrofitted(directory, base=model)"
            )
        base = Base(**recipe["base"])
    if not isinstance(base, Base):
        raise TypeError(f"base must be a network, a name or a Base, got {base!r} of type {type(base).__name__}")
    try:
        return base.build()
    except Exception as error:
        raise RetrofitError(f"the base network of {folder}, {base!r}, can't be built: {error}") from error


def _retrofit_again(
    model: nn.Module, options: dict[str, Any], sites: list[Any], where: str, *, inplace: bool
) -> nn.Module:
    try:
        retrofitted = add_se(model, **options, inplace=inplace)
    except (RetrofitError, TypeError) as error:
        raise RetrofitError(f"the retrofit of {where} can't be made again on this base: {error}") from error
    _leave_factors(retrofitted, options, sites)
    _check_plan(plan_of(retrofitted).sites, sites, where)
    return retrofitted


def _leave_factors(model: nn.Module, options: dict[str, Any], sites: list[Any]) -> None:
    """Where a fold has left constant factors, put such in the place of SE."""
    saved = {site["path"] for site in sites if isinstance(site, dict) and site.get("hidden") == 0 and "path" in site}
    if options.get("gate") != "static" and saved:
        from .folding.fold import put_factor  # imported when it is used

        for site in plan_of(model).sites:
            if site.path in saved:
                put_factor(model, site.path, torch.ones(site.channels))


def _check_plan(sites: tuple[Site, ...], saved: list[Any], where: str) -> None:
    """Raise unless the sites are those that were saved, in every respect that the weights or the function depend on."""

    def essence(site: Any) -> tuple[Any, ...]:
        try:
            return tuple(site[k] for k in ("path", "after", "channels", "hidden", "channel_dim"))
        except (TypeError, KeyError) as error:
            raise RetrofitError(f"{where}: a site of the plan is broken: {site!r}") from error

    then = [essence(site) for site in saved]
    now = [essence(site) for site in Plan(sites, ()).to_dict()["sites"]]
    lost = [s for s in then if s not in now]
    new = [s for s in now if s not in then]
    if lost or new:
        raise RetrofitError(
            f"the plan of {where} no longer fits: {len(lost)} of its {len(then)} SE modules have no place here"
            + (f", first {lost[0]}" if lost else "")
            + (f"; {len(new)} places are new, first {new[0]}" if new else "")
            + "; is this the same base, and the version that it was saved with?"
        )


# Tensors


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, which must hold tensors that have values."""
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise RetrofitError(f"{key} in the state dict is a {type(value).__name__}; only tensors can be saved")
        if value.is_meta:
            raise RetrofitError(f"{key} is on the meta device and has no values to save; load weights first")
    return state


def untied(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and which names stand for the same tensor: ``(tensors, {name: kept name})``."""
    kept: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        identity = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() and identity in kept:
            tied[name] = kept[identity]
        else:
            kept[identity] = name
            stored[name] = tensor
    return stored, tied


def _write_tensors(tensors: dict[str, Tensor], path: Path, meta: dict[str, str]) -> None:
    # Views of one storage that overlap in part are written each on its own, hence the clone.
    owners: dict[int, int] = {}
    for tensor in tensors.values():
        owners[tensor.untyped_storage().data_ptr()] = owners.get(tensor.untyped_storage().data_ptr(), 0) + 1
    ready = {}
    for name, tensor in tensors.items():
        shared = owners[tensor.untyped_storage().data_ptr()] > 1
        ready[name] = (
            tensor.detach().clone(memory_format=torch.contiguous_format) if shared else tensor.detach().contiguous()
        )
    save_tensors(ready, path, meta)


def save_tensors(tensors: dict[str, Tensor], path: Path, meta: dict[str, str] | None = None) -> None:
    """``safetensors.torch.save_file``, with the system's errors as such and the usual permissions."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=meta)
    except SafetensorError as error:
        # it wraps the system's errors, a full disk among them
        raise OSError(str(error)) from error
    path.chmod(mode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a ``RetrofitError`` that says what is wrong with it."""
    if not path.is_file():
        raise RetrofitError(f"no file {path}")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise RetrofitError(f"{path} can't be read as safetensors, it may be cut short: {error}") from error


def load_strictly(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load every tensor with its own dtype; raise, with the model unchanged, unless keys and shapes agree."""
    _check_keys(model.state_dict(), state, where)
    _retype(model, state)
    model.load_state_dict(state)


def _check_keys(own: dict[str, Any], state: dict[str, Tensor], where: str) -> None:
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    problems = [
        f"{what}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("other shapes", reshaped))
        if keys
    ]
    if problems:
        raise RetrofitError(f"{where} does not fit the network; {'; '.join(problems)}")


def _retype(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give parameters and buffers the dtypes of ``state``: a network that was saved in bfloat16 comes back in it."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in state and state[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(state[name].dtype)


def _belongs_to(key: str, sites: tuple[Site, ...]) -> bool:
    return any(key == site.path or key.startswith(f"{site.path}.") for site in sites)
