from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import stat
import subprocess
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
from networks import narrow_resnet as small  # no library knows it by a name
from safetensors.torch import load_file
from sweeps import swept
from torch import nn

import se_retrofit.saving.atomic
import se_retrofit.saving.tensors
from se_retrofit import (
    RetrofitError,
    SEAttention,
    add_se,
    has_se,
    load_retrofitted,
    plan_of,
    plan_se,
    remove_se,
    save_retrofitted,
)
from se_retrofit.models import Base
from se_retrofit.saving import load_se, save_se
from se_retrofit.saving.atomic import replaced_directory


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer with values of its own, SE gates away from 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) * 0.1 + 0.01)
    return model.eval()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = stirred(add_se(timm.create_model("test_resnet", num_classes=10)))
    return save_retrofitted(network, tmp_path_factory.mktemp("sound") / "saved")


def assert_same(a: nn.Module, b: nn.Module) -> None:
    x = torch.rand(2, 3, 64, 64)
    assert a.state_dict().keys() == b.state_dict().keys()
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key]), key
        assert value.dtype == b.state_dict()[key].dtype, key
    with torch.no_grad():
        assert torch.equal(a.eval()(x), b.eval()(x))


# There and back


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (Base.of("timm/test_resnet", num_classes=10), {}),
        (
            Base.of("timm/test_resnet", num_classes=0),
            {"reduction": 4, "gate": "sigmoid", "bias": True, "min_hidden": 2},
        ),
        (Base.of("timm/test_resnet", in_chans=3), {"include": ["layer1.*", "layer4.*"], "placement": "pre"}),
        (Base.of("torchvision/squeezenet1_1", num_classes=5), {"exclude": "features.3"}),
        pytest.param(Base.of("timm/mnasnet_small"), {}, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_a_saved_network_comes_back_the_same(base: Base, options: dict[str, Any], tmp_path: Path) -> None:
    model = stirred(add_se(base.build(), **options))
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"))
    assert_same(model, again)
    assert plan_of(again) == plan_of(model)
    assert not again.training


def test_timm_networks_tell_where_they_come_from(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=7, in_chans=1)
    recipe = json.loads((save_retrofitted(add_se(model), tmp_path / "saved") / "recipe.json").read_text())
    assert recipe["base"] == {
        "library": "timm",
        "name": "resnet18.a1_in1k",
        "kwargs": {"num_classes": 7, "in_chans": 1},
    }
    assert recipe["add_se"]["reduction"] == 8
    assert len(recipe["plan"]["sites"]) == 8
    assert set(recipe["versions"]) == {"se-retrofit", "torch", "torchvision", "timm"}
    assert load_retrofitted(tmp_path / "saved").conv1.in_channels == 1


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


def test_the_base_may_be_given_by_its_name(tmp_path: Path) -> None:
    model = add_se(torchvision.models.squeezenet1_1())
    save_retrofitted(model, tmp_path / "saved", base="torchvision/squeezenet1_1")
    assert_same(load_retrofitted(tmp_path / "saved"), model)


def test_a_new_head_is_in_the_recipe(tmp_path: Path) -> None:
    model = add_se(timm.create_model("test_resnet"))
    model.reset_classifier(3)
    assert load_retrofitted(save_retrofitted(model, tmp_path / "saved")).fc.out_features == 3


def test_arguments_that_leave_no_trace_in_the_name_are_noticed(tmp_path: Path) -> None:
    """The same keys and shapes, other strides: built from the name it would compute something else."""
    model = stirred(add_se(timm.create_model("test_resnet", output_stride=8)))
    folder = save_retrofitted(model, tmp_path / "saved")
    assert json.loads((folder / "recipe.json").read_text())["base"] is None
    with pytest.raises(RetrofitError, match=r"another network than the one that was saved.*base=model"):
        load_retrofitted(folder)
    assert_same(load_retrofitted(folder, base=timm.create_model("test_resnet", output_stride=8)), model)
    told = save_retrofitted(model, tmp_path / "told", base=Base.of("timm/test_resnet", output_stride=8))
    assert_same(load_retrofitted(told), model)


def test_stochastic_depth_is_no_part_of_the_saved_network(tmp_path: Path) -> None:
    model = stirred(add_se(timm.create_model("test_resnet", drop_path_rate=0.2, drop_rate=0.1)))
    assert_same(load_retrofitted(save_retrofitted(model, tmp_path / "saved")), model)


def test_a_base_that_no_library_knows_is_given_by_the_caller(tmp_path: Path) -> None:
    base = small()
    model = stirred(add_se(base))
    save_retrofitted(model, tmp_path / "saved")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(
        RetrofitError, match=r"does not say how to build its base network.*load_retrofitted\(directory, base=model\)"
    ):
        load_retrofitted(tmp_path / "saved")
    assert_same(load_retrofitted(tmp_path / "saved", base=base), model)
    assert not has_se(base)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in before.items())


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = small()
        model.layer2[0].conv2.weight = model.layer1[0].conv2.weight
        model.layer2[0].bn2.running_mean = model.layer1[0].bn2.running_mean
        return model

    model = stirred(add_se(tied()))
    save_retrofitted(model, tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "weights.safetensors")
    recipe = json.loads((tmp_path / "saved" / "recipe.json").read_text())
    assert recipe["tied"]["layer2.0.conv2.weight"] == "layer1.0.conv2.weight"
    assert "layer2.0.conv2.weight" not in stored
    again = load_retrofitted(tmp_path / "saved", base=tied())
    assert again.layer2[0].conv2.weight is again.layer1[0].conv2.weight
    assert_same(again, model)
    # into a base in which they are not tied, the values come all the same
    assert_same(load_retrofitted(tmp_path / "saved", base=small()), model)


def test_a_network_that_cannot_be_built_by_name_says_so_when_it_is_saved(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"does not tell the name .*base=network"):
        save_retrofitted(add_se(small()), tmp_path / "saved")
    changed = add_se(timm.create_model("test_resnet", num_classes=3))
    changed.fc = nn.Identity()
    with pytest.warns(UserWarning, match=r"another network .*fc.*base=network"):
        save_retrofitted(changed, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_retrofitted(add_se(timm.create_model("test_resnet", num_classes=3)), tmp_path / "saved")


def test_views_of_one_tensor_that_are_not_the_same_are_stored_whole(tmp_path: Path) -> None:
    model = add_se(small())
    whole = torch.randn(16)
    model.layer1[0].bn1.running_mean = whole[:8]
    model.layer2[0].bn1.running_mean = whole[8:]
    model.layer1[0].bn2.running_mean = whole[4:12]
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=small())
    assert torch.equal(again.layer1[0].bn2.running_mean, whole[4:12])
    assert torch.equal(again.layer2[0].bn1.running_mean, whole[8:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = add_se(small()).to(dtype)
    model.fc.float()
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=small())
    assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}


def test_channels_last_weights_are_stored_in_any_case(tmp_path: Path) -> None:
    model = stirred(add_se(small())).to(memory_format=torch.channels_last)
    again = load_retrofitted(save_retrofitted(model, tmp_path / "saved"), base=small())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.sweep
def test_a_saved_network_loads_in_a_fresh_process(saved: Path) -> None:
    code = (
        "import sys, torch, se_retrofit; m = se_retrofit.load_retrofitted(sys.argv[1]);"
        "print(float(m(torch.ones(1, 3, 64, 64)).sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(float(load_retrofitted(saved)(torch.ones(1, 3, 64, 64)).sum()))


def test_no_file_is_a_pickle_and_all_have_ordinary_permissions(saved: Path) -> None:
    assert sorted(f.name for f in saved.iterdir()) == ["recipe.json", "weights.safetensors"]
    assert int.from_bytes((saved / "weights.safetensors").read_bytes()[:8], "little") < 1_000_000  # a header's length
    modes = {stat.S_IMODE(f.stat().st_mode) for f in saved.iterdir()}
    assert len(modes) == 1


# Folders


def test_saving_again_replaces_the_folder(saved: Path) -> None:
    model = stirred(add_se(timm.create_model("test_resnet", num_classes=3)), seed=2)
    save_retrofitted(model, saved)
    assert_same(load_retrofitted(saved), model)
    assert [f.name for f in saved.parent.iterdir()] == ["saved"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RetrofitError, match=r"holds files of other kinds \(thesis.tex\)"):
        save_retrofitted(add_se(small()), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    "moment",
    swept(["while it writes"], ["before the first rename", "between the two renames"]),
)
def test_a_kill_at_any_moment_leaves_a_network_that_loads(
    saved: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    old = load_retrofitted(saved)
    rename, done = Path.rename, []

    def dies(self: Path, target: Path) -> Path:
        if len(done) == (moment == "between the two renames"):
            raise Killed
        done.append(1)
        return rename(self, target)

    def dies_writing(*args: Any, **kwargs: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        # a killed process tidies nothing up
        patch.setattr(se_retrofit.saving.atomic, "_remove", lambda path: None)
        if moment == "while it writes":
            patch.setattr(se_retrofit.saving.tensors, "save_tensors", dies_writing)
        else:
            patch.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            save_retrofitted(stirred(add_se(timm.create_model("test_resnet", num_classes=3))), saved)
    assert_same(load_retrofitted(saved), old)
    # and the next save is not in the way of what is left
    new = stirred(add_se(timm.create_model("test_resnet", num_classes=4)))
    assert_same(load_retrofitted(save_retrofitted(new, saved)), new)
    assert [f.name for f in saved.parent.iterdir()] == ["saved"]


def test_a_disk_that_refuses_leaves_the_old_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = load_retrofitted(saved)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(se_retrofit.saving.tensors, "save_tensors", full)
        with pytest.raises(
            RetrofitError, match=r"can't be written: No space left on device; what was there before is untouched"
        ):
            save_retrofitted(add_se(small()), saved)
    assert_same(load_retrofitted(saved), old)


def test_the_folder_that_one_is_in_loads_and_is_not_replaced(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    model = load_retrofitted(".")
    with pytest.raises(RetrofitError, match="as a whole"):
        save_retrofitted(model, ".")
    assert has_se(load_retrofitted("."))


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RetrofitError, match=r"is a file"):
        save_retrofitted(add_se(small()), tmp_path / "file")


# Broken input


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe = change(recipe) or recipe
    (folder / "recipe.json").write_text(json.dumps(recipe))


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no recipe": (lambda d: (d / "recipe.json").unlink(), "holds no network"),
    "no weights": (lambda d: (d / "weights.safetensors").unlink(), "no file .*weights.safetensors"),
    "cut weights": (
        lambda d: (d / "weights.safetensors").write_bytes((d / "weights.safetensors").read_bytes()[:-1000]),
        "weights.safetensors can't be read as safetensors, it may be cut short",
    ),
    "empty weights": (lambda d: (d / "weights.safetensors").write_bytes(b""), "can't be read as safetensors"),
    "cut recipe": (
        lambda d: (d / "recipe.json").write_text((d / "recipe.json").read_text()[:-20]),
        "recipe.json can't be read, it may be cut",
    ),
    "a list": (lambda d: (d / "recipe.json").write_text("[1]"), "must hold a mapping, got list"),
    "unknown field": (lambda d: edit(d, lambda r: {**r, "mood": 1}), "unknown: mood"),
    "missing field": (lambda d: edit(d, lambda r: {k: v for k, v in r.items() if k != "tied"}), "missing: tied"),
    "newer format": (lambda d: edit(d, lambda r: {**r, "format": 3, "mood": 1}), "of format 3, newer than this"),
    "wrong type": (lambda d: edit(d, lambda r: {**r, "plan": "all"}), "plan is of type str, expected dict"),
    "format true": (lambda d: edit(d, lambda r: {**r, "format": True}), "format is of type bool"),
    "unknown base": (
        lambda d: edit(d, lambda r: {**r, "base": {"library": "timm", "name": "test_resnett", "kwargs": {}}}),
        "can't be built",
    ),
    "unknown library": (
        lambda d: edit(d, lambda r: {**r, "base": {"library": "keras", "name": "test_resnet", "kwargs": {}}}),
        "can't be built",
    ),
    "unknown option": (
        lambda d: edit(d, lambda r: {**r, "add_se": {**r["add_se"], "glow": 1}}),
        "can't be repeated on this base.*glow",
    ),
    "other plan": (
        lambda d: edit(d, lambda r: r["plan"]["sites"][0].update(path="layer9.0.se_attention", block="layer9.0")),
        r"can't be repeated on this base: .*layer9\.0\.se_attention",
    ),
    "other options": (
        lambda d: edit(d, lambda r: r["add_se"].update(reduction=2)),
        "layer1.0.se_attention has 256 parameters",
    ),
    "broken site": (
        lambda d: edit(d, lambda r: r["plan"]["sites"][0].pop("after") and None),
        r"plan\.sites\[0\] is broken.*missing: after",
    ),
    "plan without options": (lambda d: edit(d, lambda r: {**r, "add_se": None}), "both be given or both be null"),
    "tie to nothing": (lambda d: edit(d, lambda r: {**r, "tied": {"a": "b"}}), "a is tied to b"),
    "other classes": (
        lambda d: edit(d, lambda r: r["base"]["kwargs"].update(num_classes=11)),
        "does not fit the network; other shapes: fc.bias, fc.weight",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_input_is_a_clear_error(saved: Path, name: str) -> None:
    do, says = BREAKS[name]
    do(saved)
    with pytest.raises(RetrofitError, match=says):
        load_retrofitted(saved)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match=r"no folder .*nowhere"):
        load_retrofitted(tmp_path / "nowhere")


def test_the_folder_of_a_run_stands_for_its_result(saved: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(RetrofitError, match="holds no network"):
        load_retrofitted(run)
    shutil.copytree(saved, run / "best")
    assert_same(load_retrofitted(run), load_retrofitted(saved))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RetrofitError, match=r"no SE modules.*model = add_se\(model\)"):
        save_retrofitted(small(), tmp_path / "saved")
    with pytest.raises(TypeError, match=r"must be an nn.Module"):
        save_retrofitted("resnet18", tmp_path / "saved")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"base must be a name such as 'timm/resnet18', or a Base, got 18"):
        save_retrofitted(add_se(small()), tmp_path / "saved", base=18)  # type: ignore[arg-type]
    for base in ("resnet18", Base.of("resnet18")):
        with pytest.raises(RetrofitError, match=r"does not build the network that is to be saved: "):
            save_retrofitted(add_se(small()), tmp_path / "saved", base=base)
    with pytest.raises(RetrofitError, match=r"on the meta device and has no values"):
        save_retrofitted(add_se(small().to("meta")), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_base_of_another_kind_is_refused(saved: Path) -> None:
    for other in (small(), nn.Linear(3, 3)):
        with pytest.raises(RetrofitError, match=r"can't be repeated on this base"):
            load_retrofitted(saved, base=other)
    with pytest.raises(TypeError, match=r"base must be a network, a name or a Base"):
        load_retrofitted(saved, base=18)  # type: ignore[arg-type]


# SE alone


def test_se_alone_goes_onto_the_same_base_again(tmp_path: Path) -> None:
    base = stirred(small())
    model = add_se(base, reduction=4)
    for module in model.modules():
        if isinstance(module, SEAttention):
            stirred(module, seed=7)
    file = save_se(model, tmp_path / "se.safetensors")
    assert sum(v.numel() for v in load_file(file).values()) == plan_of(model).parameters
    again = load_se(base, file)
    assert not has_se(base)
    assert_same(again, model)


def test_se_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = save_se(add_se(small()), tmp_path / "se.safetensors")
    other = timm.create_model("test_resnet")
    with pytest.raises(RetrofitError, match=r"no place for its site layer1\.0"):
        load_se(other, file)
    assert not has_se(other)
    with pytest.raises(RetrofitError, match=r"retrofitted already"):
        load_se(add_se(small(), reduction=2), file)
    with pytest.raises(RetrofitError, match=r"holds no SE modules by save_se"):
        load_se(small(), save_retrofitted(add_se(small()), tmp_path / "whole") / "weights.safetensors")
    with pytest.raises(RetrofitError, match=r"no file"):
        load_se(small(), tmp_path / "none.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RetrofitError, match=r"cut short"):
        load_se(small(), file)
    with pytest.raises(RetrofitError, match=r"no SE modules to save"):
        save_se(small(), file)


def test_example_inputs_are_given_again_on_loading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = small().layer1[0]
    channels = first.conv1.in_channels

    class Plain(nn.Module):
        """Its first layer doesn't tell the input's shape."""

        def __init__(self) -> None:
            super().__init__()
            self.unfold = nn.Linear(6, 64)
            self.widen = nn.Conv2d(1, channels, 3, padding=1)
            self.block = copy.deepcopy(first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.widen(self.unfold(x).view(-1, 1, 8, 8)))

    inputs = torch.zeros(2, 6)
    assert plan_se(Plain(), example_inputs=inputs).sites
    model = add_se(Plain(), example_inputs=inputs).eval()
    save_retrofitted(model, tmp_path / "saved")
    again = load_retrofitted(tmp_path / "saved", base=Plain(), example_inputs=inputs)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_se_gets_the_dtype_of_the_network_that_it_is_loaded_onto(tmp_path: Path) -> None:
    file = save_se(add_se(small()), tmp_path / "se.safetensors")
    assert {t.dtype for t in load_se(small().double(), file).parameters()} == {torch.float64}


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
