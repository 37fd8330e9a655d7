"""Saving of the SE modules only: one file, a few percent of the network, to load onto the same base."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..attention import Attention
from ..checkpoints import check_keys
from ..errors import RetrofitError, check_module, check_unwrapped
from ..plaindata import parse_json
from ..plan import Plan
from ..retrofit import check_retrofitted, plan_of
from .atomic import replaced_file
from .recipe import FORMAT, belongs_to, carried_out, read_fields, read_plan
from .tensors import read_weights, tensors_of, tie, untied, write_tensors


@dataclass(frozen=True)
class Header:
    """What the file holds beside the tensors."""

    format: int
    plan: dict[str, Any]
    tied: dict[str, str]


def save_se(model: nn.Module, file: str | Path) -> Path:
    """Save only the SE modules, to load them onto the same base network with ``load_se``; return the file.

    Nothing else (a new head, batch-norm statistics) is saved: if more than the SE modules was trained, use
    ``save_retrofitted``.

    Args:
        model: a network from ``add_se``.
        file: the ``.safetensors`` file to write.

    Raises:
        RetrofitError: If the model has no SE modules or is wrapped, or the file can't be written.
        TypeError: If ``model`` is not an nn.Module.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.saving import load_se, save_se
        >>> base = timm.create_model("resnet10t")
        >>> file = save_se(add_se(base), tempfile.mkdtemp() + "/se.safetensors")
        >>> model = load_se(base, file)
    """
    check_module(model)
    check_unwrapped(model)
    check_retrofitted(model, "so there is nothing to save; retrofit it first: model = add_se(model)")
    plan = plan_of(model)
    state = {k: v for k, v in tensors_of(model).items() if belongs_to(k, plan.sites)}
    stored, tied = untied(state)
    header = asdict(Header(FORMAT, plan.to_dict(), tied))
    with replaced_file(Path(file)) as fresh:
        write_tensors(stored, fresh, {"se_retrofit": json.dumps(header)})
    return Path(file)


def load_se(
    model: nn.Module,
    file: str | Path,
    *,
    attention: Attention | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Load saved SE modules into a copy of the network that they were trained on.

    Args:
        model: the bare network (``remove_se`` returns that of a retrofitted one). It is not changed, and SE gets its
            dtypes and devices.
        file: the file written by ``save_se``.
        attention: as for ``load_retrofitted``.
        example_inputs: inputs to use if the network has to be planned again, instead of inputs with the shapes that it
            was retrofitted with.

    Raises:
        RetrofitError: If the file is missing, truncated or of a newer format, or its SE modules don't fit this network.
        TypeError: If ``model`` is not an nn.Module.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se, plan_of
        >>> from se_retrofit.saving import load_se, save_se
        >>> base = timm.create_model("resnet10t")
        >>> model = load_se(base, save_se(add_se(base, reduction=4), tempfile.mkdtemp() + "/se.safetensors"))
        >>> plan_of(model).options["reduction"]
        4
    """
    check_module(model)
    file = Path(file)
    state = read_weights(file)
    plan, tied = _read_se_header(file)
    tie(state, tied, file)
    result = carried_out(model, plan, file, example_inputs, attention, inplace=False)
    own = {k: v for k, v in tensors_of(result).items() if belongs_to(k, plan_of(result).sites)}
    check_keys(own, state, str(file))
    result.load_state_dict(state, strict=False)
    return result


def _read_se_header(file: Path) -> tuple[Plan, dict[str, str]]:
    with safe_open(file, "pt") as handle:
        text = (handle.metadata() or {}).get("se_retrofit")
    if text is None:
        raise RetrofitError(f"{file} holds no SE modules by save_se; a whole network is loaded by load_retrofitted")
    header = parse_json(text, f"the header of {file}")
    if isinstance(header, dict) and "plan" not in header:  # written before plans could be carried out
        parts = {key: header.pop(key) for key in ("sites", "skipped", "inputs") if key in header}
        header["plan"] = {**parts, "options": header.pop("add_se", None)}
    checked: Header = read_fields(header, Header, f"{file}: header")
    return read_plan(checked.plan, checked.plan.get("options"), file), checked.tied
