"""Retrofitted networks as timm's own: built, trained, saved and validated by name, through what timm's scripts call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from se_retrofit import RetrofitError, SEAttention, plan_of
from se_retrofit.models import TIMM_PREFIX, register_timm

pytestmark = pytest.mark.usefixtures("timm_registry_as_before")

# what train.py and validate.py do with a model, without their data loading
SCRIPT = """
import argparse, timm, torch
from timm import utils
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
args = parser.parse_args()
torch.manual_seed(0)
model = timm.create_model(args.model, num_classes=5, drop_path_rate=0.1, **args.model_kwargs)
config = resolve_data_config({}, model=model)
images, labels = torch.rand(4, *config["input_size"]), torch.arange(4)
optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)
scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2)
for step in range(2):
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
scheduler.step(1)
utils.CheckpointSaver(model, optimizer, checkpoint_dir=".", recovery_dir=".", max_history=1).save_checkpoint(0, metric=1.0)
again = timm.create_model(args.model, num_classes=5, checkpoint_path="last.pth.tar", **args.model_kwargs)
with torch.no_grad():
    assert torch.equal(again.eval()(images), model.eval()(images))
print(type(model).__name__)
"""


def test_a_registered_name_builds_the_retrofitted_network_and_has_the_tags_of_the_base() -> None:
    assert register_timm("resnet10t", "resnet18") == ["se_retrofit_resnet10t", "se_retrofit_resnet18"]
    model = timm.create_model("se_retrofit_resnet10t", num_classes=7, se_reduction=16, se_exclude="layer1.*")
    assert model.num_classes == 7
    assert plan_of(model).options["reduction"] == 16
    assert [site.block for site in plan_of(model).sites] == ["layer2.0", "layer3.0", "layer4.0"]
    assert model.pretrained_cfg["architecture"] == "resnet10t"  # so save_retrofitted knows the base
    tagged = timm.create_model("se_retrofit_resnet18.a1_in1k")
    assert tagged.pretrained_cfg["tag"] == "a1_in1k"
    ours, theirs = (timm.list_pretrained(f"{prefix}resnet18.*") for prefix in (TIMM_PREFIX, ""))
    assert ours == [TIMM_PREFIX + name for name in theirs] != []


def test_every_architecture_is_registered_and_timms_own_names_stay() -> None:
    before = timm.list_models(exclude_filters=f"{TIMM_PREFIX}*")
    names = register_timm()
    assert names == sorted(TIMM_PREFIX + name for name in before)
    assert register_timm() == names
    assert timm.list_models(exclude_filters=f"{TIMM_PREFIX}*") == before
    with pytest.raises(RetrofitError, match="no convolutional blocks"):
        timm.create_model("se_retrofit_vit_tiny_patch16_224")


def test_a_pattern_that_matches_nothing_is_an_error_with_close_names() -> None:
    with pytest.raises(RetrofitError, match="'resnet5' matches no architecture of timm; close names: resnet50"):
        register_timm("resnet18", "resnet5")
    assert not timm.is_model("se_retrofit_resnet18")


@pytest.mark.sweep
def test_timms_scripts_train_and_validate_by_name(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    arguments = ["--model", "se_retrofit_resnet10t", "--model-kwargs", "se_reduction=4"]
    command = [sys.executable, "-W", "ignore", "-m", "se_retrofit", "timm", "script.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ResNet\n"
    state = torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict"]
    trained_se = [value for key, value in state.items() if key.endswith("se_attention.fc.2.weight")]
    assert len(trained_se) == 4
    assert all(bool(value.any()) for value in trained_se)
    assert not any(isinstance(module, SEAttention) for module in timm.create_model("resnet10t").modules())
