"""Rows of activations and weights: scales, rounding, rotation, norms, activations, smoothing factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smoothquant_kernels.schemes import MAX_ROTATION as MAX_ROTATION

QMAX = 127
#: |int8 product| <= 2**14, so this many of them always fit a signed 32-bit accumulator.
MAX_K = 131_071
#: Smaller scales count as zero, because their reciprocal would overflow.
MIN_SCALE = torch.finfo(torch.float32).tiny

#: Activation functions of `act_quantize` on float64. The result is rounded once to float32.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
#: Kinds that read one fused [..., 2K] tensor, gate first: kind -> activation.
FUSED_KINDS = {"silu_mul": "silu", "gelu_mul": "gelu", "gelu_tanh_mul": "gelu_tanh"}


def scale_from_absmax(absmax: Tensor) -> Tensor:
    """`absmax / 127` in float32, or zero where that is below the smallest normal number. NaN and Inf stay."""
    # The divisor is a tensor, because PyTorch divides a CUDA tensor by a Python number with a rounded reciprocal.
    scale = absmax.float() / torch.full_like(absmax, QMAX, dtype=torch.float32)
    return torch.where(scale < MIN_SCALE, torch.zeros_like(scale), scale)


def inverse_scale(scale: Tensor) -> Tensor:
    """`1 / scale` in float32, or 0 where the scale is 0, negative, NaN or Inf, so that such a row quantizes to 0."""
    usable = (scale >= MIN_SCALE) & torch.isfinite(scale)
    return torch.where(usable, torch.ones_like(scale) / scale, torch.zeros_like(scale))


def round_to_int8(x: Tensor) -> Tensor:
    """Round half to even, saturate to [-127, 127], NaN becomes 0."""
    return torch.nan_to_num(torch.round(x), nan=0.0).clamp(-QMAX, QMAX).to(torch.int8)


def padded_k(k: int, k_multiple: int) -> int:
    """K rounded up to a multiple of `k_multiple`."""
    return (k + k_multiple - 1) // k_multiple * k_multiple


def pad_k(x_q: Tensor, k_multiple: int) -> Tensor:
    """`x_q` [..., K] with columns of zeros up to `padded_k`. They add nothing to a GEMM with a weight padded alike."""
    k = x_q.shape[-1]
    return torch.nn.functional.pad(x_q, (0, padded_k(k, k_multiple) - k))


def rotate(v: Tensor, group: int) -> Tensor:
    """Multiplies each `group` adjacent channels of v [..., K] by the Hadamard matrix with entries 1 and -1.

    A rotation times sqrt(group): `rotate(rotate(v, group), group)` is `group * v`. Stage by stage, sums and
    differences of channels that are 1, 2, 4, ..., group / 2 apart, each rounded once. 0 leaves v as it is.
    """
    h = 1
    while h < group:
        low, high = v.unflatten(-1, (v.shape[-1] // (2 * h), 2, h)).unbind(-2)
        v = torch.stack([low + high, low - high], -2).flatten(-3)
        h *= 2
    return v


def rotate_weight(w: Tensor, group: int) -> Tensor:
    """A float32 weight [N, K] for an input that `rotate` changes: `rotate(x, group) @ result.T` is `x @ w.T`."""
    return rotate(w, group) / group if group else w  # exact, because the group is a power of two


def quantize(
    x: Tensor,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """Divides by the smoothing factors, rotates groups of channels and quantizes. See `ops.quantize`.

    * Dynamic per token: `x_scale[m] = max_k |x * inv_smooth| / 127`. A row with a NaN or Inf gets a NaN or Inf scale
      and zeros, which makes the products of this row alone non-finite.
    * Dynamic per tensor: one scale [1]. A NaN or Inf anywhere makes it, and so every product, non-finite.
    * Static (`scale` given): values saturate. `x_scale[m] = scale`, or NaN for a row with a NaN or Inf, so that NaN
      propagates under a static scale as it does under a dynamic one.

    `pad_k` pads the result to `k_multiple`.
    """
    v = x.float()
    if inv_smooth is not None:
        v = v * inv_smooth
    v = rotate(v, rotation)
    rows = v.reshape(-1, v.shape[-1]).contiguous()
    absmax = rows.abs().amax(dim=-1)  # amax propagates NaN
    if scale is not None:
        inverse = inverse_scale(scale.float())
        x_scale = torch.where(torch.isfinite(absmax), scale.float(), torch.nan)
    else:
        if granularity == "tensor":
            absmax = absmax.amax(dim=0, keepdim=True) if len(absmax) else absmax.new_zeros(1)
        x_scale = scale_from_absmax(absmax)
        inverse = inverse_scale(x_scale)
    x_q = round_to_int8(rows * inverse[:, None]).reshape(x.shape)
    return pad_k(x_q, k_multiple), x_scale


def quantize_weight(w: Tensor, granularity: str = "channel") -> tuple[Tensor, Tensor]:
    """Quantize a weight [N, K] per output channel (`w_scale` [N]) or per tensor (`w_scale` [1])."""
    return quantize(w, granularity={"channel": "token", "tensor": "tensor"}[granularity])


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """`x + residual` in float32, rounded to x's type, as the unfused model adds it and the next layer reads it."""
    return x if residual is None else (x.float() + residual.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Float32 RMSNorm: `(x * rstd) * weight`, the mean of squares taken in float64."""
    rstd = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps).float()
    return (x.float() * rstd) * weight.float()


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Float32 LayerNorm: `((x - mean) * rstd) * weight + bias`, mean and variance taken in float64."""
    mean = x.double().mean(-1, keepdim=True)
    rstd = torch.rsqrt((x.double() - mean).square().mean(-1, keepdim=True) + eps).float()
    y = (x.float() - mean.float()) * rstd
    if weight is not None:
        y = y * weight.float()
    return y if bias is None else y + bias.float()


def activation(x: Tensor, kind: str, gate: Tensor | None = None) -> Tensor:
    """Float32 `act(x)`, or `act(gate) * x`, or for the fused kinds `act(x[..., :K]) * x[..., K:]`."""
    if kind in FUSED_KINDS:
        gate, x = x.chunk(2, dim=-1)
        kind = FUSED_KINDS[kind]
    act = ACTIVATIONS[kind]
    if gate is None:
        return act(x.double()).float()
    return act(gate.double()).float() * x.float()


def smoothing_factors(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` in float32 (paper, section 3.2, eq. 4).

    A channel that is dead on either side (maximum 0), or whose factor over- or underflows, gets `s = 1`.
    """
    x, w = x_absmax.double(), w_absmax.double()
    smooth = (x.pow(alpha) / w.pow(1.0 - alpha)).float()
    inverse = 1.0 / smooth
    usable = (x > 0) & (w > 0) & (smooth >= MIN_SCALE) & (inverse >= MIN_SCALE) & smooth.isfinite()
    return torch.where(usable, smooth, torch.ones_like(smooth))
