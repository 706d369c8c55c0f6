"""The quantizer of activations to int8, and the results that every producer of int8 returns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smoothquant_kernels.ops import checks
from smoothquant_kernels.ops.registry import op, result
from smoothquant_kernels.reference import padded_k


def quantized(
    x: Tensor, k: int, scale: Tensor | None, granularity: str, k_multiple: int
) -> tuple[Tensor, Tensor]:
    """Describes (x_q, x_scale) of x [..., K] with k output channels."""
    per_tensor = scale is None and granularity == "tensor"
    rows = 1 if per_tensor else math.prod(x.shape[:-1])
    x_q = result(x, (*x.shape[:-1], padded_k(k, k_multiple)), torch.int8)
    return x_q, result(x, (rows,), torch.float32)


@op(shortcut=True)
def quantize(
    x: Tensor,
    *,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """Divides by the smoothing factors, rotates groups of channels and quantizes to int8, in one pass.

    Args:
        x: [..., K] float16, bfloat16 or float32, any strides.
        inv_smooth: [K] float32, the reciprocals 1 / s of the smoothing factors.
        scale: [1] float32, a calibrated (static) scale; `granularity` then has no effect.
        granularity: ``"token"`` for a scale per row, ``"tensor"`` for one scale; both dynamic.
        k_multiple: pads x_q with zero columns until the number of columns is a multiple of this. They add nothing to a
            GEMM whose weight has the same padding, and they align its rows for any K.
        rotation: the size of the groups of adjacent channels that a Hadamard matrix with entries 1 and -1 mixes, a
            power of two from 2 to 512 that divides K; 0 for no rotation. It spreads an outlier over its group. The
            weight must be rotated alike (`reference.rotate_weight`). A calibrated `scale` is that of rotated values.

    Returns:
        x_q: [..., K] int8 in [-127, 127], contiguous; K rounded up to a multiple of k_multiple.
        x_scale: float32, [M]; [1] for ``"tensor"``. A token with a NaN or Inf has a non-finite scale, so that its
            output cannot look valid. Under ``"tensor"`` this affects all tokens.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or device does not fit, granularity is unknown, k_multiple is below 1, or rotation is not
            allowed.

    Equivalent to:
        v = x.float() * inv_smooth
        v = (v.unflatten(-1, (-1, rotation)) @ hadamard(rotation)).flatten(-2)  # in log2(rotation) rounded stages
        x_scale = v.abs().amax(-1) / 127
        x_q = torch.round(v * (1 / x_scale)[..., None]).clamp(-127, 127).to(torch.int8)
        x_q = torch.nn.functional.pad(x_q, (0, -K % k_multiple))

    Source: SmoothQuant (Xiao et al., 2022), section 3.2, eq. 3; schemes O1, O2, O3 of table 2. Rotation by Hadamard
    matrices: QuaRot (Ashkboos et al., 2024); of groups at run time: ConvRot (arXiv 2512.03673).
    """
    k = x.shape[-1] if x.dim() else 0
    checks.quantizer("quantize", x, k, inv_smooth, scale, granularity, k_multiple, rotation)
    return quantized(x, k, scale, granularity, k_multiple)


@op()
def _saturate_s8(x: Tensor) -> Tensor:
    """float32 -> int8: rounded half to even, saturated to [-128, 127], NaN to 0.

    The smallest op. The tests use it to check that the CUDA library is built, loaded and correct.
    """
    if x.dtype != torch.float32:
        got = checks.type_name(x.dtype)
        raise RuntimeError(f"_saturate_s8: x must be float32, got {got} of shape {list(x.shape)}")
    return result(x, tuple(x.shape), torch.int8)
