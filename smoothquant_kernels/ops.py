"""The public ops, named by what they compute.

Each is a `torch.library` op (`torch.ops.smoothquant_kernels.*`) with a fake kernel, so it works under `torch.compile
(fullgraph=True)` and `torch.export`; the functions here are what users call. The numbers are those of `reference.py`.

Shapes: `M` is the number of tokens, the product of all leading dimensions of `x` [..., K].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import _checks, cpu
from smoothquant_kernels._library import define_op, eager_cpu

# --- fake kernels: the same checks, the same shapes, no data ----------------------------------------------------------


def _fake_quantised(
    x: Tensor, k: int, scale: Tensor | None, granularity: str
) -> tuple[Tensor, Tensor]:
    per_tensor = scale is None and granularity == "tensor"
    rows = 1 if per_tensor else math.prod(x.shape[:-1])
    return (
        x.new_empty((*x.shape[:-1], k), dtype=torch.int8),
        x.new_empty((rows,), dtype=torch.float32),
    )


def _fake_quantize(
    x: Tensor,
    *,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
) -> tuple[Tensor, Tensor]:
    _checks.quantiser("quantize", x, x.shape[-1] if x.dim() else 0, inv_smooth, scale, granularity)
    return _fake_quantised(x, x.shape[-1], scale, granularity)


def _fake_norm_quantize(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.norm(op, x, weight, bias, residual, inv_smooth, scale, granularity)
    total = x.new_empty(0 if residual is None else x.shape)
    return *_fake_quantised(x, x.shape[-1], scale, granularity), total


def _fake_act_quantize(
    x: Tensor,
    kind: str,
    *,
    gate: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
) -> tuple[Tensor, Tensor]:
    k = _checks.activation_kind("act_quantize", x, kind, gate)
    _checks.quantiser("act_quantize", x, k, inv_smooth, scale, granularity)
    return _fake_quantised(x, k, scale, granularity)


def _fake_gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    _checks.gemm("gemm_s8", x_q, w_q, x_scale, w_scale, bias, out_dtype)
    _checks.gemm_residual("gemm_s8", residual, x_q, w_q)
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]), dtype=out_dtype)


def _fake_gemm_s8_requant(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    _checks.gemm("gemm_s8_requant", x_q, w_q, x_scale, w_scale, bias)
    _checks.requant_scale("gemm_s8_requant", out_scale, x_q)
    return x_q.new_empty((*x_q.shape[:-1], w_q.shape[0]))


# --- schemas ----------------------------------------------------------------------------------------------------------

_QUANTISER = 'Tensor? inv_smooth=None, Tensor? scale=None, str granularity="token"'

_quantize = define_op(
    f"quantize(Tensor x, *, {_QUANTISER}) -> (Tensor, Tensor)",
    cpu=cpu.quantize,
    fake=_fake_quantize,
)
_rms_norm_quantize = define_op(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, *, Tensor? residual=None, "
    f"{_QUANTISER}) -> (Tensor, Tensor, Tensor)",
    cpu=cpu.rms_norm_quantize,
    fake=lambda x, weight, eps, **options: _fake_norm_quantize(
        "rms_norm_quantize", x, weight, None, **options
    ),
)
_layer_norm_quantize = define_op(
    "layer_norm_quantize(Tensor x, Tensor? weight, Tensor? bias, float eps, *, "
    f"Tensor? residual=None, {_QUANTISER}) -> (Tensor, Tensor, Tensor)",
    cpu=cpu.layer_norm_quantize,
    fake=lambda x, weight, bias, eps, **options: _fake_norm_quantize(
        "layer_norm_quantize", x, weight, bias, **options
    ),
)
_act_quantize = define_op(
    f"act_quantize(Tensor x, str kind, *, Tensor? gate=None, {_QUANTISER}) -> (Tensor, Tensor)",
    cpu=cpu.act_quantize,
    fake=_fake_act_quantize,
)
_gemm_s8 = define_op(
    "gemm_s8(Tensor x_q, Tensor w_q, Tensor x_scale, Tensor w_scale, *, Tensor? bias=None, "
    "Tensor? residual=None, ScalarType out_dtype) -> Tensor",
    cpu=cpu.gemm_s8,
    fake=_fake_gemm_s8,
)
_gemm_s8_requant = define_op(
    "gemm_s8_requant(Tensor x_q, Tensor w_q, Tensor x_scale, Tensor w_scale, Tensor out_scale, *, "
    "Tensor? bias=None, bool relu=False) -> Tensor",
    cpu=cpu.gemm_s8_requant,
    fake=_fake_gemm_s8_requant,
)


# --- the public functions ---------------------------------------------------------------------------------------------


def quantize(
    x: Tensor,
    *,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
) -> tuple[Tensor, Tensor]:
    """Divide by the smoothing factors and quantise to int8, in one pass.

    Args:
        x: [..., K] float16, bfloat16 or float32, any strides.
        inv_smooth: [K] float32, the reciprocals 1 / s of the smoothing factors.
        scale: [1] float32, a calibrated (static) scale; `granularity` then has no effect.
        granularity: ``"token"`` for a scale per row, ``"tensor"`` for one scale; both dynamic.

    Returns:
        x_q: [..., K] int8 in [-127, 127], contiguous.
        x_scale: float32, [M]; [1] for ``"tensor"``. A token with a NaN or Inf has a non-finite scale, so that its
            output cannot look sound; under ``"tensor"`` all tokens share that fate.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape or device does not fit, or granularity is unknown.

    Equivalent to:
        v = x.float() * inv_smooth
        x_scale = v.abs().amax(-1) / 127
        x_q = torch.round(v * (1 / x_scale)[..., None]).clamp(-127, 127).to(torch.int8)

    Source: SmoothQuant (Xiao et al., 2022), section 3.2, eq. 3; schemes O1, O2, O3 of table 2.
    """
    op = cpu.quantize if eager_cpu(x, inv_smooth, scale) else _quantize
    result: tuple[Tensor, Tensor] = op(
        x, inv_smooth=inv_smooth, scale=scale, granularity=granularity
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
) -> tuple[Tensor, ...]:
    """RMSNorm, smoothing and int8 quantisation in one pass, with an optional residual added first.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight: [K] float, the norm's weight.
        eps: added to the mean of squares.
        residual: like x; the norm reads `x + residual`, rounded to x's type as an unfused model adds it.
        inv_smooth, scale, granularity: as in `quantize`.

    Returns:
        (x_q, x_scale), and x + residual (x's shape and dtype) where a residual was given. The norm's own output stays
        in float32 until it is quantised.

    Raises:
        TypeError, ValueError: as in `quantize`.

    Equivalent to:
        x = x + residual
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps) * weight
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Zhang and Sennrich (2019), RMSNorm, eq. 4; SmoothQuant, section 4 (fusing into the previous layer).
    """
    *quantised, total = _rms_norm_quantize(
        x,
        weight,
        eps,
        residual=residual,
        inv_smooth=inv_smooth,
        scale=scale,
        granularity=granularity,
    )
    return tuple(quantised) if residual is None else (*quantised, total)


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
) -> tuple[Tensor, ...]:
    """LayerNorm, smoothing and int8 quantisation in one pass, with an optional residual added first.

    Args:
        x: [..., K] float16, bfloat16 or float32.
        weight, bias: [K] float or None.
        eps: added to the variance.
        residual, inv_smooth, scale, granularity: as in `rms_norm_quantize`.

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
    *quantised, total = _layer_norm_quantize(
        x,
        weight,
        bias,
        eps,
        residual=residual,
        inv_smooth=inv_smooth,
        scale=scale,
        granularity=granularity,
    )
    return tuple(quantised) if residual is None else (*quantised, total)


def act_quantize(
    x: Tensor,
    kind: str,
    *,
    gate: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
) -> tuple[Tensor, Tensor]:
    """Activation function (gated or not), smoothing and int8 quantisation in one pass.

    Args:
        x: [..., K] float16, bfloat16 or float32; [..., 2K] (gate, then up) for the fused kinds.
        kind: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``; or ``"silu_mul"``, ``"gelu_mul"``,
            ``"gelu_tanh_mul"``, which read both halves from x.
        gate: like x; given, the result is act(gate) * x.
        inv_smooth, scale, granularity: as in `quantize`, over the K outputs.

    Returns:
        (x_q, x_scale), x_q of shape [..., K].

    Raises:
        TypeError, ValueError: as in `quantize`; also for an unknown kind or an odd fused size.

    Equivalent to:
        y = torch.nn.functional.silu(gate.float()) * x.float()
        x_q, x_scale = quantize(y, inv_smooth=inv_smooth)

    Source: Shazeer (2020), GLU Variants Improve Transformer; SmoothQuant, section 4.
    """
    result: tuple[Tensor, Tensor] = _act_quantize(
        x, kind, gate=gate, inv_smooth=inv_smooth, scale=scale, granularity=granularity
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
    """INT8 GEMM with fused dequantisation, bias and residual.

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
    """INT8 GEMM whose output is quantised again by a static scale, for an int8 consumer (OPT's fc1 to fc2).

    Args:
        x_q, w_q, x_scale, w_scale, bias: as in `gemm_s8`.
        out_scale: [1] float32, the calibrated scale of the output.
        relu: apply ReLU before the quantisation.

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
