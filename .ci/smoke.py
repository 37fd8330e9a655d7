"""What a plain installation without extras has to do: retrofit, save, load, report, undo."""

import tempfile
from pathlib import Path

import timm
import torch

import se_retrofit
from se_retrofit import add_se, inspect_se, load_retrofitted, remove_se, save_retrofitted

assert "site-packages" in str(se_retrofit.__file__), se_retrofit.__file__
model = timm.create_model("resnet18").eval()
retrofitted = add_se(model)
x = torch.randn(2, 3, 64, 64)
assert torch.equal(retrofitted(x), model(x))
loaded = load_retrofitted(save_retrofitted(retrofitted, Path(tempfile.mkdtemp()) / "saved"))
assert torch.equal(loaded(x), model(x))
print(inspect_se(loaded).report())
assert list(remove_se(loaded).state_dict()) == list(model.state_dict())
