"""What compiled kernels read and write: norm + SE + shortcut + ReLU, forward and backward, in feature maps.

``python benchmarks/traffic.py``. Inductor counts the bytes of each kernel's inputs and outputs when it has made the kernels; nothing
is timed. One feature map is one reading or writing of a tensor of the norm's input's size (a ReLU's mask has a quarter).
"""

from __future__ import annotations

import argparse
import itertools

import torch
from timing import LAYOUTS, machine, table
from torch import Tensor, nn
from torch._inductor import metrics
from torch._inductor.utils import fresh_inductor_cache

from se_retrofit import SEAttention
from se_retrofit.fusion import FusedSEAttention


class End(nn.Module):
    """The end of a residual unit, alone: ``u`` is what the convolution has made."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, u: Tensor, shortcut: Tensor) -> Tensor:
        return (self.norm(u) + shortcut).relu()


class Retrofitted(End):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.se_attention = SEAttention(channels, 16, gate="identity")

    def forward(self, u: Tensor, shortcut: Tensor) -> Tensor:
        return (self.se_attention(self.norm(u)) + shortcut).relu()


class Fused(End):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.se_attention = FusedSEAttention(channels, 16, gate="identity")

    def forward(self, u: Tensor, shortcut: Tensor) -> Tensor:
        return (self.se_attention(self.norm, u) + shortcut).relu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", nargs=4, type=int, default=(16, 256, 56, 56))
    options = parser.parse_args()
    torch._logging.set_logs(inductor_metrics=True)  # without it, nothing is counted
    print(f"{machine(options.device)}; {'x'.join(map(str, options.shape))}, float32\n")
    rows: list[list[object]] = []
    for layout, memory_format in LAYOUTS.items():
        for name, cls in {"plain": End, "retrofitted": Retrofitted, "fused": Fused}.items():
            model = cls(options.shape[1])
            u, shortcut = (torch.randn(options.shape, device=options.device) for _ in range(2))
            u, shortcut = (t.to(memory_format=memory_format).requires_grad_() for t in (u, shortcut))
            torch.compiler.reset()
            counts = [metrics.num_bytes_accessed]
            with fresh_inductor_cache():
                output = torch.compile(model.to(options.device).train(), fullgraph=True)(u, shortcut)
                counts.append(metrics.num_bytes_accessed)
                output.sum().backward()
                counts.append(metrics.num_bytes_accessed)
            size = u.numel() * u.element_size()
            rows.append([f"{layout}, {name}", *(f"{(b - a) / size:.2f}" for a, b in itertools.pairwise(counts))])
    print(table(("", "forward", "backward"), rows))


if __name__ == "__main__":
    main()
