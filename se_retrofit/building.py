"""The arguments that timm and torchvision networks may be built with: plain values that define the architecture.

A saved folder, which may come from anybody, names its network by a library, a name and arguments. Unchecked arguments
reach all that the libraries' builders can do: ``checkpoint_path`` unpickles a file, ``pretrained_cfg`` downloads one.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from .errors import RetrofitError, brief

# The parameters of timm's and torchvision's networks (and of the configs that timm lets users override) whose values
# are numbers, switches, names of layers, or several of these. Exact names: use_abs_pos is safe, use_pretrained isn't.
_ARGUMENTS = """
aa_layer aa_stem_only abs_win_pos_embed act_layer alpha always_partition attention_dropout attn attn_act_layer
attn_drop_rate attn_gain attn_groups attn_head_dim_reduction attn_kwargs attn_layer attn_mlp attn_mlp_ratio
attn_only_layer_scale attn_pool_mlp_ratio attn_pool_num_heads attn_ratio attn_stage attn_type attn_types attn_upsample
aux_logits aux_loss avg_down b base_dim base_dims base_width basic bbox_reg_weights bg_iou_thresh bidirectional
block_args block_channels block_config block_kwargs block_reduce_first block_type blocks bn_eps bn_momentum bn_size
bn_tf bottle_ratio bottleneck_width_ratio box_batch_size_per_image box_bg_iou_thresh box_detections_per_img
box_fg_iou_thresh box_nms_thresh box_positive_fraction box_score_thresh cardinality center_sampling_radius ch_div
channel_attention channel_attn_v2 channel_multiplier channels class_token cls_attn_layers cls_ratio conv_bias conv_init
conv_mlp conv_ratio cpe_act crop_scale crpe_window d2_scales deepen_factor depth depth_mult depth_token_only depths
detections_per_img dilated dim_mul dims distillation distilled down_kernel_size down_op down_ops down_pad
down_patch_size down_stride downsample downsample_block downsample_expand_ratios downsample_kernel_size
downsample_padding downsample_ratio downsamples drop_block_rate drop_block_size drop_path_rate drop_rate dropout
dropout_aux dw_act_layer dynamic_img_pad dynamic_img_size embed_dim embed_dims embed_norm embed_norm_layer encoder_pool
eta expand_groups expand_ratio expansion_ratio exportable extra_conv extra_norm_period extra_norm_stage fc_act_layer
fc_norm feature_cls feature_dim features_only ffn ffn_ratio fg_iou_thresh final_chs final_norm first_stride fix_init
fix_stem focal_levels focal_windows fork_feat fused_conv fused_downsample gamma_in_act global_att_blocks
global_attn_indexes global_block_counts global_pool global_pos_size group group_min_ratio group_size groups growth_rate
growth_rates head_bias head_dim head_hidden_size head_init_scale head_mul head_norm head_norm_first head_type
head_widths heads hidden_dim hidden_sizes image_mean image_size image_std img_scale img_size in_chans inc_sec
inference_mode init_channels init_values init_weights initial_chs inner_dim inplanes input_3x3 input_size inter_channels
intermediate_size inverted_residual_setting is_downsample_block k_r k_sec kernel_size kernel_sizes kernels key_dim
last_channel layer_scale layer_scale_init_value layer_scale_init_values layers layerscale_value legacy linear linear_out
lkc_use_act local_conv_size local_mbconv_norm local_up_to_layer locality_strength ls_init_value mask_unit_attn
mask_unit_size max_size mbconv_expand_ratio memory_efficient merge_size min_size mix_block_ratio mlp_bias mlp_dim
mlp_dropout mlp_ratio mlp_ratio_token_only mlp_ratios msfa_indices msfa_output_resolution multi_conv n_div named_blocks
neck_chans nlhb nms_thresh no_embed_class no_jit norm_eps norm_kwargs norm_layer norm_layer_cl normalize_modulator
num_blocks num_blocks_list num_classes num_features num_heads num_heads_inner num_heads_outer num_init_features
num_keypoints num_kv_heads num_layers num_levels num_reg_tokens num_rnn_layers num_vit out_features out_indices
outlook_attention output_stride pad_type parallel_depth partial_dim partition_size patch_drop_rate patch_embed_kernel
patch_embed_padding patch_embed_stride patch_kernel patch_norm patch_padding patch_size patch_sizes patch_stride
pconv_fw_type pool_include_prefix pool_size pooling_kernel_size pooling_scale pos_drop_drate pos_drop_rate pos_embed
pos_embed_grid_size pos_embs position_embedding_size post_layers pre_norm preact progress proj_bias proj_drop_rate
pruned q_pool q_stride qk_dim qk_norm qkv_bias qkv_fused quantize reduced_tail reduction ref_feat_shape reg reg_tokens
rel_pos_dim rel_pos_type reparam replace_stem_pool replace_stride_with_dilation repmixer_kernel_size representation_size
res_scale_init_values return_interm_layers rope_grid_indexing rope_grid_offset rope_jitter_coords rope_mrope_section
rope_rescale_coords rope_rotate_half rope_shift_coords rope_temperature rope_theta rope_type round_nearest
rpn_batch_size_per_image rpn_bg_iou_thresh rpn_fg_iou_thresh rpn_nms_thresh rpn_positive_fraction
rpn_post_nms_top_n_test rpn_post_nms_top_n_train rpn_pre_nms_top_n_test rpn_pre_nms_top_n_train rpn_score_thresh
same_padding scale scale_attn_inner scale_attn_norm scale_mlp scale_mlp_norm score_thresh scriptable se_downsamples
se_from_exp se_layer se_ratio self_attn_kwargs self_attn_layer sep_pos_embed sequential_attn serial_depths
shared_rel_pos shortcut_root skipinit small small_kernels spatial_conv squeeze_ratio sr_ratios ssd_expand stages
stages_out_channels stages_repeats standardize state_dim std_conv_eps stem_bias stem_channels stem_chs stem_expand_ratio
stem_hidden_dim stem_kernel_size stem_mid_norm stem_norm stem_pool stem_size stem_stride stem_type stem_use_scale_branch
stem_width stochastic_depth_prob strict_img_size stride strides swiglu_align_to swiglu_mlp token_mixers tokens_norm
topk_candidates trainable_backbone_layers transform_input transformer_depths transformer_drop_path
transition_compression_ratio types union use_abs_pos use_abs_pos_emb use_aux_head use_checkpoint use_clipped_linears
use_conv use_expand_proj use_fc_norm use_grn use_lab use_layer_scale use_mix_token use_mlp_head use_msfa
use_overlap_down use_pos_emb use_pos_embed use_post_norm use_post_norm_in_modulation use_post_transformer_norm
use_pre_transformer_norm use_rel_pos use_rel_pos_bias use_rope use_rot_pos_emb use_shared_rel_pos_bias v2 version
vit_stem w0 wa weight_init widen_factor width width_factor width_mult width_per_group widths window_ratio window_size
window_sizes window_spec with_fc wm wss zero_init_fc zero_init_last zero_init_residual
"""
ARGUMENTS = frozenset(_ARGUMENTS.split())
# torchvision's arguments for weights; any value but None downloads some
NOTHING = ("weights", "weights_backbone")
# not allowed in the name of a nested argument, such as those of a block in block_args
NEVER = re.compile(r"pretrained|checkpoint|weights|cache|file|url|dir$")

# the name of a layer or a variant, which is not a path, a URL or a file name
WORD = re.compile(r"[\w+-]{0,40}", re.ASCII)
LARGEST = 2**31
DEEPEST = 4


def check_arguments(network: str, arguments: dict[str, Any]) -> None:
    """Raise an error unless all arguments of a network's builder define its architecture by plain values."""
    for name, value in arguments.items():
        if name in NOTHING and value is None:
            continue
        if name not in ARGUMENTS:
            close = difflib.get_close_matches(str(name), ARGUMENTS, n=2)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            reason = f"{name} is not an argument that defines a network's architecture{hint}"
        else:
            reason = _fault(value, DEEPEST)
            if not reason:
                continue
        raise RetrofitError(
            f"{network} can't be built with {name}={brief(value)}: {reason}. Files, weights and code are never taken from "
            "arguments by name; build the network yourself, and pass it instead of its name (base=model)"
        )


def _fault(value: Any, depth: int) -> str:
    """Return what is wrong with a value; empty if nothing is."""
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, (int, float)):
        return "" if math.isfinite(value) and abs(value) <= LARGEST else "the number is out of range"
    if isinstance(value, str):
        return "" if WORD.fullmatch(value) else f"{brief(value)} is not the name of a layer or a variant"
    if not isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} is no plain value (number, switch, name, None, and lists and dicts of these)"
    if depth == 0:
        return "it is nested too deeply"
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str) or not WORD.fullmatch(key) or NEVER.search(key):
            return f"{brief(key)} in it is not an argument that defines a network's architecture"
    faults = (_fault(entry, depth - 1) for entry in (value.values() if isinstance(value, dict) else value))
    return next(filter(None, faults), "")
