"""Argument checks that the ops' descriptions share. An error says what was passed and what is allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from smoothquant_kernels.reference import (
    ACTIVATIONS,
    FUSED_KINDS,
    MAX_K,
    MAX_ROTATION,
    W4_GROUP,
    w4_groups,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
GRANULARITIES = ("token", "tensor")
KINDS = (*ACTIVATIONS, *FUSED_KINDS)
NORMS = ("rms_norm", "layer_norm")


def shape_of(t: Tensor) -> str:
    """The shape as Python writes a tuple."""
    return str(tuple(t.shape))


def type_name(dtype: torch.dtype) -> str:
    """The name without the prefix ``torch.``, for example ``float16``."""
    return str(dtype).removeprefix("torch.")


def float_named(name: object) -> torch.dtype | None:
    """The type of `FLOATS` with this `type_name`; None if there is none."""
    return next((dtype for dtype in FLOATS if type_name(dtype) == name), None)


def require_dtype(
    op: str, name: str, t: Tensor, allowed: tuple[torch.dtype, ...], hint: str = ""
) -> None:
    if t.dtype not in allowed:
        names = " or ".join(map(type_name, allowed))
        raise TypeError(f"{op}: {name} must be {names}, got {type_name(t.dtype)}.{hint}")


def require_device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {t.device}, but the activation is on {like.device}; move them to one device."
        )


def require_vector(
    op: str, name: str, t: Tensor | None, like: Tensor, sizes: tuple[int, ...], what: str
) -> None:
    if t is None:
        return
    require_dtype(op, name, t, (torch.float32,), " Scales and smoothing factors stay in float32.")
    require_device(op, name, t, like)
    if t.dim() != 1 or t.shape[0] not in sizes:
        allowed = " or ".join(f"[{s}]" for s in dict.fromkeys(sizes))
        raise ValueError(f"{op}: {name} must have shape {allowed} ({what}), got {shape_of(t)}.")


def fits_rotation(rotation: int, k: int) -> bool:
    """Whether K channels can be rotated in groups of this size; 0 is no rotation."""
    power_of_two = rotation & (rotation - 1) == 0
    return rotation == 0 or (2 <= rotation <= MAX_ROTATION and power_of_two and k % rotation == 0)


def activation_input(op: str, x: Tensor) -> None:
    """Requires x [..., K] to be a float tensor with at least one channel."""
    require_dtype(op, "x", x, FLOATS)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x must have shape [..., K] with K >= 1, got {shape_of(x)}.")


def quantizer(
    op: str,
    x: Tensor,
    k: int,
    inv_smooth: Tensor | None,
    scale: Tensor | None,
    granularity: str,
    k_multiple: int,
    rotation: int,
) -> None:
    """Checks the arguments that every producer of int8 takes."""
    activation_input(op, x)
    require_vector(op, "inv_smooth", inv_smooth, x, (k,), "one factor per channel of x")
    require_vector(op, "scale", scale, x, (1,), "a static scale for the whole tensor")
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"{op}: granularity must be 'token' or 'tensor', got {granularity!r}; give `scale` for the static scheme."
        )
    if k_multiple < 1:
        raise ValueError(f"{op}: k_multiple must be at least 1, got {k_multiple}.")
    if not fits_rotation(rotation, k):
        raise ValueError(
            f"{op}: rotation must be 0 or a power of two from 2 to {MAX_ROTATION} that divides K = {k}, "
            f"got {rotation}."
        )


def same_as_x(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    """Checks a tensor that is combined with x elementwise (residual, gate)."""
    if t is None:
        return
    require_dtype(op, name, t, (x.dtype,))
    require_device(op, name, t, x)
    if t.shape != x.shape:
        raise ValueError(f"{op}: {name} must have x's shape {shape_of(x)}, got {shape_of(t)}.")


def norm_parameter(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    """Checks a norm's weight or bias [K]."""
    if t is None:
        return
    require_dtype(op, name, t, FLOATS)
    require_device(op, name, t, x)
    if t.shape != x.shape[-1:]:
        raise ValueError(f"{op}: {name} must have shape [{x.shape[-1]}], got {shape_of(t)}.")


def norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    inv_smooth: Tensor | None,
    scale: Tensor | None,
    granularity: str,
    k_multiple: int,
    rotation: int,
) -> None:
    """Checks the arguments of both norm producers."""
    k = x.shape[-1] if x.dim() else 0
    quantizer(op, x, k, inv_smooth, scale, granularity, k_multiple, rotation)
    norm_parameter(op, "weight", weight, x)
    norm_parameter(op, "bias", bias, x)
    same_as_x(op, "residual", residual, x)


def _require_kind(op: str, kind: str, allowed: tuple[str, ...]) -> None:
    if kind not in allowed:
        raise ValueError(f"{op}: kind must be one of {', '.join(allowed)}; got {kind!r}.")


def activation_kind(op: str, x: Tensor, kind: str, gate: Tensor | None) -> int:
    """Checks kind and gate; returns the number of output channels."""
    _require_kind(op, kind, KINDS)
    activation_input(op, x)
    if kind not in FUSED_KINDS:
        same_as_x(op, "gate", gate, x)
        return int(x.shape[-1])
    if gate is not None:
        raise ValueError(
            f"{op}: kind {kind!r} reads gate and up from one x [..., 2K]; drop `gate`."
        )
    if x.shape[-1] % 2:
        raise ValueError(f"{op}: kind {kind!r} needs x [..., 2K], got an odd size: {shape_of(x)}.")
    return int(x.shape[-1]) // 2


QUANTIZE_FIRST = " Quantize it first (ops.quantize)."


def _gemm_weight(
    op: str, x: Tensor, x_k: int, w_q: Tensor, w_scale: Tensor, bias: Tensor | None
) -> None:
    """Checks a GEMM's weight, scale and bias against its activation, which has x's rows and x_k channels."""
    require_dtype(op, "w_q", w_q, (torch.int8,), QUANTIZE_FIRST)
    require_device(op, "w_q", w_q, x)
    if x.dim() < 1 or w_q.dim() != 2 or w_q.shape[0] < 1 or x_k != w_q.shape[1]:
        shape = (*x.shape[:-1], x_k) if x.dim() else ()
        raise ValueError(
            f"{op}: x_q must be [..., K] and w_q [N, K] with the same K and N >= 1, "
            f"got {shape} and {shape_of(w_q)}."
        )
    _channel_parameters(op, x, w_q.shape[0], w_q.shape[1], w_scale, bias)


def _channel_parameters(
    op: str, x: Tensor, n: int, k: int, w_scale: Tensor, bias: Tensor | None
) -> None:
    if not 1 <= k <= MAX_K:
        raise ValueError(
            f"{op}: K must be in [1, {MAX_K}] so that an int32 sum cannot overflow, got {k}; split the layer over K."
        )
    require_vector(op, "w_scale", w_scale, x, (n, 1), "per output channel or per tensor")
    if bias is not None:
        require_dtype(op, "bias", bias, FLOATS)
        require_device(op, "bias", bias, x)
        if bias.shape != (n,):
            raise ValueError(f"{op}: bias must have shape [{n}], got {shape_of(bias)}.")


def gemm(
    op: str,
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
) -> None:
    """Checks the operands of an int8 GEMM."""
    require_dtype(op, "x_q", x_q, (torch.int8,), QUANTIZE_FIRST)
    _gemm_weight(op, x_q, x_q.shape[-1] if x_q.dim() else 0, w_q, w_scale, bias)
    _activation(op, x_q, x_scale, out_dtype)


def _activation(op: str, x_q: Tensor, x_scale: Tensor, out_dtype: torch.dtype) -> None:
    m = math.prod(x_q.shape[:-1])
    require_vector(op, "x_scale", x_scale, x_q, (m, 1), "per token or per tensor")
    if out_dtype not in FLOATS:
        raise TypeError(f"{op}: out_dtype must be float16, bfloat16 or float32, got {out_dtype}.")


def w4_gemm(
    op: str,
    x_q: Tensor,
    w_q4: Tensor,
    w_group: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Checks the operands of a GEMM with a 4-bit weight."""
    require_dtype(op, "x_q", x_q, (torch.int8,), QUANTIZE_FIRST)
    _w4_weight(op, x_q, w_q4, w_group, w_scale, bias)
    _activation(op, x_q, x_scale, out_dtype)


def _w4_weight(
    op: str, x: Tensor, w_q4: Tensor, w_group: Tensor, w_scale: Tensor, bias: Tensor | None
) -> None:
    require_dtype(op, "w_q4", w_q4, (torch.uint8,), " Pack it first (reference.pack_w4).")
    require_device(op, "w_q4", w_q4, x)
    k = x.shape[-1] if x.dim() else 0
    width = w4_groups(k) * (W4_GROUP // 2)
    if k < 1 or w_q4.dim() != 2 or w_q4.shape[0] < 1 or w_q4.shape[1] != width:
        raise ValueError(
            f"{op}: x_q must be [..., K] and w_q4 [N, {W4_GROUP // 2} * ceil(K / {W4_GROUP})] with N >= 1, "
            f"got {shape_of(x)} and {shape_of(w_q4)}."
        )
    require_dtype(op, "w_group", w_group, (torch.int8,))
    require_device(op, "w_group", w_group, x)
    n = w_q4.shape[0]
    if w_group.shape != (w4_groups(k), n, 2):
        raise ValueError(
            f"{op}: w_group must have shape ({w4_groups(k)}, {n}, 2), a step and an offset for each group of "
            f"{W4_GROUP} channels, got {shape_of(w_group)}."
        )
    _channel_parameters(op, x, n, k, w_scale, bias)


def w4_linear(
    op: str,
    x: Tensor,
    w_q4: Tensor,
    w_group: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    inv_smooth: Tensor | None,
    scale: Tensor | None,
    granularity: str,
    rotation: int,
) -> None:
    """Checks the operands of a whole linear layer with a 4-bit weight."""
    activation_input(op, x)
    _w4_weight(op, x, w_q4, w_group, w_scale, bias)
    gemm_residual(op, residual, x, w_q4)
    quantizer(op, x, x.shape[-1], inv_smooth, scale, granularity, 1, rotation)


def linear(
    op: str,
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    inv_smooth: Tensor | None,
    scale: Tensor | None,
    granularity: str,
    rotation: int,
    k: int | None = None,
) -> None:
    """Checks the operands of a whole linear layer, whose quantizer gives k channels, or as many as x has."""
    activation_input(op, x)
    k = x.shape[-1] if k is None else k
    _gemm_weight(op, x, k, w_q, w_scale, bias)
    gemm_residual(op, residual, x, w_q)
    quantizer(op, x, k, inv_smooth, scale, granularity, 1, rotation)


def producer(
    op: str,
    x: Tensor,
    kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    gate: Tensor | None,
) -> int:
    """Checks what a norm or an activation function takes and no other kind; returns the number of output channels."""
    _require_kind(op, kind, (*NORMS, *KINDS))
    activation_input(op, x)
    norm, rms = kind in NORMS, kind == "rms_norm"
    for name, unwanted in {
        "norm_weight": not norm and norm_weight is not None,
        "norm_bias": (rms or not norm) and norm_bias is not None,
        "eps": not norm and eps != 0.0,
        "gate": norm and gate is not None,
    }.items():
        if unwanted:
            raise ValueError(f"{op}: kind {kind!r} takes no `{name}`; drop it.")
    if not norm:
        return activation_kind(op, x, kind, gate)
    if rms and norm_weight is None:
        raise ValueError(f"{op}: kind {kind!r} needs `norm_weight` [K].")
    norm_parameter(op, "norm_weight", norm_weight, x)
    norm_parameter(op, "norm_bias", norm_bias, x)
    return int(x.shape[-1])


def forced_tile(op: str, tile: int, splits: int) -> None:
    """Checks the private arguments that choose a kernel."""
    if tile < -1 or splits < 0:
        raise ValueError(
            f"{op}: tile must be -1 or a row of the table, splits at least 0, got {tile} and {splits}."
        )


def gemm_residual(op: str, residual: Tensor | None, x_q: Tensor, w_q: Tensor) -> None:
    """Checks a residual [..., N] that the epilogue adds."""
    if residual is None:
        return
    require_dtype(op, "residual", residual, FLOATS)
    require_device(op, "residual", residual, x_q)
    expected = (*x_q.shape[:-1], w_q.shape[0])
    if tuple(residual.shape) != expected:
        raise ValueError(f"{op}: residual must have shape {expected}, got {shape_of(residual)}.")


def gated(
    op: str,
    x_q: Tensor,
    w_q: Tensor,
    out_scale: Tensor,
    kind: str,
    inv_smooth: Tensor | None,
    dtype: torch.dtype,
) -> int:
    """Checks what a gated GEMM takes besides the operands of a GEMM; returns the number of output channels."""
    if kind not in FUSED_KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(FUSED_KINDS)}; got {kind!r}.")
    n = w_q.shape[0]
    if n % 2:
        raise ValueError(
            f"{op}: w_q must have an even number of rows, those of gate and up (reference.interleave_gate_up), got {n}."
        )
    requant_scale(op, out_scale, x_q)
    require_vector(op, "inv_smooth", inv_smooth, x_q, (n // 2,), "one factor per output channel")
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be float16, bfloat16 or float32, got {dtype}.")
    return n // 2


def requant_scale(op: str, out_scale: Tensor, x_q: Tensor) -> None:
    """Checks the static scale [1] of an int8 output."""
    require_vector(op, "out_scale", out_scale, x_q, (1,), "the scale of the int8 output")
