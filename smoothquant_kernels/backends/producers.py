"""The CPU kernels of the fused producers: the reference's norm or activation, then `cpu.quantize`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from smoothquant_kernels import reference
from smoothquant_kernels.backends.onednn import quantize
from smoothquant_kernels.ops import checks as _checks


def _norm_quantize(
    op: str,
    norm: Callable[[Tensor], Tensor],
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
    """The third result is empty without a residual."""
    _checks.norm(op, x, weight, bias, residual, inv_smooth, scale, granularity, k_multiple)
    total = reference.add_residual(x, residual)
    q = quantize(
        norm(total),
        inv_smooth=inv_smooth,
        scale=scale,
        granularity=granularity,
        k_multiple=k_multiple,
    )
    return *q, x.new_empty(0) if residual is None else total


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """CPU kernel of `ops.rms_norm_quantize`."""
    op = "rms_norm_quantize"
    return _norm_quantize(
        op, lambda t: reference.rms_norm(t, weight, eps), x, weight, None, **options
    )


def layer_norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """CPU kernel of `ops.layer_norm_quantize`."""
    op = "layer_norm_quantize"
    return _norm_quantize(
        op, lambda t: reference.layer_norm(t, weight, bias, eps), x, weight, bias, **options
    )


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
    """CPU kernel of `ops.act_quantize`."""
    k = _checks.activation_kind("act_quantize", x, kind, gate)
    _checks.quantizer("act_quantize", x, k, inv_smooth, scale, granularity, k_multiple)
    y = reference.activation(x, kind, gate)
    return quantize(
        y, inv_smooth=inv_smooth, scale=scale, granularity=granularity, k_multiple=k_multiple
    )
