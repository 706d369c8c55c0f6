"""Wrong calls of the ops for experts, with the exception and a part of the sentence that they must raise."""

from __future__ import annotations

from typing import Any

import torch

from smoothquant_kernels import reference
from tests.support import cases
from tests.support.op_calls import Call

E, N, K = 3, 5, 6
G = cases.expert_operands(4, E, N, K)  # 8 results
GROUPED_NAMES = ("x_q", "w_q", "x_scale", "w_scale", "offsets")
Y = cases.activations(8, N)


def grouped(**changes: Any) -> Call:
    operands = [changes.pop(name, getattr(G, name)) for name in GROUPED_NAMES]
    options = {"rows": G.rows, "bias": G.bias, "out_dtype": torch.float32, **changes}
    return Call("grouped_gemm_s8", tuple(operands), options)


def combine(**changes: Any) -> Call:
    given = {"y": Y, "position": G.position, "weights": G.weights, **changes}
    return Call("combine_experts", tuple(given.values()), {})


FLOATS = "must be float16 or bfloat16 or float32, got"
LONG = torch.zeros(1, reference.MAX_K + 1, dtype=torch.int8)
SHAPES = "x_q must be [R, K] and w_q [E, N, K] with the same K, E >= 1 and N >= 1, got"
MANY = torch.zeros(1, 1, K, dtype=torch.int8).expand(reference.MAX_EXPERTS + 1, 1, K)

REFUSED: list[tuple[Call, type[Exception], str]] = [
    (grouped(x_q=G.x_q.float()), TypeError, "x_q must be int8, got float32. Quantize it first"),
    (grouped(w_q=G.w_q.half()), TypeError, "w_q must be int8, got float16. Quantize it first"),
    (grouped(x_q=G.x_q[None]), ValueError, f"{SHAPES} (1, 4, 6) and (3, 5, 6)."),
    (grouped(w_q=G.w_q[0]), ValueError, f"{SHAPES} (4, 6) and (5, 6)."),
    (grouped(w_q=G.w_q[:0]), ValueError, f"{SHAPES} (4, 6) and (0, 5, 6)."),
    (grouped(w_q=G.w_q[:, :0]), ValueError, f"{SHAPES} (4, 6) and (3, 0, 6)."),
    (grouped(w_q=G.w_q[..., :5]), ValueError, f"{SHAPES} (4, 6) and (3, 5, 5)."),
    (
        grouped(x_q=G.x_q[:, :0], w_q=G.w_q[..., :0]),
        ValueError,
        "K must be in [1, 131071] so that an int32 sum cannot overflow, got 0; split the layer over",
    ),
    (grouped(x_q=LONG, w_q=LONG[None]), ValueError, "got 131072; split the layer over K."),
    (grouped(w_q=MANY), ValueError, "at most 1024 experts, got 1025."),
    (grouped(rows=G.rows.long()), TypeError, "rows must be int32, got int64."),
    (
        grouped(rows=G.rows[None]),
        ValueError,
        "rows must have shape (4,) (the row of x_q for each result), got (1, 8).",
    ),
    (grouped(x_q=G.x_q[:0]), ValueError, "x_q has no rows, but rows has 8."),
    (grouped(offsets=G.offsets.float()), TypeError, "offsets must be int32, got float32."),
    (
        grouped(offsets=G.offsets[1:]),
        ValueError,
        "offsets must have shape (4,) (one more than experts), got (3,).",
    ),
    (grouped(x_scale=G.x_scale.half()), TypeError, "x_scale must be float32, got float16. Scales"),
    (
        grouped(x_scale=torch.ones(4)),  # of the rows of x_q
        ValueError,
        "x_scale must have shape [8] or [1] (per result or for all), got (4,).",
    ),
    (
        grouped(rows=None),
        ValueError,
        "x_scale must have shape [4] or [1] (per result or for all), got (8,).",
    ),
    (grouped(w_scale=G.w_scale.double()), TypeError, "w_scale must be float32, got float64. Scal"),
    (grouped(w_scale=G.w_scale[0]), ValueError, "w_scale must have shape (3, 5), got (5,)."),
    (grouped(w_scale=G.w_scale.t()), ValueError, "w_scale must have shape (3, 5), got (5, 3)."),
    (grouped(bias=G.bias.int()), TypeError, f"bias {FLOATS} int32."),
    (grouped(bias=G.bias[:1]), ValueError, "bias must have shape (3, 5), got (1, 5)."),
    (
        grouped(out_dtype=torch.int8),
        TypeError,
        "out_dtype must be float16, bfloat16 or float32, got",
    ),
    (combine(y=Y.double()), TypeError, f"y {FLOATS} float64."),
    (combine(y=Y[0]), ValueError, "y must have shape [S, N] with N >= 1, got (5,)."),
    (combine(y=Y[:, :0]), ValueError, "y must have shape [S, N] with N >= 1, got (8, 0)."),
    (combine(weights=G.weights.int()), TypeError, f"weights {FLOATS} int32."),
    (
        combine(weights=G.weights[0]),
        ValueError,
        "weights must have shape [T, choices] with at least one choice, got (2,).",
    ),
    (combine(weights=G.weights[:, :0]), ValueError, "with at least one choice, got (4, 0)."),
    (combine(position=G.position.long()), TypeError, "position must be int32, got int64."),
    (
        combine(position=G.position[:, :1]),
        ValueError,
        "position must have shape (4, 2) (the shape of weights), got (4, 1).",
    ),
    (combine(y=Y[:0]), ValueError, "y has no rows, but position has 4."),
]
