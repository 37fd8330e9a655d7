"""Blocks with contexts, decorators, and code that is not Python's."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from python_blocks import Block
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.checkpoint import checkpoint


class NoGrad(Block):
    def forward(self, x):
        with torch.no_grad():
            frozen = self.branch(x)
        with torch.enable_grad():
            out = self.bn2(self.conv2(frozen))
        return x + out


class Autocast(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = self.conv2(self.branch(x))
        out = self.bn2(out.float())
        return x + out


class Decorated(Block):
    @torch.autocast("cpu", enabled=False)
    @torch.no_grad()
    def frozen(self, x):
        return self.branch(x)

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        out = self.bn2(self.conv2(self.frozen(x)))
        return x + out


class Seeded(Block):
    def forward(self, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            noise = torch.randn(1, self.channels, 1, 1)
        out = self.bn2(self.conv2(self.branch(x) + noise.to(x)))
        return x + out


class Profiled(Block):
    def forward(self, x):
        with torch.profiler.record_function("branch"):
            out = self.bn2(self.conv2(self.branch(x)))
        return x + out


class Checkpointed(Block):
    def forward(self, x):
        def run(x):
            return self.bn2(self.conv2(self.branch(x)))

        return x + (checkpoint(run, x, use_reentrant=False) if self.training else run(x))


class Reentrant(Block):
    def run(self, x):
        return self.bn2(self.conv2(self.branch(x)))

    def forward(self, x):
        if self.training and x.requires_grad:
            return x + checkpoint(self.run, x, use_reentrant=True)
        return x + self.run(x)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class OwnGradients(Block):
    def forward(self, x):
        out = self.conv2(StraightThrough.apply(self.branch(x) - 0.5))
        out = Reversed.apply(self.bn2(out))
        return x + out


class CheckpointedModule(Block):
    """Its branch is a module, which goes through a checkpoint."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        self.body = nn.Sequential(self.conv1, nn.ReLU(), self.conv2)

    def forward(self, x):
        return F.relu(x + checkpoint(self.body, x, use_reentrant=False))


class Variables(Block):
    def forward(self, x):
        x = Variable(x)
        out = self.bn2(self.conv2(Variable(self.branch(x))))
        return x + out


def plain(x: Tensor, factor: float) -> Tensor:
    if x.size(0) > 1000:
        return x
    return torch.relu(x) * factor


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that TorchScript is on its way out
    scripted = torch.jit.script(plain)


class ScriptedFunction(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(scripted(self.bn1(self.conv1(x)), 0.5)))
        return x + out


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 0.5


class ScriptedChild(Block):
    def __init__(self, channels: int = 8) -> None:
        super().__init__(channels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.act = torch.jit.script(Half())

    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return x + out


class Mapped(Block):
    def forward(self, x):
        out = torch.vmap(lambda image: F.relu(image) * 0.5)(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return x + out


class Data(Block):
    def forward(self, x):
        self.conv1.weight.data = self.conv1.weight.data.clamp(-1, 1)
        out = self.bn2(self.conv2(self.branch(x)))
        out.kept = True
        return x.data * 0 + x + out
