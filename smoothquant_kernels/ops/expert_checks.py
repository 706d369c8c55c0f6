"""Argument checks of the ops for experts."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.ops.checks import (
    FLOATS,
    QUANTIZE_FIRST,
    require_device,
    require_dtype,
    require_vector,
    shape_of,
)
from smoothquant_kernels.reference import MAX_EXPERTS, MAX_K


def _indices(
    op: str, name: str, t: Tensor, like: Tensor, shape: tuple[int, ...], what: str
) -> None:
    require_dtype(op, name, t, (torch.int32,))
    require_device(op, name, t, like)
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape} ({what}), got {shape_of(t)}.")


def grouped(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> int:
    """Checks the operands of a GEMM by experts; returns the number of rows of its result."""
    op = "grouped_gemm_s8"
    for name, t in (("x_q", x_q), ("w_q", w_q)):
        require_dtype(op, name, t, (torch.int8,), QUANTIZE_FIRST)
    require_device(op, "w_q", w_q, x_q)
    if x_q.dim() != 2 or w_q.dim() != 3 or min(w_q.shape[:2]) < 1 or x_q.shape[1] != w_q.shape[2]:
        raise ValueError(
            f"{op}: x_q must be [R, K] and w_q [E, N, K] with the same K, E >= 1 and N >= 1, "
            f"got {shape_of(x_q)} and {shape_of(w_q)}."
        )
    experts, n, k = w_q.shape
    if not 1 <= k <= MAX_K:
        raise ValueError(
            f"{op}: K must be in [1, {MAX_K}] so that an int32 sum cannot overflow, got {k}; split the layer over K."
        )
    if experts > MAX_EXPERTS:
        raise ValueError(f"{op}: at most {MAX_EXPERTS} experts, got {experts}.")
    s = x_q.shape[0]
    if rows is not None:
        s = rows.shape[0] if rows.dim() == 1 else s
        _indices(op, "rows", rows, x_q, (s,), "the row of x_q for each result")
        if s and not x_q.shape[0]:  # `len` would make a symbolic size a number
            raise ValueError(f"{op}: x_q has no rows, but rows has {s}.")
    _indices(op, "offsets", offsets, x_q, (experts + 1,), "one more than experts")
    require_vector(op, "x_scale", x_scale, x_q, (s, 1), "per result or for all")
    require_dtype(
        op, "w_scale", w_scale, (torch.float32,), " Scales and smoothing factors stay in float32."
    )
    for name, value in (("w_scale", w_scale), ("bias", bias)):
        if value is None:
            continue
        require_dtype(op, name, value, FLOATS)
        require_device(op, name, value, x_q)
        if tuple(value.shape) != (experts, n):
            raise ValueError(f"{op}: {name} must have shape {(experts, n)}, got {shape_of(value)}.")
    if out_dtype not in FLOATS:
        raise TypeError(f"{op}: out_dtype must be float16, bfloat16 or float32, got {out_dtype}.")
    return s


def combine(y: Tensor, position: Tensor, weights: Tensor) -> None:
    """Checks the operands of the weighted sum of experts' results."""
    op = "combine_experts"
    require_dtype(op, "y", y, FLOATS)
    if y.dim() != 2 or y.shape[1] < 1:
        raise ValueError(f"{op}: y must have shape [S, N] with N >= 1, got {shape_of(y)}.")
    if weights.dim() != 2 or weights.shape[1] < 1:
        raise ValueError(
            f"{op}: weights must have shape [T, choices] with at least one choice, got {shape_of(weights)}."
        )
    require_dtype(op, "weights", weights, FLOATS)
    require_device(op, "weights", weights, y)
    _indices(op, "position", position, y, tuple(weights.shape), "the shape of weights")
    if weights.shape[0] and not y.shape[0]:
        raise ValueError(f"{op}: y has no rows, but position has {weights.shape[0]}.")
