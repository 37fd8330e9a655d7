"""Networks go to the hub and come back: the hub's client is cut at its border, and a folder stands for the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from networks import randomise_se, randomised
from torch import nn
from typer.testing import CliRunner

from se_retrofit import RetrofitError, add_se, plan_of, save_retrofitted
from se_retrofit.cli.commands import app
from se_retrofit.saving import from_pretrained, push_to_hub

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a folder for each repository."""
    root = tmp_path / "hub"

    def create_repo(self: Any, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def file_exists(self: Any, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return (root / repo_id / filename).is_file()

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> None:
        assert commit_message
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        if not (root / repo_id).is_dir():
            raise LocalEntryNotFoundError(f"no {repo_id}")
        return str(root / repo_id)

    for function in (create_repo, file_exists, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


@pytest.fixture
def model() -> nn.Module:
    return randomise_se(add_se(randomised(timm.create_model("resnet10t", num_classes=10)), reduction=4)).eval()


def test_the_round_trip_is_equal_bit_for_bit(hub: Path, model: nn.Module) -> None:
    assert push_to_hub(model, "me/net") == "https://huggingface.co/me/net"
    again = from_pretrained("me/net")
    assert type(again).__name__ == type(model).__name__
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(again(X), model(X))


def test_the_card_holds_the_plan_and_loads_as_the_hubs_own(hub: Path, model: nn.Module) -> None:
    push_to_hub(model, "me/net")
    card = huggingface_hub.ModelCard.load(hub / "me/net/README.md")
    assert card.data.library_name == "se_retrofit"
    assert "squeeze-and-excitation" in card.data.tags
    assert str(plan_of(model)) in card.text
    assert 'from_pretrained("me/net")' in card.text
    assert "reduction=4" in card.text


def test_a_card_that_is_there_is_kept(hub: Path, model: nn.Module) -> None:
    (hub / "me/net").mkdir(parents=True)
    (hub / "me/net/README.md").write_text("mine")
    push_to_hub(model, "me/net")
    assert (hub / "me/net/README.md").read_text() == "mine"


def test_a_saved_folder_goes_up_by_the_command_line(hub: Path, model: nn.Module, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(save_retrofitted(model, tmp_path / "saved")), "me/net"])
    assert result.exit_code == 0, result.output
    assert result.output == "uploaded to https://huggingface.co/me/net\n"
    assert sorted(file.name for file in (hub / "me/net").iterdir()) == [
        "README.md", "recipe.json", "weights.safetensors",
    ]  # fmt: skip
    assert torch.equal(from_pretrained("me/net")(X), model(X))
    assert torch.equal(from_pretrained(tmp_path / "saved")(X), model(X))


def test_mistakes_are_one_line_and_nothing_goes_up(hub: Path, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match="me/none is neither a folder nor could it be downloaded: no me/none"):
        from_pretrained("me/none")
    with pytest.raises(RetrofitError, match="no SE modules"):
        push_to_hub(timm.create_model("resnet10t"), "me/net")
    with pytest.raises(RetrofitError, match="no folder"):
        push_to_hub(tmp_path / "none", "me/net")
    with pytest.raises(TypeError, match=r"must be an nn\.Module or a folder, got 3 of type int"):
        push_to_hub(3, "me/net")  # type: ignore[arg-type]
    assert not hub.exists()


def test_a_hub_that_refuses_is_an_error_of_ours(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(RetrofitError, match="me/net can't be uploaded: no route"):
        push_to_hub(model, "me/net")


def test_a_name_that_the_hub_does_not_allow_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match="could it be downloaded"):
        from_pretrained("a/b/c/d")
