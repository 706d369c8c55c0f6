"""The fake kernels of the ops: the same checks as the CPU kernels, the same shapes, no data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import reference
from smoothquant_kernels.ops import checks as _checks


def _quantized(
    x: Tensor, k: int, scale: Tensor | None, granularity: str, k_multiple: int
) -> tuple[Tensor, Tensor]:
    per_tensor = scale is None and granularity == "tensor"
    rows = 1 if per_tensor else math.prod(x.shape[:-1])
    return (
        x.new_empty((*x.shape[:-1], reference.padded_k(k, k_multiple)), dtype=torch.int8),
        x.new_empty((rows,), dtype=torch.float32),
    )


def quantize(
    x: Tensor,
    *,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    k = x.shape[-1] if x.dim() else 0
    _checks.quantizer("quantize", x, k, inv_smooth, scale, granularity, k_multiple)
    return _quantized(x, k, scale, granularity, k_multiple)


def _norm_quantize(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.norm(op, x, weight, bias, residual, inv_smooth, scale, granularity, k_multiple)
    total = x.new_empty(0 if residual is None else x.shape)
    return *_quantized(x, x.shape[-1], scale, granularity, k_multiple), total


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_quantize("rms_norm_quantize", x, weight, None, **options)


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_quantize("layer_norm_quantize", x, weight, bias, **options)


def act_quantize(
    x: Tensor,
    kind: str,
    *,
    gate: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    k = _checks.activation_kind("act_quantize", x, kind, gate)
    _checks.quantizer("act_quantize", x, k, inv_smooth, scale, granularity, k_multiple)
    return _quantized(x, k, scale, granularity, k_multiple)


def gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    _checks.gemm("gemm_s8", x_q, w_q, x_scale, w_scale, bias, out_dtype)
    _checks.gemm_residual("gemm_s8", residual, x_q, w_q)
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


def gemm_s8_tile(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
    tile: int = -1,
    splits: int = 0,
) -> Tensor:
    _checks.forced_tile("_gemm_s8_tile", tile, splits)
    return gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, residual=residual, out_dtype=out_dtype)


def linear_s8(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
) -> Tensor:
    _checks.linear("linear_s8", x, w_q, w_scale, bias, inv_smooth, scale, granularity)
    return x.new_empty((*x.shape[:-1], w_q.shape[0]))


def gemm_s8_requant(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    _checks.gemm("gemm_s8_requant", x_q, w_q, x_scale, w_scale, bias)
    _checks.requant_scale("gemm_s8_requant", out_scale, x_q)
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]))
