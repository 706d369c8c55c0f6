"""The public ops, named by what they compute.

Each is a `torch.library` op (`torch.ops.smoothquant_kernels.*`) with a fake kernel, so it works under `torch.compile
(fullgraph=True)` and `torch.export`; the functions here are what users call. The numbers are those of `reference.py`.

Shapes: `M` is the number of tokens, the product of all leading dimensions of `x` [..., K].

The CUDA kernels check their arguments in C++, where torch's stable ABI knows one exception: what raises TypeError or
ValueError on a CPU raises RuntimeError with the same sentence for CUDA tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels.backends import onednn as cpu
from smoothquant_kernels.backends import producers as _cpu_fused
from smoothquant_kernels.backends.cuda import explain_missing_kernel
from smoothquant_kernels.ops import fakes as _fakes
from smoothquant_kernels.ops.registry import define_op, eager_cpu

# --- schemas ----------------------------------------------------------------------------------------------------------

_QUANTIZER = (
    'Tensor? inv_smooth=None, Tensor? scale=None, str granularity="token", int k_multiple=1'
)

_quantize = define_op(
    f"quantize(Tensor x, *, {_QUANTIZER}) -> (Tensor, Tensor)",
    cpu=cpu.quantize,
    fake=_fakes.quantize,
)
_rms_norm_quantize = define_op(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, *, Tensor? residual=None, "
    f"{_QUANTIZER}) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_fused.rms_norm_quantize,
    fake=_fakes.rms_norm_quantize,
)
_layer_norm_quantize = define_op(
    "layer_norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, *, "
    f"Tensor? residual=None, {_QUANTIZER}) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_fused.layer_norm_quantize,
    fake=_fakes.layer_norm_quantize,
)
_act_quantize = define_op(
    f"act_quantize(Tensor x, str kind, *, Tensor? gate=None, {_QUANTIZER}) -> (Tensor, Tensor)",
    cpu=_cpu_fused.act_quantize,
    fake=_fakes.act_quantize,
)
_gemm_s8 = define_op(
    "gemm_s8(Tensor x_q, Tensor w_q, Tensor x_scale, Tensor w_scale, *, Tensor? bias=None, "
    "Tensor? residual=None, ScalarType out_dtype) -> Tensor",
    cpu=cpu.gemm_s8,
    fake=_fakes.gemm_s8,
)
_gemm_s8_requant = define_op(
    "gemm_s8_requant(Tensor x_q, Tensor w_q, Tensor x_scale, Tensor w_scale, Tensor out_scale, *, "
    "Tensor? bias=None, bool relu=False) -> Tensor",
    cpu=cpu.gemm_s8_requant,
    fake=_fakes.gemm_s8_requant,
)
_linear_s8 = define_op(
    "linear_s8(Tensor x, Tensor w_q, Tensor w_scale, *, Tensor? bias=None, Tensor? inv_smooth=None, "
    'Tensor? scale=None, str granularity="token") -> Tensor',
    cpu=cpu.linear_s8,
    fake=_fakes.linear_s8,
)
# For tests and the tuner: `gemm_s8` by a row of the current GPU's table, and by so many blocks for a tile's K.
_gemm_s8_tile = define_op(
    "_gemm_s8_tile(Tensor x_q, Tensor w_q, Tensor x_scale, Tensor w_scale, *, Tensor? bias=None, "
    "Tensor? residual=None, ScalarType out_dtype, int tile=-1, int splits=0) -> Tensor",
    cpu=cpu.gemm_s8_tile,
    fake=_fakes.gemm_s8_tile,
)

OPS = (
    "quantize",
    "rms_norm_quantize",
    "layer_norm_quantize",
    "act_quantize",
    "gemm_s8",
    "gemm_s8_requant",
    "linear_s8",
    "_gemm_s8_tile",
)
# The library was loaded above, before there were schemas: the dispatcher takes kernels and schemas in either order.
for _op in OPS:
    explain_missing_kernel(_op)


# --- the public functions ---------------------------------------------------------------------------------------------


def quantize(
    x: Tensor,
    *,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Divide by the smoothing factors and quantize to int8, in one pass.

    Args:
        x: [..., K] float16, bfloat16 or float32, any strides.
        inv_smooth: [K] float32, the reciprocals 1 / s of the smoothing factors.
        scale: [1] float32, a calibrated (static) scale; `granularity` then has no effect.
        granularity: ``"token"`` for a scale per row, ``"tensor"`` for one scale; both dynamic.
        k_multiple: pads x_q with columns of zeros until this divides their number. They add nothing to a GEMM whose
            weight is padded likewise, and give it rows that are aligned for any K.

    Returns:
        x_q: [..., K] int8 in [-127, 127], contiguous; K rounded up to a multiple of k_multiple.
        x_scale: float32, [M]; [1] for ``"tensor"``. A token with a NaN or Inf has a non-finite scale, so that its
            output cannot look sound; under ``"tensor"`` all tokens share that fate.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or device does not fit, granularity is unknown, or k_multiple is below 1.

    Equivalent to:
        v = x.float() * inv_smooth
        x_scale = v.abs().amax(-1) / 127
        x_q = torch.round(v * (1 / x_scale)[..., None]).clamp(-127, 127).to(torch.int8)
        x_q = torch.nn.functional.pad(x_q, (0, -K % k_multiple))

    Source: SmoothQuant (Xiao et al., 2022), section 3.2, eq. 3; schemes O1, O2, O3 of table 2.
    """
    op = cpu.quantize if eager_cpu(x, inv_smooth, scale) else _quantize
    result: tuple[Tensor, Tensor] = op(
        x, inv_smooth=inv_smooth, scale=scale, granularity=granularity, k_multiple=k_multiple
    )
    return result


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
) -> tuple[Tensor, ...]:
    """RMSNorm, smoothing and int8 quantization in one pass, with an optional residual added first.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight: [K] float, the norm's weight.
        eps: added to the mean of squares.
        residual: like x; the norm reads `x + residual`, rounded to x's type as an unfused model adds it.
        inv_smooth, scale, granularity, k_multiple: as in `quantize`.

    Returns:
        (x_q, x_scale), and x + residual (x's shape and dtype) where a residual was given. The norm's own output stays
        in float32 until it is quantized.

    Raises:
        TypeError, ValueError: as in `quantize`.

    Equivalent to:
        x = x + residual
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Zhang and Sennrich (2019), RMSNorm, eq. 4; SmoothQuant, section 4 (fusing into the previous layer).
    """
    *quantized, total = _rms_norm_quantize(
        x,
        weight,
        eps,
        residual=residual,
        inv_smooth=inv_smooth,
        scale=scale,
        granularity=granularity,
        k_multiple=k_multiple,
    )
    return tuple(quantized) if residual is None else (*quantized, total)


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
) -> tuple[Tensor, ...]:
    """LayerNorm, smoothing and int8 quantization in one pass, with an optional residual added first.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight, bias: [K] float or None.
        eps: added to the variance.
        residual, inv_smooth, scale, granularity, k_multiple: as in `rms_norm_quantize`.

    Returns:
        (x_q, x_scale), and x + residual where a residual was given.

    Raises:
        TypeError, ValueError: as in `quantize`.

    Equivalent to:
        x = x + residual
        y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Ba et al. (2016), Layer Normalization; SmoothQuant, section 4.
    """
    *quantized, total = _layer_norm_quantize(
        x,
        weight,
        bias,
        eps,
        residual=residual,
        inv_smooth=inv_smooth,
        scale=scale,
        granularity=granularity,
        k_multiple=k_multiple,
    )
    return tuple(quantized) if residual is None else (*quantized, total)


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
    """Activation function (gated or not), smoothing and int8 quantization in one pass.

    Args:
        x: [..., K] float16, bfloat16 or float32; [..., 2K] (gate, then up) for the fused kinds.
        kind: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``; or ``"silu_mul"``, ``"gelu_mul"``,
            ``"gelu_tanh_mul"``, which read both halves from x.
        gate: like x; given, the result is act(gate) * x.
        inv_smooth, scale, granularity, k_multiple: as in `quantize`, over the K outputs.

    Returns:
        (x_q, x_scale), x_q of shape [..., K], K rounded up to a multiple of k_multiple.

    Raises:
        TypeError, ValueError: as in `quantize`; also for an unknown kind or an odd fused size.

    Equivalent to:
        y = torch.nn.functional.silu(gate.float()) * x.float()
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Shazeer (2020), GLU Variants Improve Transformer; SmoothQuant, section 4.
    """
    result: tuple[Tensor, Tensor] = _act_quantize(
        x,
        kind,
        gate=gate,
        inv_smooth=inv_smooth,
        scale=scale,
        granularity=granularity,
        k_multiple=k_multiple,
    )
    return result


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
    op = cpu.gemm_s8 if eager_cpu(x_q, x_scale, w_scale, bias, residual) else _gemm_s8
    y: Tensor = op(x_q, w_q, x_scale, w_scale, bias=bias, residual=residual, out_dtype=out_dtype)
    return y


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
    """INT8 GEMM whose output is quantized again by a static scale, for an int8 consumer (OPT's fc1 to fc2).

    Args:
        x_q, w_q, x_scale, w_scale, bias: as in `gemm_s8`.
        out_scale: [1] float32, the calibrated scale of the output.
        relu: apply ReLU before the quantization.

    Returns:
        [..., N] int8 in [-127, 127]; NaN becomes 0.

    Raises:
        TypeError, ValueError: as in `gemm_s8`.

    Equivalent to:
        y = torch.relu(gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, out_dtype=torch.float32))
        torch.round(y * (1 / out_scale)).clamp(-127, 127).to(torch.int8)

    Source: SmoothQuant (Xiao et al., 2022), section 4; the paper's O3 scheme.
    """
    short = eager_cpu(x_q, x_scale, w_scale, out_scale, bias)
    op: Any = cpu.gemm_s8_requant if short else _gemm_s8_requant
    y: Tensor = op(x_q, w_q, x_scale, w_scale, out_scale, bias=bias, relu=relu)
    return y


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
    """A whole W8A8 linear layer: `quantize`, then `gemm_s8`, to the same bits; on a GPU one launch for a few tokens.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        w_q, w_scale, bias: as in `gemm_s8`.
        inv_smooth, scale, granularity: as in `quantize`.

    Returns:
        [..., N] of x's dtype.

    Raises:
        TypeError, ValueError: as in `quantize` and `gemm_s8`.

    Equivalent to:
        x_q, x_scale = quantize(x, inv_smooth=inv_smooth, scale=scale, granularity=granularity)
        gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, out_dtype=x.dtype)

    Source: SmoothQuant (Xiao et al., 2022), section 4.
    """
    op = cpu.linear_s8 if eager_cpu(x, w_scale, bias, inv_smooth, scale) else _linear_s8
    y: Tensor = op(
        x,
        w_q,
        w_scale,
        bias=bias,
        inv_smooth=inv_smooth,
        scale=scale,
        granularity=granularity,
    )
    return y
