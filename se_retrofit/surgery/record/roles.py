"""What an operation does to a feature map, in one word.

The role depends on an operation's ATen name, or, for a torch.nn module (which counts as one operation), on its class:

``conv``, ``linear``, ``norm``, ``act``, ``pool``; ``add``, ``mul``, ``cat``; ``pass`` (the values stay, or some are
dropped), ``shape`` (they stay, in another order), ``part`` (some of them), ``pad``, ``resize``; ``se`` (an SE module of ours);
``other``. Further roles are assigned when the network is read: ``input``, ``param`` (independent of the network's
input), and ``affine``, an addition of or a product with a ``param``.
"""

from __future__ import annotations

import types

from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase, ObserverBase
from torch.nn.utils import parametrize

from ...attention import Inserted


def _classes_of(module: types.ModuleType) -> tuple[type, ...]:
    """Return the layer classes that are defined in a Python module."""
    found = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    return tuple(c for c in found if issubclass(c, nn.Module))


_MODULE_ROLES: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("se", (Inserted,)),
    ("conv", (nn.modules.conv._ConvNd,)),
    ("linear", (nn.Linear, nn.Bilinear)),
    ("norm", (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)),
    ("act", tuple(cls for cls in _classes_of(nn.modules.activation) if cls is not nn.MultiheadAttention)),
    ("pass", (nn.Identity, nn.modules.dropout._DropoutNd, FakeQuantizeBase, ObserverBase)),
    ("pool", tuple(cls for cls in _classes_of(nn.modules.pooling) if "Pool" in cls.__name__)),
    ("resize", (nn.Upsample, nn.PixelShuffle)),
    ("shape", (nn.Flatten, nn.Unflatten, nn.PixelUnshuffle, nn.ChannelShuffle)),
    ("pad", _classes_of(nn.modules.padding)),
)

# ATen's names, without the underscores of in-place variants.
_OPERATION_ROLES: dict[str, str] = {
    name: role
    for role, names in {
        "conv": "convolution convolution_overrideable _convolution mkldnn_convolution cudnn_convolution deform_conv2d",
        "linear": "linear matmul bmm mm addmm addmv mv baddbmm addbmm _addmm_activation dot einsum",
        "norm": "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update "
        "batch_norm cudnn_batch_norm miopen_batch_norm native_layer_norm native_group_norm layer_norm group_norm "
        "_fused_rms_norm rms_norm instance_norm",
        "act": "relu relu6 gelu silu hardswish hardsigmoid sigmoid tanh leaky_relu elu selu celu prelu _prelu_kernel rrelu "
        "rrelu_with_noise rrelu_with_noise_functional softplus mish hardtanh clamp clamp_min clamp_max softmax _softmax "
        "_safe_softmax log_softmax _log_softmax log_sigmoid log_sigmoid_forward softsign softshrink hardshrink "
        "threshold glu erf exp",
        "pool": "mean sum amax amin max_pool1d avg_pool1d avg_pool2d avg_pool3d max_pool2d max_pool2d_with_indices "
        "max_pool3d_with_indices max_pool1d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d norm "
        "linalg_vector_norm std var std_mean var_mean logsumexp",
        "add": "add sub lerp addcmul addcdiv",
        "mul": "mul div multiply",
        "cat": "cat concat",
        "resize": "pixel_shuffle grid_sampler_2d grid_sampler_3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
        "upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa",
        "pass": "clone _to_copy detach alias lift lift_fresh copy native_dropout dropout feature_dropout alpha_dropout contiguous "
        "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
        "_fused_moving_avg_obs_fq_helper view_as_real",
        "shape": "view _unsafe_view _reshape_alias reshape permute transpose t flatten unflatten squeeze unsqueeze expand "
        "swapaxes movedim unfold im2col col2im roll flip repeat tile pixel_unshuffle channel_shuffle "
        "native_channel_shuffle stack as_strided",
        "part": "slice select split split_with_sizes chunk narrow unbind tensor_split index index_select unsafe_split "
        "unsafe_chunk split_copy",
        "pad": "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
        "replication_pad3d _pad_circular pad",
    }.items()
    for name in names.split()
}


def role_of(operation: str) -> str:
    return _OPERATION_ROLES.get(operation, "other")


def module_role(module: nn.Module) -> str | None:
    """Return the role of a module that counts as one operation, like those of torch.nn; None for all other modules."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, Inserted, FakeQuantizeBase, ObserverBase)):
        return _known_role(module)
    # a class derived by parametrize says nothing: its base counts
    own = next(c for c in type(module).__mro__ if c.__module__ != parametrize.__name__)
    if isinstance(module, (nn.Sequential, fx.GraphModule)) or not own.__module__.startswith("torch.nn"):
        return None
    return _known_role(module) or "other"


def _known_role(module: nn.Module) -> str | None:
    return next((role for role, classes in _MODULE_ROLES if isinstance(module, classes)), None)


def is_sequential(module: nn.Module) -> bool:
    """Return whether a module runs its children one after the other, like ``nn.Sequential`` itself."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
