"""Producers of int8 activations: a norm or an activation function, then the quantizer, in one pass."""

from __future__ import annotations

from torch import Tensor

from smoothquant_kernels.ops import checks
from smoothquant_kernels.ops.quantize import quantized
from smoothquant_kernels.ops.registry import op, result


@op(optional_result="residual")
def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
    rotation: int = 0,
) -> tuple[Tensor, ...]:
    """RMSNorm, smoothing and int8 quantization in one pass, with an optional residual added first.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight: [K] float, the norm's weight.
        eps: added to the mean of squares.
        residual: like x; the norm reads `x + residual`, rounded to x's type as in an unfused model.
        inv_smooth, scale, granularity, k_multiple, rotation: as in `quantize`.

    Returns:
        (x_q, x_scale), and x + residual (x's shape and dtype) if a residual is given. The norm's own output stays in
        float32 until it is quantized.

    Raises:
        TypeError, ValueError: as in `quantize`.

    Equivalent to:
        x = x + residual
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Zhang and Sennrich (2019), RMSNorm, eq. 4; SmoothQuant, section 4 (fusing into the previous layer).
    """
    checks.norm(
        "rms_norm_quantize",
        x,
        weight,
        None,
        residual,
        inv_smooth,
        scale,
        granularity,
        k_multiple,
        rotation,
    )
    total = result(x, (0,) if residual is None else tuple(x.shape), x.dtype)
    return *quantized(x, x.shape[-1], scale, granularity, k_multiple), total


@op(optional_result="residual")
def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
    rotation: int = 0,
) -> tuple[Tensor, ...]:
    """LayerNorm, smoothing and int8 quantization in one pass, with an optional residual added first.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight, bias: [K] float or None.
        eps: added to the variance.
        residual, inv_smooth, scale, granularity, k_multiple, rotation: as in `rms_norm_quantize`.

    Returns:
        (x_q, x_scale), and x + residual if a residual is given.

    Raises:
        TypeError, ValueError: as in `quantize`.

    Equivalent to:
        x = x + residual
        y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Ba et al. (2016), Layer Normalization; SmoothQuant, section 4.
    """
    checks.norm(
        "layer_norm_quantize",
        x,
        weight,
        bias,
        residual,
        inv_smooth,
        scale,
        granularity,
        k_multiple,
        rotation,
    )
    total = result(x, (0,) if residual is None else tuple(x.shape), x.dtype)
    return *quantized(x, x.shape[-1], scale, granularity, k_multiple), total


@op()
def act_quantize(
    x: Tensor,
    kind: str,
    *,
    gate: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """Activation function (gated or not), smoothing and int8 quantization in one pass.

    Args:
        x: [..., K] float16, bfloat16 or float32; [..., 2K] (gate, then up) for the fused kinds.
        kind: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``; or ``"silu_mul"``, ``"gelu_mul"``,
            ``"gelu_tanh_mul"``, which read both halves from x.
        gate: like x; if given, the result is act(gate) * x.
        inv_smooth, scale, granularity, k_multiple, rotation: as in `quantize`, over the K outputs.

    Returns:
        (x_q, x_scale); x_q has the shape [..., K], with K rounded up to a multiple of k_multiple.

    Raises:
        TypeError, ValueError: as in `quantize`; also for an unknown kind or an odd fused size.

    Equivalent to:
        y = torch.nn.functional.silu(gate.float()) * x.float()
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Shazeer (2020), GLU Variants Improve Transformer; SmoothQuant, section 4.
    """
    k = checks.activation_kind("act_quantize", x, kind, gate)
    checks.quantizer("act_quantize", x, k, inv_smooth, scale, granularity, k_multiple, rotation)
    return quantized(x, k, scale, granularity, k_multiple)
