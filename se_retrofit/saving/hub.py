"""Saved networks on the Hugging Face hub, with a model card that says what was retrofitted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from ..attention import Attention
from ..errors import RetrofitError, brief
from ..models import Base
from ..plan import Plan
from .atomic import settled
from .base import named_base
from .networks import load_retrofitted, save_retrofitted
from .recipe import RECIPE, WEIGHTS, network_in, read_recipe

__all__ = ["from_pretrained", "push_to_hub"]

CARD = "README.md"


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a retrofitted network",
) -> str:
    """Upload a retrofitted network to the Hugging Face hub: weights, recipe, and a model card with the plan's table.

    All files are uploaded in one commit. An existing card is kept.

    Args:
        model: a network that ``add_se`` made, or the folder that ``save_retrofitted`` or a fine-tune wrote.
        repo_id: ``"user/name"``; the repository is created if it does not exist.
        private: whether a newly created repository is private; None for the account's default.
        token: access token of the account; None for the one that ``hf auth login`` stored.
        revision: the branch; None for the main one.
        commit_message: message of the upload's commit.

    Returns:
        The address of the repository.

    Raises:
        RetrofitError: what ``save_retrofitted`` raises for the model; the folder is not a saved network; the hub refuses the
            upload or can't be reached.
        TypeError: ``model`` is neither a network nor a folder.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.saving import push_to_hub
        >>> model = add_se(timm.create_model("resnet10t"))
        >>> push_to_hub(model, "me/resnet10t-se")  # doctest: +SKIP
        'https://huggingface.co/me/resnet10t-se'
    """
    if not isinstance(model, (nn.Module, str, Path)):
        raise TypeError(f"model must be an nn.Module or a folder, got {brief(model)} of type {type(model).__name__}")
    api = huggingface_hub.HfApi(token=token, library_name="se_retrofit")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "network"
        if isinstance(model, nn.Module):
            save_retrofitted(model, folder)
        else:
            saved = settled(network_in(Path(model)))
            read_recipe(saved)
            folder.mkdir()
            for name in (WEIGHTS, RECIPE):
                shutil.copy(saved / name, folder / name)
        with _hub_errors(f"{repo_id} can't be uploaded"):
            url = str(api.create_repo(repo_id, private=private, exist_ok=True))
            if not api.file_exists(repo_id, CARD, revision=revision):
                (folder / CARD).write_text(_card(folder, repo_id), encoding="utf-8")
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return url


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    base: nn.Module | Base | str | None = None,
    attention: Attention | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Load a retrofitted network from the Hugging Face hub, or from a folder on disk.

    Args:
        name: ``"user/name"`` on the hub, or a folder that ``save_retrofitted`` or a fine-tune wrote.
        revision: a branch, tag or commit; None for the main branch.
        token: as for ``push_to_hub``.
        cache_dir: where downloads are kept; None for the hub's own cache.
        base, attention, example_inputs: as for ``load_retrofitted``.

    Returns:
        The network, on the CPU, in eval mode.

    Raises:
        RetrofitError: what ``load_retrofitted`` raises; there is no such repository or revision, it holds no retrofitted
            network, or the hub can't be reached and the cache does not have it.

    Example:
        >>> import tempfile, timm
        >>> from se_retrofit import add_se, save_retrofitted
        >>> from se_retrofit.saving import from_pretrained
        >>> folder = save_retrofitted(add_se(timm.create_model("resnet10t")), tempfile.mkdtemp())
        >>> type(from_pretrained(folder)).__name__
        'ResNet'
    """
    if settled(Path(name)).is_dir():
        return load_retrofitted(name, base=base, attention=attention, example_inputs=example_inputs)
    with _hub_errors(f"{name} is neither a folder nor could it be downloaded"):
        folder = huggingface_hub.snapshot_download(
            str(name), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=[WEIGHTS, RECIPE],
            library_name="se_retrofit",
        )  # fmt: skip
    return load_retrofitted(folder, base=base, attention=attention, example_inputs=example_inputs)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Whatever the hub's client raises, as one line: errors of the connection depend on its HTTP library."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RetrofitError(f"{what}: {reason}") from error


def _card(folder: Path, repo_id: str) -> str:
    recipe = read_recipe(folder)
    plan = None if recipe["plan"] is None else Plan.from_dict({**recipe["plan"], "options": recipe["add_se"]})
    base = named_base(recipe, folder)
    data = huggingface_hub.ModelCardData(
        library_name="se_retrofit",
        tags=["squeeze-and-excitation", "channel-attention", "pytorch"],
        base_model=str(base) if base is not None and base.library == "timm" and "." in base.name else None,
    )
    of = "" if base is None else f" of {base}"
    bare = "" if base is not None else ", base=the_bare_network"
    attention = (recipe["add_se"] or {}).get("attention")
    bare += ", attention=the_same" if isinstance(attention, dict) else ""
    options = {key: value for key, value in (recipe["add_se"] or {}).items() if value not in (None, [])}
    given = ", ".join(f"{key}={value!r}" for key, value in options.items())
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    table = "This network has no SE." if plan is None else f"Made by `add_se(model, {given})`:\n\n```text\n{plan}\n```"
    inserted = "Squeeze-and-Excitation" if plan is None or plan.what == "SE" else f"{plan.what} modules"
    return f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

A copy{of} with {inserted} in its convolutional blocks.

```python
from se_retrofit.saving import from_pretrained

model = from_pretrained("{repo_id}"{bare})
```

{table}

Saved with {versions}.
"""
