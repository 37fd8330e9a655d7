"""Choose where SE goes and how wide it is: the paper's ablations, counted on ResNet-50.

python examples/retrofit_where.py
"""

import torchvision

from se_retrofit import plan_se

model = torchvision.models.resnet50()
original = sum(p.numel() for p in model.parameters())


def show(label: str, **options: object) -> None:
    plan = plan_se(model, **options)
    print(f"{label:<26} {len(plan.sites):>2} SE modules  {(original + plan.parameters) / 1e6:.1f}M parameters")


print(f"{'ResNet-50':<42} {original / 1e6:.1f}M parameters")
for reduction in (2, 4, 8, 16, 32):
    show(f"reduction={reduction}", reduction=reduction)
for placement in ("standard", "pre", "post", "identity", "3x3"):
    show(f"placement={placement!r}", reduction=16, placement=placement)
# the last stage holds most of SE's parameters and profits least from them (section 6.4 of the paper)
show("exclude='layer4.*'", reduction=16, exclude="layer4.*")
show("include='layer1.*'", reduction=16, include="layer1.*")
