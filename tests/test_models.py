"""Networks by name, and checkpoints for them: the right network, or one clear sentence."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from se_retrofit.errors import RetrofitError
from se_retrofit.models import Base, load_checkpoint


@pytest.mark.parametrize(
    ("name", "library", "model"),
    [
        ("resnet18", "timm", "resnet18"),
        ("timm/resnet18", "timm", "resnet18"),
        ("torchvision/resnet18", "torchvision", "resnet18"),
        ("resnet18.a1_in1k", "timm", "resnet18.a1_in1k"),
        ("googlenet", "torchvision", "googlenet"),  # timm has none
        ("ResNet18", "timm", "resnet18"),
        ("torchvision/ResNet18", "torchvision", "resnet18"),
        ("hf-hub:someone/some-model", "timm", "hf-hub:someone/some-model"),
    ],
)
def test_a_name_finds_its_library(name: str, library: str, model: str) -> None:
    base = Base.of(name)
    assert (base.library, base.name) == (library, model)


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/quantized_shufflenet_v2_x0_5"])
def test_arguments_reach_the_builder_which_neither_warns_nor_downloads(name: str) -> None:
    assert Base.of(name, num_classes=7).build()(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "kwargs", "pretrained", "error", "said"),
    [
        ("resnet5", {}, False, RetrofitError, "resnet50"),
        ("torchvision/seresnet50", {}, False, RetrofitError, "no model 'seresnet50' in torchvision"),
        ("keras/resnet50", {}, False, RetrofitError, "no library 'keras'"),
        ("", {}, False, RetrofitError, "no model ''"),
        (nn.Linear(1, 1), {}, False, TypeError, "must be a string"),
        ("timm/test_resnet", {"num_clases": 7}, False, RetrofitError, "num_clases"),
        ("torchvision/squeezenet1_1", {"num_clases": 7}, False, RetrofitError, "num_clases"),
        ("resnet18.nonsense", {}, True, RetrofitError, r"resnet18\.nonsense"),
    ],
)
def test_what_cannot_be_built_is_an_error_that_helps(
    name: Any, kwargs: dict[str, int], pretrained: bool, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Base.of(name, **kwargs).build(pretrained)


def test_weights_that_cannot_be_downloaded_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", refuse)
    with pytest.raises(RetrofitError, match="no route to host"):
        Base.of("timm/resnet18").build(pretrained=True)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("variables", "said"),
    [({"HF_HUB_OFFLINE": "1"}, "offline mode"), ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused")],
    ids=["told to be offline", "not reached"],
)
def test_a_network_of_the_hub_fails_at_once_where_the_hub_is_not_reached(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    # in a process of its own: the hub's client reads the variables when it is imported
    program = """
import socket
from se_retrofit import RetrofitError
from se_retrofit.models import Base
tries, connect = [], socket.socket.connect
socket.socket.connect = lambda *a: tries.append(a) or connect(*a)
try:
    Base.of("hf-hub:someone/net@v1").build()
except RetrofitError as error:
    print(len(tries), error)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    tries, _, message = done.stdout.partition(" ")
    assert int(tries) <= 2  # the client tries a refused connection anew at once; with its waits it comes to 8 in 23 s
    assert message.startswith("someone/net ")
    assert said in message


def test_a_network_of_the_hub_that_is_in_the_cache_is_built_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"architecture": "resnet10t", "num_classes": 7}')
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: str(config))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *a, **k: str(config))
    assert Base.of("hf-hub:someone/net").build()(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [(None, ""), ("state_dict", "module."), ("model", "_orig_mod."), ("state_dict_ema", ""), ("model_ema", "")],
)
def test_checkpoints_as_people_save_them_load(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source, target = small(), small()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "c.pth")
    save_file(state, tmp_path / "c.safetensors")
    load_checkpoint(target, tmp_path / ("c.pth" if wrapper else "c.safetensors"))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def renamed(state: dict[str, torch.Tensor], counters: bool = False) -> dict[str, torch.Tensor]:
    """As another library has it: other names, and perhaps no counters."""
    return {f"net/{number}": value for number, value in enumerate(state.values()) if value.dim() or counters}


def test_a_checkpoint_with_other_names_is_shown_and_loaded_by_order(tmp_path: Path) -> None:
    path, source, target = tmp_path / "c.pth", small(), small()
    nn.init.normal_(source[1].running_mean)
    own = source.state_dict()
    for state in (renamed(own), renamed(own, counters=True), {k: v for k, v in own.items() if v.dim()}):
        torch.save(state, path)
        with pytest.raises(RetrofitError, match="missing"):
            load_checkpoint(target, path)
        load_checkpoint(target, path, remap="order")
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
        assert torch.equal(source[1].running_mean, target[1].running_mean)
        target = small()
    torch.save(source.state_dict(), path)  # by names, where they agree
    load_checkpoint(target, path, remap="order")


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a checkpoint ran')",)


STATE = small().state_dict()
IN_ORDER = (
    r"net/0 \(4, 3, 3, 3\) and 0.weight \(4, 3, 3, 3\), net/1 \(4,\) and 0.bias .*, net/2 .* all 6 .*remap=\"order\""
)


@pytest.mark.parametrize(
    ("content", "remap", "said"),
    [
        (None, "order", "no checkpoint file"),
        (b"garbage", "order", "can't be read"),
        (b"", "order", "can't be read"),
        ({"state_dict": Exploit()}, "order", "can't be read"),
        ([1, 2], "order", "can't be read"),
        ({"epoch": 3}, "order", "state dict"),
        ({k: v for k, v in STATE.items() if k != "1.bias"}, "order", r"missing: 1\.bias"),
        ({**STATE, "2.weight": torch.ones(1)}, "order", r"unexpected: 2\.weight"),
        ({**STATE, "0.bias": torch.ones(5)}, "order", r"other shapes: 0\.bias"),
        (renamed(STATE), None, IN_ORDER),
        (renamed(STATE) | {"net/2": torch.ones(5)}, "order", r"pair 3 has other shapes: net/2 \(5,\) and 1.weight \(4,\)$"),
        (renamed(STATE) | {"more": torch.ones(5)}, "order", "7 of them in the file and 6 in"),
    ],
    ids=[
        "absent", "garbage", "empty", "code", "list", "no tensors", "missing", "unexpected", "other shapes",
        "other names", "a pair of other shapes", "one more in order",
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_an_error_and_changes_nothing(
    content: object, remap: Any, said: str, tmp_path: Path
) -> None:
    path, model = tmp_path / "c.pth", small()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before = copy.deepcopy(model.state_dict())
    for given in {None, remap}:
        with pytest.raises(RetrofitError, match=said):
            load_checkpoint(model, path, remap=given)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_safetensors_keep_no_order_to_load_by(tmp_path: Path) -> None:
    save_file(renamed(STATE), tmp_path / "c.safetensors")
    for remap in (None, "order"):
        with pytest.raises(RetrofitError, match="order"):
            load_checkpoint(small(), tmp_path / "c.safetensors", remap=remap)  # type: ignore[arg-type]
