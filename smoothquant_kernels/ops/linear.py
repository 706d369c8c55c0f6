"""A whole W8A8 linear layer as one op."""

from __future__ import annotations

from torch import Tensor

from smoothquant_kernels.ops import checks
from smoothquant_kernels.ops.registry import op, result


@op(shortcut=True)
def linear_s8(
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    rotation: int = 0,
) -> Tensor:
    """A whole W8A8 linear layer: the same bits as `quantize`, then `gemm_s8`. On a GPU, a few tokens take one launch.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        w_q, w_scale, bias: as in `gemm_s8`.
        inv_smooth, scale, granularity, rotation: as in `quantize`. w_q must be rotated alike (`rotate_weight`).

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: as in `quantize` and `gemm_s8`.

    Equivalent to:
        x_q, x_scale = quantize(x, inv_smooth=inv_smooth, scale=scale, granularity=granularity, rotation=rotation)
        gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, out_dtype=x.dtype)

    Source: SmoothQuant (Xiao et al., 2022), section 4.
    """
    checks.linear("linear_s8", x, w_q, w_scale, bias, inv_smooth, scale, granularity, rotation)
    return result(x, (*x.shape[:-1], w_q.shape[0]), x.dtype)
