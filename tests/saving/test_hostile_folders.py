"""A saved folder may be anybody's: whatever stands in it, nothing of it is run, fetched, or read from elsewhere."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from recipes import edit, recipe_of
from safetensors.torch import load_file, save_file
from torch import nn

from se_retrofit import RetrofitError, add_se, load_retrofitted, save_retrofitted
from se_retrofit.models import Base

NETWORK = "test_resnet"  # timm's smallest


class Bomb:
    """Its pickle makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Exists once code has run."""
    return tmp_path / "code ran"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, with no way to the network."""
    monkeypatch.chdir(tmp_path)

    def reached(*args: object) -> None:
        raise AssertionError(f"a saved folder reached for the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", reached)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", reached)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", reached)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", reached)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", reached)


def base(name: str, library: str = "timm", **kwargs: Any) -> dict[str, Any]:
    return {"library": library, "name": name, "kwargs": kwargs}


def test_the_bomb_goes_off_where_a_file_is_unpickled(tmp_path: Path, marker: Path) -> None:
    """Or the tests below would show nothing."""
    torch.save({"state_dict": {}, "bomb": Bomb(marker)}, tmp_path / "extra.pth")
    torch.load(tmp_path / "extra.pth", weights_only=False)
    assert marker.exists()


# Arguments


ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a checkpoint beside": ("timm", {"checkpoint_path": "extra.pth"}),
    "a checkpoint in the folder": ("timm", {"checkpoint_path": "saved/extra.pth"}),
    "a checkpoint by a way around": ("timm", {"checkpoint_path": "saved/../extra.pth"}),
    "weights by URL": ("torchvision", {"weights": "https://example.org/weights.pth"}),
    "weights by name": ("torchvision", {"weights": "IMAGENET1K_V1"}),
    "weights by default": ("torchvision", {"weights": "DEFAULT"}),
    "the old way to say so": ("torchvision", {"pretrained": True}),
    "timm's pretrained": ("timm", {"pretrained": True}),
    "a config with a file": ("timm", {"pretrained_cfg": {"file": "extra.pth"}}),
    "an overlay with a URL": ("timm", {"pretrained_cfg_overlay": {"url": "https://example.org/weights.pth"}}),
    "a cache": ("timm", {"cache_dir": "/etc"}),
    "a device": ("timm", {"device": "cuda"}),
    "a path as a layer": ("timm", {"act_layer": "../extra.pth"}),
    "a URL as a layer": ("timm", {"act_layer": "https://example.org/layer"}),
    "a file as a layer": ("timm", {"norm_layer": "extra.pth"}),
    "a file in a list": ("timm", {"block_args": [{"attn_layer": ["a/b"]}]}),
    "a file in a block's arguments": ("timm", {"block_args": {"checkpoint_path": "extra"}}),
    "weights in a block's arguments": ("timm", {"block_args": {"pretrained": True}}),
    "too deep": ("timm", {"block_args": [[[[[[[[]]]]]]]]}),
    "too large": ("timm", {"num_classes": 10**30}),
    "no number": ("timm", {"drop_rate": float("nan")}),
    "a name that is none": ("timm", {"x y\n": 1}),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_only_arguments_that_say_how_a_network_is_built_are_passed_on(case: str, saved: Path, marker: Path) -> None:
    for folder in (saved, saved.parent):
        torch.save({"state_dict": {}, "bomb": Bomb(marker)}, folder / "extra.pth")
    library, kwargs = ARGUMENTS[case]
    name, said = NETWORK if library == "timm" else "resnet18", next(iter(kwargs)).strip()[:3]
    edit(saved, base=base(name, library, **kwargs))
    with pytest.raises(RetrofitError, match=rf"(?s)recipe.json names can't be built.*{said}.*base=model"):
        load_retrofitted(saved)
    with pytest.raises(RetrofitError, match=r"can't be built with"):  # and as early as a base gets its name
        Base.of(f"{library}/{name}", **kwargs)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        (
            "timm/test_resnet",
            {"num_classes": 3, "in_chans": 1, "act_layer": "silu", "global_pool": "max", "drop_rate": 0.1},
        ),
        ("timm/test_resnet", {"output_stride": 8, "norm_layer": "groupnorm1", "stem_type": "deep", "block_args": {}}),
        ("timm/test_efficientnet", {"drop_path_rate": 0.1, "bn_eps": 1e-3, "se_layer": "se", "pad_type": ""}),
        ("timm/test_byobnet", {"stem_chs": 8, "attn_kwargs": {"rd_ratio": 0.5}}),
        ("torchvision/resnet18", {"replace_stride_with_dilation": [False, False, False], "zero_init_residual": True}),
        ("torchvision/mobilenet_v2", {"width_mult": 0.25, "dropout": 0.0, "weights": None}),
        ("torchvision/lraspp_mobilenet_v3_large", {"num_classes": 2, "weights_backbone": None}),
    ],
)
def test_arguments_that_say_how_a_network_is_built_arrive(name: str, kwargs: dict[str, Any]) -> None:
    assert isinstance(Base.of(name, **kwargs).build(), nn.Module)


def test_a_layer_given_as_a_class_is_refused_where_the_base_is_named() -> None:
    with pytest.raises(RetrofitError, match=r"act_layer=<class .*GELU.*a type is no plain value.*base=model"):
        Base.of("timm/test_resnet", act_layer=nn.GELU)


# Names


NAMES = [
    "hf-hub:someone/net", "hf_hub:someone/net", "HF-HUB:someone/net", " hf-hub:someone/net", "hf-\thub:someone/net",
    "local-dir:/etc", "local-dir:.", "local-dir:../other", "LOCAL-DIR:.", "https://example.org/net", "../saved", "/etc/passwd",
    "someone/test_resnet", "test_resnet.a:b", "test_resnet.r160_in1k/../../etc", "test_resnet\n", "", ":", "timm/test_resnet",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_in_a_recipe_is_one_of_the_librarys_own(name: str, saved: Path, marker: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, saved):
        (folder / "config.json").write_text(json.dumps({"architecture": NETWORK, "num_classes": 3}))
        torch.save({"x": Bomb(marker)}, folder / "pytorch_model.bin")
    for library in ("timm", "torchvision", "", "os"):
        edit(saved, base=base(name, library))
        with pytest.raises(RetrofitError, match=r"recipe.json names can't be built"):
            load_retrofitted(saved)
    assert not marker.exists()


def test_a_folder_that_names_the_hub_loads_once_the_caller_says_so(saved: Path, tmp_path: Path) -> None:
    there = folder_of_timms(tmp_path / "named", num_classes=3)
    edit(saved, base=base(f"local-dir:{there}"))
    with pytest.raises(RetrofitError, match=r"load_retrofitted\(directory, base='local-dir:.*save the network again"):
        load_retrofitted(saved)
    assert load_retrofitted(saved, base=f"local-dir:{there}").num_classes == 3


# Folders and repositories in timm's format


def folder_of_timms(folder: Path, *, weights: str | None = None, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": NETWORK, "pretrained_cfg": {}, **config}))
    if weights is not None:
        save_file(timm.create_model(NETWORK, num_classes=3).state_dict(), folder / weights)
    return folder


def test_a_network_of_the_hub_is_saved_by_the_librarys_own_name(tmp_path: Path) -> None:
    """Whoever loads the folder fetches and reads nothing else, and its images are prepared as before."""
    config = {"num_classes": 3, "mean": [0.1], "input_size": [1, 96, 96]}
    args = {"act_layer": "silu"}
    there = folder_of_timms(tmp_path / "named", pretrained_cfg=config, model_args=args, num_classes=3)
    named = Base.of(f"local-dir:{there}")
    model = add_se(named.build()).eval()
    folder = save_retrofitted(model, tmp_path / "told", base=named)
    recipe = recipe_of(folder)
    assert recipe["base"] == base(NETWORK, act_layer="silu", num_classes=3, in_chans=1)
    assert recipe["images"]["mean"] == [0.1]
    (there / "config.json").unlink()
    x = torch.rand(1, 1, 96, 96)
    assert torch.equal(load_retrofitted(folder)(x), model(x))


@pytest.mark.parametrize("args", [{"checkpoint_path": "extra.pth"}, {"pretrained": True}, {"act_layer": "a/b"}])
def test_the_config_of_a_repository_says_only_how_a_network_is_built(args: dict[str, Any], tmp_path: Path) -> None:
    there = folder_of_timms(tmp_path / "named", model_args=args)
    with pytest.raises(RetrofitError, match=f"can't be built with {next(iter(args))}"):
        Base.of(f"local-dir:{there}").build()


@pytest.mark.parametrize(
    "text", ["[1]", "{}", '{"architecture": [1]}', '{"architecture": "resnet18", "model_args": 3}', "["]
)
def test_a_broken_config_of_a_repository_is_an_error_in_plain_words(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RetrofitError, match="can't build 'local-dir"):
        Base.of(f"local-dir:{tmp_path}").build()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "a.pth", "b.pth.tar"])
def test_weights_of_a_folder_are_not_unpickled(file: str, tmp_path: Path, marker: Path) -> None:
    there = folder_of_timms(tmp_path / "named", num_classes=3)
    torch.save({"state_dict": timm.create_model(NETWORK, num_classes=3).state_dict(), "x": Bomb(marker)}, there / file)
    with pytest.raises(RetrofitError, match="can't build 'local-dir"):
        Base.of(f"local-dir:{there}").build(pretrained=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "config", [{}, {"hf_hub_filename": "evil.bin"}, {"hf_hub_filename": "evil.bin", "custom_load": "hf"}]
)
def test_weights_of_a_repository_are_not_unpickled(
    config: dict[str, Any], tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = folder_of_timms(tmp_path / "named", pretrained_cfg=config)
    torch.save({**timm.create_model(NETWORK).state_dict(), "x": Bomb(marker)}, there / "evil.bin")

    def download(repo_id: str, filename: str, **options: Any) -> str:
        if filename.endswith(".safetensors"):
            raise EntryNotFoundError("there is none")
        return str(there / (filename if filename == "config.json" else "evil.bin"))

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: "config.json")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    # older versions of timm find newer ones of the hub's client missing, since some name in it is gone
    monkeypatch.setattr("timm.models._hub._has_hf_hub", True)
    monkeypatch.setattr("timm.models._hub.EntryNotFoundError", EntryNotFoundError, raising=False)
    with pytest.raises(RetrofitError, match=r"can't build 'hf-hub:someone/net' with pretrained weights"):
        Base.of("hf-hub:someone/net").build(pretrained=True)
    assert not marker.exists()


def test_weights_of_a_folder_load(tmp_path: Path) -> None:
    there = folder_of_timms(tmp_path / "named", weights="model.safetensors", num_classes=3)
    model = Base.of(f"local-dir:{there}").build(pretrained=True)
    assert all(torch.equal(v, load_file(there / "model.safetensors")[k]) for k, v in model.state_dict().items())
    assert "state_dict" not in model.pretrained_cfg
