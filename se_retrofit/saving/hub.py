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
from .atomic import settled
from .card import card_text
from .networks import load_retrofitted, save_retrofitted
from .recipe import RECIPE, WEIGHTS, network_in

CARD = "README.md"


def push_to_hub(
    model: nn.Module | str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a retrofitted network",
) -> str:
    """Upload a retrofitted network to the Hugging Face hub: weights, recipe, and the card returned by ``model_card``.

    All files are uploaded in one commit. An existing card is kept.

    Args:
        model: a network from ``add_se``, or a folder written by ``save_retrofitted`` or a fine-tune.
        repo_id: ``"user/name"``; the repository is created if it does not exist.
        license: the licence to put on the card, such as ``"apache-2.0"``.
        private: whether a newly created repository is private; None for the account's default.
        token: access token of the account; None for the one stored by ``hf auth login``.
        revision: the branch to upload to, which is created if it does not exist; None for the main branch.
        commit_message: message of the commit.

    Returns:
        The URL of the repository.

    Raises:
        RetrofitError: As for ``save_retrofitted``; if the folder is not a saved network; or if the hub refuses the
            upload or can't be reached.
        TypeError: If ``model`` is neither a network nor a folder.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.saving import push_to_hub
        >>> model = add_se(timm.create_model("resnet10t"))
        >>> push_to_hub(model, "me/resnet10t-se")  # doctest: +SKIP
        'https://huggingface.co/me/resnet10t-se'
    """
    api = huggingface_hub.HfApi(token=token, library_name="se_retrofit")
    with _saved(model) as saved, tempfile.TemporaryDirectory() as temporary:
        folder, card = Path(temporary), card_text(saved, repo_id, license)
        for name in (WEIGHTS, RECIPE):
            shutil.copy(saved / name, folder / name)
        with _hub_errors(f"{repo_id} can't be uploaded"):
            url = str(api.create_repo(repo_id, private=private, exist_ok=True))
            if revision is not None and not revision.startswith("refs/"):  # a pull request
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if not api.file_exists(repo_id, CARD, revision=revision):
                (folder / CARD).write_text(card, encoding="utf-8")
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return url


def model_card(model: nn.Module | str | Path, repo_id: str, *, license: str | None = None) -> str:
    """Return the card that ``push_to_hub`` would upload, without uploading anything.

    It shows the base, the licence (if given), the size of the weights, the classes and the preparation of images, the
    scores of the best epoch (for the folder of a run), how to load the network, and the table of the plan.

    Args:
        model, repo_id, license: as for ``push_to_hub``.

    Raises:
        RetrofitError, TypeError: As for ``push_to_hub``, or if ``repo_id`` is not a valid name for a repository.

    Example:
        >>> import timm
        >>> from se_retrofit import add_se
        >>> from se_retrofit.saving import model_card
        >>> card = model_card(add_se(timm.create_model("resnet10t")), "me/resnet10t-se", license="mit")
        >>> [line for line in card.splitlines() if "licen" in line]
        ['license: mit', '| licence | mit |']
    """
    with _hub_errors(f"{repo_id} can't be uploaded"):
        huggingface_hub.utils.validate_repo_id(repo_id)
    with _saved(model) as saved:
        return card_text(saved, repo_id, license)


@contextmanager
def _saved(model: nn.Module | str | Path) -> Iterator[Path]:
    """Provide the folder of a saved network, which is temporary if the network itself is given."""
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as temporary:
            yield save_retrofitted(model, Path(temporary) / "network")
    elif isinstance(model, (str, Path)):
        yield settled(network_in(Path(model)))
    else:
        raise TypeError(f"model must be an nn.Module or a folder, got {brief(model)} of type {type(model).__name__}")


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
        name: ``"user/name"`` on the hub, or a folder written by ``save_retrofitted`` or a fine-tune.
        revision: a branch, tag or commit; None for the main branch.
        token: as for ``push_to_hub``.
        cache_dir: where to cache downloads; None for the hub's own cache.
        base, attention, example_inputs: as for ``load_retrofitted``.

    Returns:
        The network, on the CPU and in eval mode.

    Raises:
        RetrofitError: As for ``load_retrofitted``; if there is no such repository or revision, or it holds no
            retrofitted network; or if the hub can't be reached and the network is not cached.

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
    """Turn whatever the hub's client raises into one line; connection errors depend on its HTTP library."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RetrofitError(f"{what}: {reason}") from error
