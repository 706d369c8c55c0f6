"""The last resort: CPU kernels in the words of the package `reference`, for ops that no other backend has a kernel for.

Ops that consist of others call those of whichever backend has them: a norm or an activation is the reference's, and its
result goes to the CPU's quantizer; a linear layer is the CPU's quantizer, or a norm or an activation, and its GEMM.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import reference
from smoothquant_kernels.ops.registry import cpu, cpu_kernel

cpu_kernel("quantize")(reference.quantize)
cpu_kernel("gemm_s8")(reference.gemm_s8)
cpu_kernel("kv_append")(reference.kv_append)
cpu_kernel("decode_attention_s8")(reference.decode_attention_s8)


@cpu_kernel("_gemm_s8_tile")
def _gemm_s8_tile(*arguments: Any) -> Tensor:
    """A CPU has no tiles to choose from, so whichever kernel serves `gemm_s8` serves this op."""
    *operands, bias, residual, out_dtype, _, _ = arguments
    op = torch.ops.smoothquant_kernels.gemm_s8.default
    product: Tensor = op(*operands, bias=bias, residual=residual, out_dtype=out_dtype)
    return product


cpu_kernel("gemm_s8_requant")(reference.gemm_s8_requant)


@cpu_kernel("gemm_s8_gated")
def _gemm_s8_gated(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    kind: str,
    bias: Tensor | None,
    inv_smooth: Tensor | None,
    dtype: torch.dtype,
) -> Any:
    y = cpu("gemm_s8")(x_q, w_q, x_scale, w_scale, bias, None, dtype)
    gate, up = reference.separate_gate_up(y)
    v = reference.activation(up, reference.FUSED_KINDS[kind], gate)
    return cpu("quantize")(v, inv_smooth, out_scale, "token", 1, 0)


@cpu_kernel("linear_s8")
def _linear_s8(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *quantizer: Any,
) -> Tensor:
    *options, rotation = quantizer
    x_q, x_scale = cpu("quantize")(x, *options, 1, rotation)
    y: Tensor = cpu("gemm_s8")(x_q, w_q, x_scale, w_scale, bias, residual, x.dtype)
    return y


@cpu_kernel("gemm_w4a8")
def _gemm_w4a8(x_q: Tensor, w_q4: Tensor, w_group: Tensor, *rest: Any) -> Tensor:
    w_q = reference.w4_weight(w_q4, w_group, x_q.shape[-1])
    y: Tensor = cpu("gemm_s8")(x_q, w_q, *rest)
    return y


@cpu_kernel("linear_w4a8")
def _linear_w4a8(x: Tensor, w_q4: Tensor, w_group: Tensor, w_scale: Tensor, *rest: Any) -> Tensor:
    w_q = reference.w4_weight(w_q4, w_group, x.shape[-1])
    y: Tensor = cpu("linear_s8")(x, w_q, w_scale, *rest)
    return y


@cpu_kernel("grouped_gemm_s8")
def _grouped_gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    s = len(x_q) if rows is None else len(rows)
    bounds = offsets.tolist()
    for before, bound in itertools.pairwise([0, *bounds]):
        if not before <= bound <= s:
            raise ValueError(
                f"grouped_gemm_s8: offsets must ascend from 0 or more to at most {s}, got {bound} after {before}."
            )
    if rows is not None:
        _check_range("grouped_gemm_s8: rows", rows, len(x_q))
    y = x_q.new_zeros(s, w_q.shape[1], dtype=out_dtype)
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        if first == last:
            continue
        own = slice(first, last)
        x = x_q[own] if rows is None else x_q[rows[own].long()]
        scale = x_scale if len(x_scale) == 1 else x_scale[own]
        b = None if bias is None else bias[e]
        y[own] = cpu("gemm_s8")(x, w_q[e], scale, w_scale[e], b, None, out_dtype)
    return y


def _check_range(what: str, values: Tensor, end: int) -> None:
    wrong = values[(values < 0) | (values >= end)]
    if wrong.numel():
        raise ValueError(f"{what} must be in [0, {end}), got {int(wrong[0])}.")


@cpu_kernel("combine_experts")
def _combine_experts(y: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    _check_range("combine_experts: position", position, len(y))
    return reference.combine_experts(y, position, weights)


@cpu_kernel("fused_linear_s8")
def _fused_linear_s8(
    x: Tensor,
    kind: str,
    w_q: Tensor,
    w_scale: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gate: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *quantizer: Any,
) -> Tensor:
    *options, rotation = quantizer
    options += (1, rotation)
    if kind == "rms_norm":
        made = cpu("rms_norm_quantize")(x, norm_weight, eps, None, *options)
    elif kind == "layer_norm":
        made = cpu("layer_norm_quantize")(x, norm_weight, norm_bias, eps, None, *options)
    else:
        made = cpu("act_quantize")(x, kind, gate, *options)
    y: Tensor = cpu("gemm_s8")(made[0], w_q, made[1], w_scale, bias, residual, x.dtype)
    return y


def _norm_quantize(
    norm: Callable[[Tensor], Tensor], x: Tensor, residual: Tensor | None, quantizer: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    total = reference.add_residual(x, residual)
    x_q, x_scale = cpu("quantize")(norm(total), *quantizer)
    return x_q, x_scale, x.new_empty(0) if residual is None else total


@cpu_kernel("rms_norm_quantize")
def _rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *quantizer: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_quantize(lambda t: reference.rms_norm(t, weight, eps), x, residual, quantizer)


@cpu_kernel("layer_norm_quantize")
def _layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    *quantizer: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_quantize(
        lambda t: reference.layer_norm(t, weight, bias, eps), x, residual, quantizer
    )


@cpu_kernel("act_quantize")
def _act_quantize(x: Tensor, kind: str, gate: Tensor | None, *quantizer: Any) -> Any:
    return cpu("quantize")(reference.activation(x, kind, gate), *quantizer)


@cpu_kernel("_saturate_s8")
def _saturate_s8(x: Tensor) -> Tensor:
    # As cvt.rni.sat.s8.f32 does: half to even, saturating, NaN gives 0. The cast alone would wrap.
    y = torch.nan_to_num(x, nan=0.0).round().clamp(-128, 127).to(torch.int8)
    return y.contiguous()
