"""Retrofit a timm network, train a step with a higher learning rate for SE, and take SE out again.

python examples/retrofit_timm.py
"""

import timm
import torch

from se_retrofit import add_se, plan_of, plan_se, remove_se
from se_retrofit.finetune import param_groups

# pretrained=True downloads ImageNet weights; random ones keep this example offline
model = timm.create_model("resnet18", pretrained=False, num_classes=10)

print(plan_se(model, reduction=8))
retrofitted = add_se(model, reduction=8)

images = torch.randn(4, 3, 64, 64)
print("same outputs:", torch.equal(model.eval()(images), retrofitted.eval()(images)))
print("still a", type(retrofitted).__name__, "of", type(retrofitted.layer1[0]).__name__, "blocks")

# SE's layers get learning rates by their width, and the new classifier a higher one than the rest
optimizer = torch.optim.AdamW(param_groups(retrofitted, lr=1e-4))

loss = torch.nn.functional.cross_entropy(retrofitted.train()(images), torch.tensor([0, 1, 2, 3]))
loss.backward()
optimizer.step()
added, all_of_them = plan_of(retrofitted).parameters, sum(p.numel() for p in retrofitted.parameters())
print(f"SE: {added:,} of {all_of_them:,} parameters")

plain = remove_se(retrofitted)
print("original keys after remove_se:", list(plain.state_dict()) == list(model.state_dict()))
