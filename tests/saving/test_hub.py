"""Networks go to the hub and come back: the hub's client is cut at its border, and a folder stands for the hub."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from command_line import said
from huggingface_hub.errors import LocalEntryNotFoundError
from networks import assert_same_function
from torch import nn

from se_retrofit import RetrofitError, add_se, load_retrofitted, plan_of
from se_retrofit.attention import Slot
from se_retrofit.saving import from_pretrained, model_card, push_to_hub
from se_retrofit.saving.networks import write_network

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

    def create_branch(self: Any, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        shutil.copytree(root / repo_id, root / f"{repo_id}@{branch}", dirs_exist_ok=exist_ok)

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> None:
        assert commit_message
        folder = root / (repo_id if revision is None else f"{repo_id}@{revision}")
        assert folder.is_dir()  # as the hub demands
        shutil.copytree(folder_path, folder, dirs_exist_ok=True)

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str], **options: Any) -> str:
        folder = root / (repo_id if revision is None else f"{repo_id}@{revision}")
        if not folder.is_dir():
            raise LocalEntryNotFoundError(f"no {repo_id}")
        return str(folder)

    for function in (create_repo, create_branch, file_exists, upload_folder):
        monkeypatch.setattr(huggingface_hub.HfApi, function.__name__, function)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


@pytest.fixture
def model(saved: Path) -> nn.Module:
    return load_retrofitted(saved)


def test_a_network_goes_up_and_comes_back_equal_bit_for_bit(hub: Path, model: nn.Module) -> None:
    assert push_to_hub(model, "me/net") == "https://huggingface.co/me/net"
    assert_same_function(from_pretrained("me/net"), model, X)
    card = huggingface_hub.ModelCard.load(hub / "me/net/README.md")  # it loads as the hub's own
    assert card.data.library_name == "se_retrofit"
    assert "squeeze-and-excitation" in card.data.tags
    for part in (str(plan_of(model)), 'from_pretrained("me/net")', "reduction=8", "licence | not given; timm names"):
        assert part in card.text
    (hub / "me/net/README.md").write_text("mine")
    push_to_hub(model, "me/net")
    assert (hub / "me/net/README.md").read_text() == "mine"
    (hub / "me/net/recipe.json").write_text("{}")  # that of the main branch
    for _ in ("a new branch", "the same one"):
        push_to_hub(model, "me/net", revision="v2")
    assert_same_function(from_pretrained("me/net", revision="v2"), model, X)
    assert (hub / "me/net/recipe.json").read_text() == "{}"


def test_a_saved_folder_goes_up_by_the_command_line(hub: Path, model: nn.Module, saved: Path) -> None:
    assert said("push", saved, "me/net") == "uploaded to https://huggingface.co/me/net\n"
    assert sorted(file.name for file in (hub / "me/net").iterdir()) == [
        "README.md", "recipe.json", "weights.safetensors",
    ]  # fmt: skip
    for name in ("me/net", saved):
        assert_same_function(from_pretrained(name), model, X)


@pytest.fixture
def run(saved: Path) -> Path:
    """The folder of a run, whose second epoch was the best."""
    folder = saved.parent / "run"
    shutil.copytree(saved, folder / "best")
    history = [{"epoch": n, "val_accuracy": n / 10, "val_f1": n / 20, "gates": {}, "seconds": 3.0} for n in (1, 2, 3)]
    state = {
        "progress": {"history": history, "best_epoch": 2}, "experiment": {"validation data": {"length": 1234}},
    }  # fmt: skip
    (folder / "last").mkdir()
    (folder / "last" / "training.json").write_text(json.dumps(state))
    return folder


def test_the_card_of_a_run_says_what_it_is_and_how_good(run: Path) -> None:
    text = model_card(run, "me/net", license="mit")
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.pipeline_tag, data.metrics) == ("mit", "image-classification", ["accuracy", "f1"])
    table = text[text.index("| base") :].partition("\n\n")[0]
    rows = dict(line[2:-2].split(" | ", 1) for line in table.splitlines())
    size = (run / "best" / "weights.safetensors").stat().st_size / 1e6
    assert rows == {
        "base": "timm/test_resnet.r160_in1k with {'num_classes': 3}", "licence": "mit", "weights": f"{size:.1f} MB",
        "classes": r"3: a\|b, c, d", "accuracy on 1,234 validation images": "20.00%",
        "images": "3 x 64 x 48, bicubic, crop 0.875 (center), mean [0.5, 0.5, 0.5], std [0.2, 0.2, 0.2]",
        "f1 on 1,234 validation images": "10.00%",
    }  # fmt: skip
    (run / "last" / "training.json").write_text('{"progress": 3}')
    assert "validation" not in model_card(run, "me/net")
    assert "| classes" not in model_card(add_se(timm.create_model("test_resnet")), "me/net")


def own(slot: Slot) -> nn.Module:
    return nn.Conv2d(slot.channels, slot.channels, 1)


def test_the_card_claims_only_what_was_inserted(tmp_path: Path) -> None:
    write_network(timm.create_model("test_resnet"), tmp_path)  # as a fine-tune without SE does
    text = model_card(tmp_path, "me/plain")
    assert "\nA copy of timm/test_resnet.r160_in1k.\n" in text
    assert huggingface_hub.ModelCard(text).data.tags == ["pytorch"]
    text = model_card(add_se(timm.create_model("test_resnet"), attention=own), "me/own")
    assert "with own modules in its" in text
    assert f"attention={own.__module__}.own)" in text  # as one would write it


def refuse(*args: Any, **options: Any) -> None:
    raise ConnectionError("no route")


def test_a_dry_run_shows_the_card_without_a_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", refuse)
    output = said("push", run, "me/net", "--dry-run", "--license", "mit")
    assert output.startswith(model_card(run, "me/net", license="mit"))
    assert "Nothing was uploaded" in output


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: from_pretrained("me/none"), RetrofitError, "me/none is neither a folder nor .*downloaded: no me/none"),
        (lambda: model_card("none", "a/b/c"), RetrofitError, "a/b/c can't be uploaded"),
        (lambda: push_to_hub(nn.Conv2d(3, 3, 3), "me/net"), RetrofitError, "no SE inserted by add_se"),
        (lambda: push_to_hub("none", "me/net"), RetrofitError, "no folder"),
        (lambda: push_to_hub(3, "me/net"), TypeError, "nn.Module or a folder, got 3 of type int"),  # type: ignore[arg-type]
    ],
)
def test_mistakes_are_one_line_and_nothing_goes_up(
    call: Callable[[], object], error: type[Exception], says: str, hub: Path
) -> None:
    with pytest.raises(error, match=says):
        call()
    assert not hub.exists()


def test_a_hub_that_refuses_is_an_error_of_ours(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(RetrofitError, match="me/net can't be uploaded: no route"):
        push_to_hub(model, "me/net")
