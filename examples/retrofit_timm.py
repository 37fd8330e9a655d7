"""Retrofit a timm network, train a step with a higher learning rate for SE, and take SE out again.

python examples/retrofit_timm.py
"""

import timm
import torch

from se_retrofit import SEAttention, add_se, plan_se, remove_se

# pretrained=True downloads ImageNet weights; random ones keep this example offline
model = timm.create_model("resnet18", pretrained=False, num_classes=10)

print(plan_se(model, reduction=8))
retrofitted = add_se(model, reduction=8)

images = torch.randn(4, 3, 64, 64)
print("same outputs:", torch.equal(model.eval()(images), retrofitted.eval()(images)))
print("still a", type(retrofitted).__name__, "of", type(retrofitted.layer1[0]).__name__, "blocks")

# the new modules start at nothing, so they may learn faster than weights that are trained already
se = [p for module in retrofitted.modules() if isinstance(module, SEAttention) for p in module.parameters()]
chosen = set(map(id, se))
rest = [p for p in retrofitted.parameters() if id(p) not in chosen]
optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-4}, {"params": se, "lr": 1e-3}])

loss = torch.nn.functional.cross_entropy(retrofitted.train()(images), torch.tensor([0, 1, 2, 3]))
loss.backward()
optimizer.step()
print(f"SE: {sum(p.numel() for p in se):,} of {sum(p.numel() for p in retrofitted.parameters()):,} parameters")

plain = remove_se(retrofitted)
print("original keys after remove_se:", list(plain.state_dict()) == list(model.state_dict()))
