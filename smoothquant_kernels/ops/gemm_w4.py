"""W4A8: the int8 GEMM and the whole linear layer with 4-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.ops import checks
from smoothquant_kernels.ops.registry import op, result


@op(shortcut=True)
def gemm_w4a8(
    x_q: Tensor,
    w_q4: Tensor,
    w_group: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """`gemm_s8` with a weight of 4 bits, which kernels unpack to int8 in registers.

    Args:
        x_q, x_scale, w_scale, bias, residual, out_dtype: as in `gemm_s8`.
        w_q4: [N, 64 G] uint8 for G = ceil(K / 128) groups of K, two values 0 to 15 in each byte (`reference.pack_w4`).
        w_group: [G, N, 2] int8, the step (0 to 15) and the offset of each group: the int8 weight is q * step + offset,
            which must be in [-128, 127].

    Returns:
        [..., N] `out_dtype`: the bits of `gemm_s8` on the unpacked weight.

    Raises:
        TypeError, ValueError: as in `gemm_s8`.

    Equivalent to:
        gemm_s8(x_q, reference.w4_weight(w_q4, w_group, K), x_scale, w_scale, bias=bias, residual=residual)

    Source: QServe (Lin et al., 2024), section 4.1 (progressive group quantization); LiquidGEMM (Hu et al., 2025).
    """
    name = "gemm_w4a8"
    checks.w4_gemm(name, x_q, w_q4, w_group, x_scale, w_scale, bias, out_dtype)
    checks.gemm_residual(name, residual, x_q, w_q4)
    return result(x_q, (*x_q.shape[:-1], w_q4.shape[0]), out_dtype)


@op(shortcut=True)
def linear_w4a8(
    x: Tensor,
    w_q4: Tensor,
    w_group: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    rotation: int = 0,
) -> Tensor:
    """A whole W4A8 linear layer: the same bits as `quantize`, then `gemm_w4a8`.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        w_q4, w_group, w_scale, bias, residual: as in `gemm_w4a8`.
        inv_smooth, scale, granularity, rotation: as in `quantize`. The weight must be rotated alike (`rotate_weight`).

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: as in `quantize` and `gemm_w4a8`.

    Equivalent to:
        x_q, x_scale = quantize(x, inv_smooth=inv_smooth, scale=scale, granularity=granularity, rotation=rotation)
        gemm_w4a8(x_q, w_q4, w_group, x_scale, w_scale, bias=bias, residual=residual, out_dtype=x.dtype)

    Source: SmoothQuant (Xiao et al., 2022), section 4; QServe (Lin et al., 2024), section 4.1.
    """
    name = "linear_w4a8"
    checks.w4_linear(
        name, x, w_q4, w_group, w_scale, bias, residual, inv_smooth, scale, granularity, rotation
    )
    return result(x, (*x.shape[:-1], w_q4.shape[0]), x.dtype)
