"""The SE module of a fused block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..attention import SEAttention
from ..errors import RetrofitError
from .norms import affine_map, parts, why_no_norm


class FusedSEAttention(SEAttention):
    """An SE module that is called with the norm before it and the norm's input: ``se(norm, u)`` instead of
    ``se(norm(u))``. Instead of a norm, it also accepts a module that ends in one, such as convolution and norm."""

    def forward(self, norm: nn.Module, u: Tensor) -> Tensor:  # type: ignore[override]
        if why_no_norm(norm) is not None:  # a hook may have been added since
            return super().forward(norm(u))
        before, norm = parts(norm)
        for module in before:
            u = module(u)
        if u.dim() < 3 or u.numel() == 0:  # an empty batch has no statistics
            return super().forward(norm(u))
        if isinstance(norm, _BatchNorm):
            norm._check_input_dim(u)
        # not flattened: the gradient of a view has another layout than u, and would have to be copied
        spatial = tuple(range(2, u.dim()))
        values = u.float() if u.dtype in (torch.float16, torch.bfloat16) else u
        variances, means = torch.var_mean(values, spatial, correction=0)  # (N, C)
        found = affine_map(norm, means, variances, u.shape[2:].numel())
        if found is None:
            return super().forward(norm(u))
        a, b = found
        squeezed = (a * means + b).to(u.dtype)
        gate = self.fc(squeezed).to(values.dtype)
        shape = (*gate.shape, *(1 for _ in spatial))
        return ((a * gate).view(shape) * values + (b * gate).view(shape)).to(u.dtype)


def check_unfused(model: nn.Module, caller: str) -> None:
    """Refuse a network in which ``fuse_se`` has fused SE with norms, for a caller that needs the two apart."""
    if any(isinstance(module, FusedSEAttention) for module in model.modules()):
        raise RetrofitError(
            f"SE is fused with the norms before it; {caller} needs them apart: give it se_retrofit.fusion.unfuse_se(model)"
        )
