"""Squeeze-and-Excitation in a torchvision segmentation network, trained in a plain loop. Runs offline.

python examples/trainer_segmentation.py
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from se_retrofit import add_se, load_retrofitted, plan_of, save_retrofitted
from se_retrofit.models import Base

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=6)
options = parser.parse_args()


def make_pictures(seed: int, count: int = 4) -> tuple[Tensor, Tensor]:
    """Noisy pictures (count, 3, 64, 64) with a bright disc in each, and masks (count, 64, 64)."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, 1, generator=generator) * 32 + 16
    row, column = ((torch.arange(64) - middle) ** 2 for middle in centre.unbind(1))
    disc = row[:, :, None] + column[:, None] < 14**2
    return torch.rand(count, 3, 64, 64, generator=generator) + disc[:, None], disc.long()


torch.manual_seed(0)
# a name and its arguments say how to build the network again; weights="DEFAULT" would download trained weights
base = Base.of("torchvision/fcn_resnet50", weights_backbone=None, num_classes=2, aux_loss=True)
model = add_se(base.build(), reduction=16)  # the model remembers its base
print(f"{len(plan_of(model).sites)} SE modules")

optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
model.train()
losses = []
for step in range(options.steps):
    pictures, masks = make_pictures(step)
    scores = model(pictures)  # a dict, as without SE
    loss = cross_entropy(scores["out"], masks) + 0.5 * cross_entropy(scores["aux"], masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("the loss has fallen:", losses[-1] < losses[0])

save_retrofitted(model, "segmenter")
again = load_retrofitted("segmenter")
pictures, masks = make_pictures(1000)
with torch.no_grad():
    same = torch.equal(model.eval()(pictures)["out"], again.eval()(pictures)["out"])
print("loaded again, same scores:", same)
