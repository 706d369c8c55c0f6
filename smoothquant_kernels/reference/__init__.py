"""The specification: what every kernel of this package computes, in plain PyTorch.

Where a kernel and this package disagree, one of them has a bug. The code is written to be read, not to be fast. It
gives the same bits on every device and at every thread count: integer sums are exact, each float32 operation is rounded
once in the order written, and sums of many terms are taken in float64.

Names follow the glossary of docs/internals/numerics.md: `x` [..., K] activation, `w` [N, K] weight, `M` its rows
(tokens), `inv_smooth` [K] float32 = 1 / s, `x_scale` [M] or [1], `w_scale` [N] or [1].
"""

from __future__ import annotations

from smoothquant_kernels.reference.attention import (
    HEAD_MULTIPLE,
    attendable,
    decode_attention_s8,
    kv_append,
    kv_capacity,
    kv_slots,
    rope,
)
from smoothquant_kernels.reference.experts import (
    MAX_EXPERTS,
    combine_experts,
    grouped_gemm_s8,
    sort_by_expert,
)
from smoothquant_kernels.reference.gemm import (
    GATE_BLOCK,
    fma,
    gate_up_order,
    gemm_s8,
    gemm_s8_gated,
    gemm_s8_requant,
    interleave_gate_up,
    separate_gate_up,
)
from smoothquant_kernels.reference.rows import (
    ACTIVATIONS,
    FUSED_KINDS,
    MAX_K,
    MAX_ROTATION,
    MIN_SCALE,
    QMAX,
    activation,
    add_residual,
    inverse_scale,
    layer_norm,
    pad_k,
    padded_k,
    quantize,
    quantize_weight,
    rms_norm,
    rotate,
    rotate_weight,
    round_to_int8,
    scale_from_absmax,
    smoothing_factors,
)
from smoothquant_kernels.reference.w4 import (
    W4_GROUP,
    W4_MAX,
    gemm_w4a8,
    pack_w4,
    unpack_w4,
    w4_groups,
    w4_weight,
)

__all__ = [
    "ACTIVATIONS",
    "FUSED_KINDS",
    "GATE_BLOCK",
    "HEAD_MULTIPLE",
    "MAX_EXPERTS",
    "MAX_K",
    "MAX_ROTATION",
    "MIN_SCALE",
    "QMAX",
    "W4_GROUP",
    "W4_MAX",
    "activation",
    "add_residual",
    "attendable",
    "combine_experts",
    "decode_attention_s8",
    "fma",
    "gate_up_order",
    "gemm_s8",
    "gemm_s8_gated",
    "gemm_s8_requant",
    "gemm_w4a8",
    "grouped_gemm_s8",
    "interleave_gate_up",
    "inverse_scale",
    "kv_append",
    "kv_capacity",
    "kv_slots",
    "layer_norm",
    "pack_w4",
    "pad_k",
    "padded_k",
    "quantize",
    "quantize_weight",
    "rms_norm",
    "rope",
    "rotate",
    "rotate_weight",
    "round_to_int8",
    "scale_from_absmax",
    "separate_gate_up",
    "smoothing_factors",
    "sort_by_expert",
    "unpack_w4",
    "w4_groups",
    "w4_weight",
]
