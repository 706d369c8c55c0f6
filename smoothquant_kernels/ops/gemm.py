"""INT8 GEMMs with a fused epilogue."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smoothquant_kernels.ops import checks
from smoothquant_kernels.ops.registry import op, result


def _product(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    checks.gemm("gemm_s8", x_q, w_q, x_scale, w_scale, bias, out_dtype)
    checks.gemm_residual("gemm_s8", residual, x_q, w_q)
    return result(x_q, (*x_q.shape[:-1], w_q.shape[0]), out_dtype)


@op(shortcut=True)
def gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """INT8 GEMM with fused dequantization, bias and residual.

    Args:
        x_q: [..., K] int8, 1 <= K <= 131,071.
        w_q: [N, K] int8, as in `nn.Linear`.
        x_scale: [M] (per token) or [1] (per tensor) float32.
        w_scale: [N] (per output channel) or [1] (per tensor) float32.
        bias: [N] float.
        residual: [..., N] float, added last.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        [..., N] `out_dtype`: the exact int32 sums, scaled in float32 and rounded once.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or device does not fit, or K is too large for an exact int32 sum.

    Equivalent to:
        acc = (x_q.double() @ w_q.double().T).float()
        y = torch.addcmul(bias, acc * w_scale, x_scale[:, None]) + residual  # one rounding: fused multiply-add
        y.to(out_dtype)

    Source: SmoothQuant (Xiao et al., 2022), section 4 and eq. 2; the paper's O1 scheme.
    """
    return _product(x_q, w_q, x_scale, w_scale, bias, residual, out_dtype)


@op()
def _gemm_s8_tile(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
    tile: int = -1,
    splits: int = 0,
) -> Tensor:
    """`gemm_s8` with a given row of the current GPU's table and number of blocks per tile, for tests and the tuner."""
    checks.forced_tile("_gemm_s8_tile", tile, splits)
    return _product(x_q, w_q, x_scale, w_scale, bias, residual, out_dtype)


@op(shortcut=True)
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
    """INT8 GEMM that quantizes its output with a static scale, for an int8 consumer (OPT's fc1 to fc2).

    Args:
        x_q, w_q, x_scale, w_scale, bias: as in `gemm_s8`.
        out_scale: [1] float32, the calibrated scale of the output.
        relu: whether to apply ReLU before the quantization.

    Returns:
        [..., N] int8 in [-127, 127]; NaN becomes 0.

    Raises:
        TypeError, ValueError: as in `gemm_s8`.

    Equivalent to:
        y = torch.relu(gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, out_dtype=torch.float32))
        torch.round(y * (1 / out_scale)).clamp(-127, 127).to(torch.int8)

    Source: SmoothQuant (Xiao et al., 2022), section 4; the paper's O3 scheme.
    """
    checks.gemm("gemm_s8_requant", x_q, w_q, x_scale, w_scale, bias)
    checks.requant_scale("gemm_s8_requant", out_scale, x_q)
    return result(x_q, (*x_q.shape[:-1], w_q.shape[0]), torch.int8)


@op(shortcut=True)
def gemm_s8_gated(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    *,
    kind: str = "silu_mul",
    bias: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """INT8 GEMM of gate and up together, activation, product and static quantization, for an int8 consumer (down).

    Args:
        x_q, x_scale: as in `gemm_s8`.
        w_q: [2 I, K] int8, the rows of gate and up in turns of 8, as `reference.interleave_gate_up` arranges them.
        w_scale, bias: as in `gemm_s8`, arranged like w_q's rows.
        out_scale: [1] float32, the calibrated (static) scale of the output.
        kind: ``"silu_mul"``, ``"gelu_mul"`` or ``"gelu_tanh_mul"``.
        inv_smooth: [I] float32, the reciprocals of the consumer's smoothing factors.
        dtype: float16, bfloat16 or float32, to which the product is rounded before the activation.

    Returns:
        y_q: [..., I] int8 in [-127, 127].
        y_scale: [M] float32, out_scale, or NaN for a token whose result has a NaN or Inf.

    Raises:
        TypeError, ValueError: as in `gemm_s8` and `act_quantize`; also for an odd number of rows of w_q.

    Equivalent to, bit for bit on the same device:
        y = gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, out_dtype=dtype)
        y = torch.cat(reference.separate_gate_up(y), dim=-1)
        act_quantize(y, kind, inv_smooth=inv_smooth, scale=out_scale)

    Source: Shazeer (2020), GLU Variants Improve Transformer; SmoothQuant (Xiao et al., 2022), the paper's O3 scheme.
    """
    checks.gemm("gemm_s8_gated", x_q, w_q, x_scale, w_scale, bias)
    channels = checks.gated("gemm_s8_gated", x_q, w_q, out_scale, kind, inv_smooth, dtype)
    y_q = result(x_q, (*x_q.shape[:-1], channels), torch.int8)
    return y_q, result(x_q, (math.prod(x_q.shape[:-1]),), torch.float32)
