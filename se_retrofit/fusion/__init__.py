"""A norm and the SE behind it as one map, for compiled training: ``fuse_se`` and ``unfuse_se``.

The statistics of the norm and the squeeze of SE are sums of the same values u. From the mean and the variance of each
image and channel follow the statistics of the batch (or of a group of channels), through the norm's affine map the
squeeze, and from it the gate; what is left is one pass ``a[n, c] * u + b[n, c]``.
"""

from .attention import FusedSEAttention
from .fuse import Fusion, fuse_se, plan_fusion, unfuse_se

__all__ = ["FusedSEAttention", "Fusion", "fuse_se", "plan_fusion", "unfuse_se"]
