"""Networks that were saved by earlier versions, a folder each in ``folders/``: ``python tests/saving/saved_before.py`` writes those
that are missing, by the version that is installed. What stands there already is never written again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torchvision.models.densenet import DenseNet

from se_retrofit import add_se, fold_se, save_retrofitted
from se_retrofit.models import Base
from se_retrofit.saving import save_se

FOLDERS = Path(__file__).parent / "folders"
NARROW = Base.of("timm/resnet10t", channels=[4, 4, 8, 8], stem_width=8, num_classes=3)


class Pairs(nn.Module):
    """Blocks of two convolutions in a row, each of them with two sites; it is called by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Pair(3, 8), Pair(8, 12))
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.blocks(image * mask))


class Pair(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)))


def narrow(blocks: int = 2) -> nn.Module:
    return ResNet(BasicBlock, (1, 1, blocks, 1), channels=(4, 4, 8, 8), stem_type="deep", stem_width=4, num_classes=3)


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(narrow().eval())


@dataclass(frozen=True)
class Saved:
    """One of the networks: its base, the options of ``add_se``, the paths of the SE modules that a fold left, if there was one, and
    what is in it afterwards."""

    make: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    base: Base | None = None
    left: tuple[str, ...] | None = None
    dtype: torch.dtype = torch.float32
    attentions: frozenset[str] = frozenset({"se"})

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        image = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=dtype).reshape(2, 3, 32, 32).sin()
        image[1] = 4 * image[1] + 1  # other gates for each
        if self.make is Pairs:
            return {"image": image, "mask": torch.ones(2, 1, 32, 32, dtype=dtype)}
        return {"x": image}

    def network(self) -> nn.Module:
        model = stirred(add_se(stirred(self.make()), **self.options)).to(self.dtype)
        if self.left is None:
            return model.eval()
        for path, se in model.named_modules():
            if path.endswith(("se_attention", "se_attention_2")) and path not in self.left:
                se.fc[2].weight.data.zero_()
            elif path in self.left:
                for parameter in se.parameters():
                    nn.init.normal_(parameter, std=2, generator=torch.Generator().manual_seed(1))
        return fold_se(model.eval(), [next(iter(self.inputs(self.dtype).values()))], tolerance=1e-4)


SAVED = {
    "named": Saved(NARROW.build, {"reduction": 2, "bias": True}, NARROW),
    "static": Saved(narrow, {"attention": "static"}, attentions=frozenset({"static"})),
    "chosen": Saved(narrow, {"include": ["layer[234].*"], "exclude": "layer3.0", "gate": "sigmoid"}),
    "pre": Saved(narrow, {"placement": "pre", "min_hidden": 2}, dtype=torch.float16),
    "dense": Saved(partial(DenseNet, 4, (2, 2), 8, bn_size=2, num_classes=3)),
    "graph": Saved(traced),
    "inputs": Saved(Pairs, {"example_inputs": {"image": torch.zeros(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)}}),
    "folded": Saved(
        lambda: nn.Sequential(Pair(3, 8), Pair(8, 12), nn.Conv2d(12, 4, 1)), {"bias": True}, left=("1.se_attention",)
    ),
    "factors": Saved(
        lambda: narrow(3),
        {"placement": "post", "bias": True},
        left=("layer3.0.se_attention",),
        attentions=frozenset({"se", "static"}),
    ),
}


def stirred(model: nn.Module) -> nn.Module:
    """Every parameter and buffer with values of its own, large enough for the gates to depend on the input."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                drawn = torch.rand(value.shape, generator=generator)
                low, width = (0.5, 1.0) if "var" in name or (value.dim() == 1 and "weight" in name) else (-1.0, 2.0)
                value.copy_((low + width * drawn) / (value[0].numel() ** 0.5 if value.dim() > 1 else 1))
    return model


def outputs(model: nn.Module, saved: Saved) -> Tensor:
    """In double precision, which agrees on all machines but for the last digits."""
    with torch.no_grad():
        result = model.double()(*saved.inputs(torch.float64).values())
    assert isinstance(result, Tensor)
    return result[..., ::8, ::8].clone() if result.dim() == 4 else result


def main() -> None:
    for name, saved in SAVED.items():
        if not (FOLDERS / name).exists():
            network = saved.network()
            save_retrofitted(network, FOLDERS / name, base=saved.base)
            save_se(network, FOLDERS / f"{name}.se.safetensors")
            save_file({"outputs": outputs(network, saved)}, FOLDERS / f"{name}.outputs.safetensors")
            sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    main()
