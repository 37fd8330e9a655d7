"""Retrofit networks of your own: one that needs example inputs, and one that needs none.

python examples/retrofit_your_own.py
"""

import torch
from torch import Tensor, nn

from se_retrofit import add_se, has_se, plan_of


class Residual1d(nn.Module):
    """A residual block on signals."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(channels, channels, 9, padding=4),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 9, padding=4),
            nn.BatchNorm1d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Heartbeats(nn.Module):
    """Classifies a signal and the patient's age; the shape of ``age`` follows from no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 32, 15, stride=2, padding=7)
        self.blocks = nn.Sequential(*(Residual1d(32) for _ in range(4)))
        self.head = nn.Linear(33, 5)

    def forward(self, signal: Tensor, age: Tensor) -> Tensor:
        features = self.blocks(self.stem(signal)).mean(-1)
        return self.head(torch.cat([features, age], dim=1))


signal, age = torch.randn(8, 2, 500), torch.rand(8, 1)
model = Heartbeats()

# inplace=True keeps every parameter, so that an existing optimizer stays bound to them
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
before = model.eval()(signal, age)
add_se(model, reduction=4, exclude="blocks.3", example_inputs=(signal, age), inplace=True)
optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".se_attention." in name]})

print("same outputs:", torch.equal(before, model(signal, age)))
print("at another length too:", model(torch.randn(1, 2, 777), age[:1]).shape)
print("retrofitted:", [f"blocks.{i}" for i, block in enumerate(model.blocks) if has_se(block)])

# a network with one input needs no example: its first convolution determines the input's shape
images = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
print(plan_of(add_se(images)))
