"""Save, load and export a retrofitted network like any other.

python examples/retrofit_and_export.py
"""

import copy
import tempfile
from pathlib import Path

import torch
import torchvision

from se_retrofit import add_se

folder = Path(tempfile.mkdtemp())
model = torchvision.models.resnet18(num_classes=10)
images = torch.randn(2, 3, 64, 64)
retrofitted = add_se(model).eval()
wanted = retrofitted(images)

# the weights alone, for a network that was retrofitted with the same options
torch.save(retrofitted.state_dict(), folder / "weights.pth")
again = add_se(torchvision.models.resnet18(num_classes=10)).eval()
again.load_state_dict(torch.load(folder / "weights.pth"))
print("state dict:", torch.equal(wanted, again(images)))

# the original's checkpoint fits too: only SE's keys are missing
missing = retrofitted.load_state_dict(model.state_dict(), strict=False).missing_keys
print(
    "missing from the original's checkpoint:",
    len(missing),
    "keys, all of SE:",
    all("se_attention" in k for k in missing),
)

# the whole network, as a pickle
torch.save(retrofitted, folder / "model.pth")
print("pickle:", torch.equal(wanted, torch.load(folder / "model.pth", weights_only=False)(images)))
print("deepcopy:", torch.equal(wanted, copy.deepcopy(retrofitted)(images)))

# a graph for deployment
program = torch.export.export(retrofitted, (images,))
torch.export.save(program, folder / "model.pt2")
exported = torch.export.load(folder / "model.pt2").module()
print("export:", torch.allclose(wanted, exported(images), atol=1e-6))
