"""A saved network comes back as it was, a save that fails leaves what was there, and what does not fit is refused."""

from __future__ import annotations

import copy
import pickle
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from networks import assert_same_function
from networks import narrow_resnet as small  # no library knows it by a name
from recipes import assert_same_state, recipe_of
from safetensors.torch import load_file
from saved_before import FOLDERS, Pairs, stirred
from sweeps import swept
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import se_retrofit.saving.atomic
import se_retrofit.saving.tensors
from se_retrofit import (
    RetrofitError,
    add_se,
    has_se,
    load_retrofitted,
    plan_of,
    remove_se,
    save_retrofitted,
)
from se_retrofit.models import Base
from se_retrofit.saving import load_se, save_se
from se_retrofit.saving.atomic import NEW, replaced_directory, replaced_file
from se_retrofit.saving.base import base_of

X = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert_same_state(a, b)
    assert_same_function(a.eval(), b.eval(), X)


def tiny(**options: Any) -> nn.Module:
    return timm.create_model("test_resnet", **options)


# There and back


def with_new_head() -> nn.Module:
    model = add_se(tiny())
    model.reset_classifier(3)
    return model


NAMED: dict[str, tuple[Callable[[], nn.Module], Base | str | None]] = {
    "the name given": (lambda: add_se(torchvision.models.squeezenet1_1()), "torchvision/squeezenet1_1"),
    "no head": (lambda: add_se(tiny(num_classes=0), 4, gate="sigmoid", include="layer[14].*"), None),
    "a new head": (with_new_head, None),
    "stochastic depth": (lambda: add_se(tiny(drop_path_rate=0.2, drop_rate=0.1)), None),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_network_of_a_library_comes_back_the_same(case: str, tmp_path: Path) -> None:
    build, base = NAMED[case]
    model = stirred(build())
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved", base=base))
    assert_same(model, again)
    assert plan_of(again).sites == plan_of(model).sites
    assert not again.training


def test_a_folder_holds_a_recipe_and_weights_and_no_pickle(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=7, in_chans=1)
    folder = save_retrofitted(add_se(model), tmp_path / "saved")
    assert sorted(f.name for f in folder.iterdir()) == ["recipe.json", "weights.safetensors"]
    assert int.from_bytes((folder / "weights.safetensors").read_bytes()[:8], "little") < 1_000_000  # a header's length
    assert len({stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()}) == 1
    recipe = recipe_of(folder)
    kwargs = {"num_classes": 7, "in_chans": 1}
    assert recipe["base"] == {"library": "timm", "name": "resnet10t.c3_in1k", "kwargs": kwargs}
    assert recipe["add_se"]["reduction"] == 8
    assert len(recipe["plan"]["sites"]) == 4
    assert set(recipe["versions"]) == {"se-retrofit", "torch", "torchvision", "timm"}
    assert load_retrofitted(folder).conv1[0].in_channels == 1


def test_a_network_that_was_built_by_name_remembers_it(tmp_path: Path) -> None:
    """Through copies, pickles and the surgery, in nothing that a state dict or a pickle of a plain network would show."""
    base = Base.of("torchvision/squeezenet1_1", num_classes=4)
    bare = base.build()
    assert b"se_retrofit" not in pickle.dumps(bare)
    assert bare.state_dict().keys() == torchvision.models.squeezenet1_1().state_dict().keys()
    model = pickle.loads(pickle.dumps(add_se(remove_se(add_se(copy.deepcopy(bare))))))
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"))
    assert_same(again, model)
    assert Base.noted(again) == Base.noted(bare) == base
    model.classifier[1] = nn.Conv2d(512, 7, 1)
    with pytest.raises(RetrofitError, match=r"torchvision/squeezenet.*classifier.1.weight .*\(7, 512, 1, 1\)"):
        load_retrofitted(save_retrofitted(model, tmp_path / "saved"))


def test_a_chain_whose_activations_hold_se_is_known_by_its_name() -> None:
    base = Base.of("torchvision/vgg11")
    with torch.device("meta"):
        assert base_of(add_se(base.build(), inplace=True)) == (base, "")


def test_arguments_that_leave_no_trace_in_the_name_are_noticed(tmp_path: Path) -> None:
    """The same keys and shapes, other strides: built from the name it would compute something else."""
    model = stirred(add_se(tiny(output_stride=8)))
    folder = save_retrofitted(model, tmp_path / "saved")
    assert recipe_of(folder)["base"] is None
    with pytest.raises(RetrofitError, match=r"another network than the one that was saved.*base=model"):
        load_retrofitted(folder)
    assert_same(load_retrofitted(folder, base=tiny(output_stride=8)), model)
    told = save_retrofitted(model, tmp_path / "told", base=Base.of("timm/test_resnet", output_stride=8))
    assert_same(load_retrofitted(told), model)


def test_a_network_that_cannot_be_built_by_name_says_so_when_it_is_saved(tmp_path: Path) -> None:
    changed = add_se(tiny())
    changed.fc = nn.Identity()
    for model, said in ((add_se(small()), "does not tell the name"), (changed, "another network .*fc")):
        with pytest.warns(UserWarning, match=f"{said}.*base=network"):
            save_retrofitted(model, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_retrofitted(add_se(tiny()), tmp_path / "saved")


def test_a_base_that_no_library_knows_is_given_by_the_caller_and_not_touched(tmp_path: Path) -> None:
    base = small()
    model, before = stirred(add_se(base)), copy.deepcopy(base)
    save_retrofitted(model, tmp_path / "saved")
    with pytest.raises(
        RetrofitError, match=r"does not say how to build its base network.*load_retrofitted\(directory, base=model\)"
    ):
        load_retrofitted(tmp_path / "saved")
    assert_same(load_retrofitted(tmp_path / "saved", base=base), model)
    assert not has_se(base)
    assert_same_state(base, before)
    with pytest.raises(RetrofitError, match=r"can't be repeated on this base"):
        load_retrofitted(tmp_path / "saved", base=tiny())


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = small()
        model.layer2[0].conv2.weight = model.layer1[0].conv2.weight
        model.layer2[0].bn2.running_mean = model.layer1[0].bn2.running_mean
        return model

    model = stirred(add_se(tied()))
    save_retrofitted(model, tmp_path / "saved")
    assert recipe_of(tmp_path / "saved")["tied"]["layer2.0.conv2.weight"] == "layer1.0.conv2.weight"
    assert "layer2.0.conv2.weight" not in load_file(tmp_path / "saved" / "weights.safetensors")
    again = load_retrofitted(tmp_path / "saved", base=tied())
    assert again.layer2[0].conv2.weight is again.layer1[0].conv2.weight
    assert_same(again, model)
    # into a base in which they are not tied, the values come all the same
    assert_same(load_retrofitted(tmp_path / "saved", base=small()), model)


def of_two_dtypes(model: nn.Module) -> None:
    model.to(torch.bfloat16).fc.float()


def channels_last(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


def views_of_one_tensor(model: nn.Module) -> None:
    whole = torch.randn(16)
    model.layer1[0].bn1.running_mean, model.layer2[0].bn1.running_mean = whole[:8], whole[8:]
    model.layer1[0].bn2.running_mean = whole[4:12]


@pytest.mark.parametrize("change", [of_two_dtypes, channels_last, views_of_one_tensor])
def test_tensors_of_any_type_and_layout_are_stored_whole(change: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model = add_se(small())
    change(model)
    assert_same_state(load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=small()), model)


# Folders


class Killed(BaseException):
    """A killed process tidies nothing up."""


@pytest.mark.parametrize(
    "moment",
    swept(["while it writes", "on a full disk"], ["before the first rename", "between the two renames"]),
)
def test_whatever_stops_a_save_leaves_a_network_that_loads(
    moment: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = load_retrofitted(saved), stirred(add_se(tiny(num_classes=4)))
    rename, renamed = Path.rename, []

    def stops(*args: Any, **kwargs: Any) -> Any:
        if len(renamed) < (moment == "between the two renames"):
            renamed.append(args)
            return rename(*args)
        raise OSError(28, "No space left on device") if moment == "on a full disk" else Killed

    with monkeypatch.context() as patch:
        if "rename" in moment:
            patch.setattr(Path, "rename", stops)
        else:
            patch.setattr(se_retrofit.saving.tensors, "save_tensors", stops)
        if moment == "on a full disk":
            with pytest.raises(RetrofitError, match="No space left on device; what was there before is untouched"):
                save_retrofitted(new, saved)
        else:
            patch.setattr(se_retrofit.saving.atomic.shutil, "rmtree", lambda *args, **options: None)
            with pytest.raises(Killed):
                save_retrofitted(new, saved)
    assert_same(load_retrofitted(saved), old)
    # and the next save is not in the way of what is left
    assert_same(load_retrofitted(save_retrofitted(new, saved)), new)
    assert [f.name for f in saved.parent.iterdir()] == ["saved"]


def test_a_read_only_file_system_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)  # it refuses to remove what is not there, too
    with pytest.raises(RetrofitError, match=r"page.html can't be written"), replaced_file(tmp_path / "page.html"):
        refuse()


def test_the_folder_that_one_is_in_loads_and_is_not_replaced(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    model = load_retrofitted(".")
    with pytest.raises(RetrofitError, match="as a whole"):
        save_retrofitted(model, ".")
    assert has_se(load_retrofitted("."))


def test_a_recipe_that_an_editor_has_written_again_loads(saved: Path) -> None:
    file = saved / "recipe.json"
    file.write_text(file.read_text(), encoding="utf-8-sig", newline="\r\n")
    assert has_se(load_retrofitted(saved))


def test_the_folder_of_a_run_stands_for_its_result(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run" / "best")
    assert_same(load_retrofitted(tmp_path / "run"), load_retrofitted(saved))


# What is refused


@pytest.fixture
def folder(saved: Path) -> Path:
    """One with a saved network, with SE alone of a small one, whole and cut short, and with a file of another kind."""
    file = save_se(add_se(small()), saved.parent / "se.safetensors")
    (saved.parent / "cut.safetensors").write_bytes(file.read_bytes()[:-10])
    (saved.parent / "thesis.tex").write_text("years of work")
    (saved.parent / "empty").mkdir()
    return saved.parent


def quantised() -> nn.Module:
    """One with a weight of a subclass of Tensor, as torchao quantises it."""
    model: Any = add_se(small())
    model.fc.weight = nn.Parameter(TwoTensor(model.fc.weight.detach(), model.fc.weight.detach()))
    return model


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: save_retrofitted(small(), d / "a"), r"no SE inserted by add_se.*model = add_se\(model\)"),
    (lambda d: save_retrofitted(add_se(small().to("meta")), d / "a"), "on the meta device and has no values"),
    (lambda d: save_retrofitted(nn.DataParallel(add_se(small())), d / "a"), r"give what is in it, model\.module"),
    (lambda d: save_se(torch.compile(add_se(small())), d / "a.safetensors"), r"what is in it, model\._orig_mod"),  # type: ignore[arg-type]
    (lambda d: save_retrofitted(quantised(), d / "a"), r"fc\.weight is a TwoTensor .*quantise what is loaded"),
    (lambda d: save_retrofitted(add_se(small()), d / "a", base="resnet18"), "does not build the network that is to be"),
    (lambda d: save_retrofitted(add_se(small()), d), "holds other files"),
    (lambda d: save_retrofitted(add_se(small()), d / "thesis.tex"), "is a file"),
    (lambda d: load_retrofitted(d / "nowhere"), "no folder .*nowhere"),
    (lambda d: load_retrofitted(d / "empty"), "holds no network"),
    (lambda d: load_retrofitted(d / "saved", base=nn.Linear(3, 3)), "can't be repeated on this base"),
    (
        lambda d: load_retrofitted(d / "saved", base=tiny(num_classes=4).to("meta")),
        "is on the meta device; build it on",
    ),
    (lambda d: load_retrofitted(FOLDERS / "inputs", base=Pairs(), example_inputs=X), "on the given example_inputs"),
    (lambda d: save_se(small(), d / "se.safetensors"), "no SE inserted by add_se, so there is nothing to save"),
    (lambda d: load_se(tiny(), d / "se.safetensors"), r"no place for its site layer1\.0"),
    (lambda d: load_se(add_se(small()), d / "se.safetensors"), "retrofitted already"),
    (lambda d: load_se(small(), d / "saved" / "weights.safetensors"), "holds no SE modules by save_se"),
    (lambda d: load_se(small(), d / "none.safetensors"), "no file"),
    (lambda d: load_se(small(), d / "cut.safetensors"), "cut short"),
]
OF_WRONG_TYPES: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: save_retrofitted("resnet18", d / "a"), "must be an nn.Module"),  # type: ignore[arg-type]
    (lambda d: save_retrofitted(add_se(small()), d / "a", base=18), "or a Base, got 18"),  # type: ignore[arg-type]
    (lambda d: load_retrofitted(d / "saved", base=18), "base must be a network, a name or a Base"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("call", "says", "error"),
    [(*row, RetrofitError) for row in REFUSED] + [(*row, TypeError) for row in OF_WRONG_TYPES],
    ids=[says for _, says in REFUSED + OF_WRONG_TYPES],
)
def test_what_cannot_be_done_is_refused_and_no_file_changes(
    call: Callable[[Path], object], says: str, error: type[Exception], folder: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(error, match=says):
        call(folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_se_gets_the_dtype_of_the_network_that_it_is_loaded_onto(tmp_path: Path) -> None:
    file = save_se(add_se(small()), tmp_path / "se.safetensors")
    assert {t.dtype for t in load_se(small().double(), file).parameters()} == {torch.float64}


def test_two_that_write_one_file_at_once_each_write_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    with replaced_file(file) as last, replaced_file(file) as first:
        for fresh in (first, last):
            fresh.write_text(fresh.parent.name)
            fresh.with_suffix(".data").write_text(fresh.parent.name)
    assert file.read_text() == file.with_suffix(".data").read_text() == last.parent.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.data", "model.onnx"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_the_next_write_removes_what_a_killed_one_left_and_not_what_another_is_writing(tmp_path: Path) -> None:
    (tmp_path / f"{NEW}killed").mkdir()
    (tmp_path / f"{NEW}killed" / "model.onnx").touch()
    with replaced_file(tmp_path / "slow") as slow:
        slow.touch()
        with replaced_file(tmp_path / "quick") as quick:
            quick.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quick", "slow"]


def test_a_write_that_ends_meanwhile_is_no_error_of_another(tmp_path: Path) -> None:
    (tmp_path / f"{NEW}ended").symlink_to(tmp_path / "removed")  # listed, but no longer there
    with replaced_file(tmp_path / "file") as fresh:
        fresh.touch()
    assert (tmp_path / "file").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="has neither")
def test_links_to_folders_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "saved").symlink_to(tmp_path / "disk" / "saved")
    for content in ("old", "new"):
        with replaced_directory(tmp_path / "saved", ("file",)) as fresh:
            (fresh / "file").write_text(content)
    assert (tmp_path / "saved").is_symlink()
    assert (tmp_path / "disk" / "saved" / "file").read_text() == "new"
    assert len([*tmp_path.rglob("*")]) == 4  # and nothing else
    (tmp_path / "null").symlink_to("/dev/null")
    with replaced_file(tmp_path / "null") as fresh:
        fresh.write_text("lost")
    assert (tmp_path / "null").is_char_device()


def test_two_that_save_to_one_place_at_once_take_turns(tmp_path: Path) -> None:
    inside: list[int] = []

    def save(number: int) -> None:
        with replaced_directory(tmp_path / "saved", ("file",)) as fresh:
            inside.append(number)
            time.sleep(0.05)
            assert inside[-1] == number
            (fresh / "file").write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert (tmp_path / "saved" / "file").read_text() == str(inside[-1])
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
