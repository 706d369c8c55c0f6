"""INT8 GEMMs with a fused epilogue."""

from __future__ import annotations

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
