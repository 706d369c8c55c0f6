"""A whole W8A8 linear layer as one op, with the norm or the activation function before it."""

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
    residual: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    rotation: int = 0,
) -> Tensor:
    """A whole W8A8 linear layer: the same bits as `quantize`, then `gemm_s8`. On a GPU, a few tokens take one launch.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        w_q, w_scale, bias, residual: as in `gemm_s8`.
        inv_smooth, scale, granularity, rotation: as in `quantize`. w_q must be rotated alike (`rotate_weight`).

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: as in `quantize` and `gemm_s8`.

    Equivalent to:
        x_q, x_scale = quantize(x, inv_smooth=inv_smooth, scale=scale, granularity=granularity, rotation=rotation)
        gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, residual=residual, out_dtype=x.dtype)

    Source: SmoothQuant (Xiao et al., 2022), section 4.
    """
    checks.linear(
        "linear_s8", x, w_q, w_scale, bias, residual, inv_smooth, scale, granularity, rotation
    )
    return result(x, (*x.shape[:-1], w_q.shape[0]), x.dtype)


@op(shortcut=True)
def fused_linear_s8(
    x: Tensor,
    kind: str,
    w_q: Tensor,
    w_scale: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    rotation: int = 0,
) -> Tensor:
    """A norm or an activation function, then a W8A8 linear layer and a residual: the same bits as the two ops it is.

    On a CPU, int8 values never leave the cache of the core that made them. On a GPU it is one call with two launches.
    x, gate and residual are read in place if their last dimension is dense and one stride leads from row to row, as in
    a slice of the columns of a merged layer's output.

    Args:
        x: [..., K] float16, bfloat16 or float32; [..., 2K] (gate, then up) for the kinds that end in ``_mul``.
        kind: ``"rms_norm"``, ``"layer_norm"``, or a kind of `act_quantize`.
        w_q, w_scale, bias, residual: as in `gemm_s8`.
        norm_weight, norm_bias: [K] float. ``"rms_norm"`` needs the weight and takes no bias.
        eps: of a norm.
        gate: as in `act_quantize`.
        inv_smooth, scale, granularity, rotation: as in `quantize`. w_q must be rotated alike (`rotate_weight`).

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: as in `act_quantize` and `gemm_s8`; also for an argument that the kind does not take.

    Equivalent to:
        options = dict(inv_smooth=inv_smooth, scale=scale, granularity=granularity, rotation=rotation)
        x_q, x_scale = rms_norm_quantize(x, norm_weight, eps, **options)  # kind "rms_norm"
        x_q, x_scale = layer_norm_quantize(x, norm_weight, norm_bias, eps, **options)  # kind "layer_norm"
        x_q, x_scale = act_quantize(x, kind, gate=gate, **options)  # the other kinds
        gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, residual=residual, out_dtype=x.dtype)

    Source: SmoothQuant (Xiao et al., 2022), section 4 (fusing the quantizer into the previous operator).
    """
    name = "fused_linear_s8"
    k = checks.producer(name, x, kind, norm_weight, norm_bias, eps, gate)
    checks.linear(
        name, x, w_q, w_scale, bias, residual, inv_smooth, scale, granularity, rotation, k
    )
    return result(x, (*x.shape[:-1], w_q.shape[0]), x.dtype)
