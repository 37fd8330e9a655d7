"""Squeeze-and-Excitation in a torchvision detector, trained in a plain loop. Runs offline, on generated pictures.

python examples/trainer_detection.py
"""

import argparse

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from se_retrofit import add_se, load_retrofitted, plan_of, save_retrofitted
from se_retrofit.finetune import param_groups

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=12)
options = parser.parse_args()


def build() -> FasterRCNN:
    """The network without SE; yours may be fasterrcnn_resnet50_fpn(weights="DEFAULT")."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    few = {
        "rpn_post_nms_top_n_train": 64,
        "rpn_post_nms_top_n_test": 64,
        "box_batch_size_per_image": 32,
    }  # small pictures
    return FasterRCNN(backbone, num_classes=3, min_size=128, max_size=128, **few)


def make_picture(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A picture of one red (1) or blue (2) rectangle, and its box."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(3, 128, 128, generator=generator) / 3
    width, height = torch.randint(32, 64, (2,), generator=generator).tolist()
    left = int(torch.randint(128 - width, (), generator=generator))
    top = int(torch.randint(128 - height, (), generator=generator))
    picture[2 * (seed % 2), top : top + height, left : left + width] = 1
    box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
    return picture, {"boxes": box, "labels": torch.tensor([1 + seed % 2])}


torch.manual_seed(0)
model = add_se(build(), reduction=16)  # after its weights are loaded, before the optimizer is created
print(plan_of(model))

optimizer = torch.optim.AdamW(param_groups(model, lr=5e-5))  # leaves out frozen parameters

model.train()
totals = []
for step in range(options.steps):
    pictures, targets = zip(*(make_picture(2 * (step % 2) + number) for number in range(2)), strict=True)  # two of four
    losses = model(list(pictures), list(targets))
    total = sum(losses.values())
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    totals.append(total.item())
print("the loss has fallen:", sum(totals[-4:]) < sum(totals[:4]))

save_retrofitted(model, "detector")
again = load_retrofitted("detector", base=build())
picture, target = make_picture(1001)
with torch.no_grad():
    found, same = model.eval()([picture])[0], again.eval()([picture])[0]
print("loaded again, same boxes:", torch.equal(found["boxes"], same["boxes"]))
print(f"{len(found['boxes'])} boxes")
