"""Squeeze-and-Excitation in MONAI's SegResNet, on volumes. Runs offline, on generated volumes.

python examples/trainer_monai.py
"""

import argparse

import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.networks.nets import SegResNet

from se_retrofit import add_se, plan_of

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()


def make_volume(seed: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy volume (1, 1, size, size, size) with a bright ball in it, and the ball's mask."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(3, generator=generator) * size / 2 + size / 4
    axes = [(torch.arange(size) - middle) ** 2 for middle in centre]
    ball = axes[0][:, None, None] + axes[1][:, None] + axes[2] < (size / 4) ** 2
    return (torch.rand(1, 1, size, size, size, generator=generator) + ball), ball[None, None].float()


torch.manual_seed(0)
base = SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=1, blocks_down=(1, 2), blocks_up=(1,))
# yours: base.load_state_dict(torch.load("trained.pt"))
model = add_se(base, reduction=4)
print(plan_of(model))

loss_of = DiceLoss(sigmoid=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for step in range(options.steps):
    volume, mask = make_volume(step)
    loss = loss_of(model(volume), mask)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print("the loss has fallen:", losses[-1] < losses[0])

# all parameters were trained, so all are saved, for the same network with the same SE
torch.save(model.state_dict(), "segresnet.pt")
again = add_se(
    SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=1, blocks_down=(1, 2), blocks_up=(1,)),
    reduction=4,
)
again.load_state_dict(torch.load("segresnet.pt"))

# SE averages over the window, so use windows as large as in training, as for any network with SE
volume, mask = make_volume(1000, size=36)
with torch.no_grad():
    masks = [
        sliding_window_inference(volume, roi_size=24, sw_batch_size=4, predictor=net.eval()) > 0
        for net in (model, again)
    ]
print("loaded again, same mask:", torch.equal(*masks))
overlap = 2 * (masks[0] * mask).sum() / (masks[0].sum() + mask.sum())
print(f"Dice on a volume not seen before: {overlap:.2f}")
