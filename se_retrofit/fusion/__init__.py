"""Fusion of a norm and the SE after it into one map, for compiled training: ``fuse_se`` and ``unfuse_se``.

The statistics of the norm and the squeeze of SE are sums of the same values u. The mean and the variance of each image
and channel determine the statistics of the batch (or of a group of channels); these determine the squeeze by the norm's
affine map, and thereby the gate. What remains is one pass, ``a[n, c] * u + b[n, c]``.
"""

from .attention import FusedSEAttention
from .fuse import Fusion, fuse_se, plan_fusion, unfuse_se

__all__ = ["FusedSEAttention", "Fusion", "fuse_se", "plan_fusion", "unfuse_se"]
