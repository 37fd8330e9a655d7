"""Networks go to the hub and come back: the hub's client is cut at its border, and a folder stands for the hub."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from command_line import called
from huggingface_hub.errors import LocalEntryNotFoundError
from networks import randomise_se, randomised
from torch import nn

from se_retrofit import RetrofitError, add_se, plan_of, save_retrofitted
from se_retrofit.models import IMAGES
from se_retrofit.saving import from_pretrained, model_card, push_to_hub

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
    assert "licence | not given; timm names" in card.text


@pytest.fixture
def run(model: nn.Module, tmp_path: Path) -> Path:
    """The folder of a run, whose second epoch was the best."""
    vars(model)[IMAGES] = {
        "input_size": [3, 64, 48], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.875,
        "crop_mode": "center", "classes": ["a|b", *"cdefghijk"], "multi_label": False,
    }  # fmt: skip
    save_retrofitted(model, tmp_path / "run" / "best")
    history = [{"epoch": n, "val_accuracy": n / 10, "val_f1": n / 20, "gates": {}, "seconds": 3.0} for n in (1, 2, 3)]
    state = {
        "progress": {"history": history, "best_epoch": 2}, "experiment": {"validation data": {"length": 1234}},
    }  # fmt: skip
    (tmp_path / "run" / "last").mkdir()
    (tmp_path / "run" / "last" / "training.json").write_text(json.dumps(state))
    return tmp_path / "run"


def test_the_card_of_a_run_says_what_it_is_and_how_good(run: Path) -> None:
    text = model_card(run, "me/net", license="mit")
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.pipeline_tag, data.metrics) == ("mit", "image-classification", ["accuracy", "f1"])
    table = text[text.index("| base") :].partition("\n\n")[0]
    rows = dict(line[2:-2].split(" | ", 1) for line in table.splitlines())
    size = (run / "best" / "weights.safetensors").stat().st_size / 1e6
    assert rows == {
        "base": "timm/resnet10t.c3_in1k with {'num_classes': 10}", "licence": "mit", "weights": f"{size:.1f} MB",
        "classes": r"10: a\|b, c, d, e, f, g, h, i, j, k", "accuracy on 1,234 validation images": "20.00%",
        "images": "3 x 64 x 48, bicubic, crop 0.875 (center), mean [0.5, 0.5, 0.5], std [0.2, 0.2, 0.2]",
        "f1 on 1,234 validation images": "10.00%",
    }  # fmt: skip
    (run / "last" / "training.json").write_text('{"progress": 3}')
    assert "validation" not in model_card(run, "me/net")


def test_a_dry_run_shows_the_card_without_a_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = called("push", run, "me/net", "--dry-run", "--license", "mit")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(model_card(run, "me/net", license="mit"))
    assert "Nothing was uploaded" in result.output
    with pytest.raises(RetrofitError, match="a/b/c can't be uploaded"):
        model_card(run, "a/b/c")


def test_a_card_that_is_there_is_kept(hub: Path, model: nn.Module) -> None:
    (hub / "me/net").mkdir(parents=True)
    (hub / "me/net/README.md").write_text("mine")
    push_to_hub(model, "me/net")
    assert (hub / "me/net/README.md").read_text() == "mine"


def test_a_saved_folder_goes_up_by_the_command_line(hub: Path, model: nn.Module, tmp_path: Path) -> None:
    result = called("push", save_retrofitted(model, tmp_path / "saved"), "me/net")
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
