"""Wrong calls of every op, with the exception and a part of the sentence that they must raise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.support import cache_calls, cases, expert_calls
from tests.support.op_calls import Call

KINDS = (*reference.ACTIVATIONS, *reference.FUSED_KINDS)
X = cases.activations(4, 6)
G = cases.gemm_operands(4, 3, 6)
PAIRS = cases.gemm_operands(4, 4, 6)
F32 = torch.float32
GEMM_NAMES = ("x_q", "w_q", "x_scale", "w_scale")


def quantize(**changes: Any) -> Call:
    return Call("quantize", (changes.pop("x", X),), changes)


def rms_norm(**changes: Any) -> Call:
    x, weight = changes.pop("x", X), changes.pop("weight", torch.ones(6))
    return Call("rms_norm_quantize", (x, weight, 1e-5), changes)


def layer_norm(**changes: Any) -> Call:
    weight, bias = changes.pop("weight", torch.ones(6)), changes.pop("bias", None)
    return Call("layer_norm_quantize", (X, weight, bias, 1e-5), changes)


def act(kind: str = "silu", x: Tensor = X, **changes: Any) -> Call:
    return Call("act_quantize", (x, kind), changes)


def gemm(**changes: Any) -> Call:
    operands = [changes.pop(name, getattr(G, name)) for name in GEMM_NAMES]
    return Call("gemm_s8", tuple(operands), {"out_dtype": F32, **changes})


def gemm_requant(**changes: Any) -> Call:
    operands = [changes.pop(name, getattr(G, name)) for name in GEMM_NAMES]
    scale = changes.pop("out_scale", torch.ones(1))
    return Call("gemm_s8_requant", (*operands, scale), changes)


def gated(**changes: Any) -> Call:
    operands = [changes.pop(name, getattr(PAIRS, name)) for name in GEMM_NAMES]
    scale = changes.pop("out_scale", torch.ones(1))
    return Call("gemm_s8_gated", (*operands, scale), {"dtype": F32, **changes})


def linear(**changes: Any) -> Call:
    operands = [changes.pop(name, default) for name, default in (("x", X), ("w_q", G.w_q))]
    return Call("linear_s8", (*operands, changes.pop("w_scale", G.w_scale)), changes)


def fused(kind: str = "silu", **changes: Any) -> Call:
    operands = (changes.pop("x", X), kind, changes.pop("w_q", G.w_q))
    return Call("fused_linear_s8", (*operands, changes.pop("w_scale", G.w_scale)), changes)


FLOAT_NAMES = "float16 or bfloat16 or float32"
LONG = torch.zeros(1, reference.MAX_K + 1, dtype=torch.int8)

REFUSED: list[tuple[Call, type[Exception], str]] = [
    (quantize(x=X.double()), TypeError, f"quantize: x must be {FLOAT_NAMES}, got float64."),
    (quantize(x=G.x_q), TypeError, f"quantize: x must be {FLOAT_NAMES}, got int8."),
    (quantize(x=torch.tensor(1.0)), ValueError, "shape [..., K] with K >= 1, got ()."),
    (quantize(x=X[:, :0]), ValueError, "shape [..., K] with K >= 1, got (4, 0)."),
    (quantize(inv_smooth=torch.ones(5)), ValueError, "inv_smooth must have shape [6] (one factor"),
    (quantize(inv_smooth=torch.ones(1, 6)), ValueError, "channel of x), got (1, 6)."),
    (quantize(inv_smooth=torch.ones(6).half()), TypeError, "be float32, got float16. Scales and"),
    (quantize(scale=torch.ones(4)), ValueError, "scale must have shape [1] (a static scale"),
    (quantize(scale=torch.ones(1).double()), TypeError, "scale must be float32, got float64."),
    (quantize(granularity="row"), ValueError, "must be 'token' or 'tensor', got 'row'; give"),
    (quantize(k_multiple=0), ValueError, "quantize: k_multiple must be at least 1, got 0."),
    (quantize(rotation=4), ValueError, "quantize: rotation must be 0 or a power of two from 2 to"),
    (quantize(rotation=3), ValueError, "that divides K = 6, got 3."),
    (rms_norm(rotation=4), ValueError, "rms_norm_quantize: rotation must be 0 or a power of two"),
    (layer_norm(rotation=-2), ValueError, "that divides K = 6, got -2."),
    (act(rotation=1), ValueError, "that divides K = 6, got 1."),
    (act(kind="silu_mul", rotation=2), ValueError, "that divides K = 3, got 2."),
    (rms_norm(k_multiple=0), ValueError, "k_multiple must be at least 1, got 0."),
    (layer_norm(k_multiple=-1), ValueError, "k_multiple must be at least 1, got -1."),
    (act(k_multiple=-16), ValueError, "k_multiple must be at least 1, got -16."),
    (
        rms_norm(x=X.double()),
        TypeError,
        f"rms_norm_quantize: x must be {FLOAT_NAMES}, got float64.",
    ),
    (rms_norm(weight=torch.ones(5)), ValueError, "weight must have shape [6], got (5,)."),
    (rms_norm(weight=torch.ones(6).int()), TypeError, f"weight must be {FLOAT_NAMES}, got int32."),
    (rms_norm(residual=X.half()), TypeError, "residual must be float32, got float16."),
    (rms_norm(residual=X[:2]), ValueError, "residual must have x's shape (4, 6), got (2, 6)."),
    (layer_norm(bias=torch.ones(6, 1)), ValueError, "bias must have shape [6], got (6, 1)."),
    (layer_norm(weight=torch.ones(1)), ValueError, "layer_norm_quantize: weight must have shape"),
    (layer_norm(granularity=""), ValueError, "layer_norm_quantize: granularity must be"),
    (act(kind="swish"), ValueError, f"kind must be one of {', '.join(KINDS)}"),
    (act(gate=X[:1]), ValueError, "act_quantize: gate must have x's shape (4, 6), got (1, 6)."),
    (act(gate=X.half()), TypeError, "act_quantize: gate must be float32, got float16."),
    (act(kind="silu_mul", gate=X), ValueError, "reads gate and up from one x [..., 2K]; drop"),
    (act(kind="silu_mul", x=X[:, :5]), ValueError, "needs x [..., 2K], got an odd size: (4, 5)."),
    (act(kind="gelu_mul", inv_smooth=torch.ones(6)), ValueError, "inv_smooth must have shape [3]"),
    (gemm(x_q=X), TypeError, "gemm_s8: x_q must be int8, got float32. Quantize it first"),
    (gemm(w_q=G.w_q.float()), TypeError, "gemm_s8: w_q must be int8, got float32. Quantize"),
    (gemm(w_q=G.w_q.t()), ValueError, "the same K and N >= 1, got (4, 6) and (6, 3)."),
    (gemm(w_q=G.w_q[0]), ValueError, "w_q [N, K] with the same K and N >= 1, got (4, 6) and (6,)"),
    (gemm(w_q=G.w_q[:0]), ValueError, "N >= 1, got (4, 6) and (0, 6)."),
    (gemm(x_q=G.x_q[:, :0], w_q=G.w_q[:, :0]), ValueError, "K must be in [1, 131071] so that"),
    (gemm(x_q=LONG, w_q=LONG), ValueError, "cannot overflow, got 131072; split the layer over K."),
    (gemm(x_scale=torch.ones(3)), ValueError, "x_scale must have shape [4] or [1] (per token or"),
    (gemm(x_scale=torch.ones(4, 1)), ValueError, "per tensor), got (4, 1)."),
    (gemm(x_scale=torch.ones(4).half()), TypeError, "x_scale must be float32, got float16."),
    (gemm(w_scale=torch.ones(2)), ValueError, "w_scale must have shape [3] or [1] (per output"),
    (gemm(bias=torch.ones(4)), ValueError, "gemm_s8: bias must have shape [3], got (4,)."),
    (gemm(bias=torch.ones(3).int()), TypeError, f"bias must be {FLOAT_NAMES}, got int32."),
    (gemm(residual=torch.ones(3)), ValueError, "residual must have shape (4, 3), got (3,)."),
    (gemm(residual=G.x_q[:, :3]), TypeError, f"residual must be {FLOAT_NAMES}, got int8."),
    (gemm(out_dtype=torch.int8), TypeError, "out_dtype must be float16, bfloat16 or float32, got"),
    (
        gemm_requant(w_scale=torch.ones(2)),
        ValueError,
        "gemm_s8_requant: w_scale must have shape [3]",
    ),
    (
        gemm_requant(out_scale=torch.ones(3)),
        ValueError,
        "out_scale must have shape [1] (the scale of",
    ),
    (
        gemm_requant(out_scale=torch.ones(1).half()),
        TypeError,
        "out_scale must be float32, got float16",
    ),
    (
        gated(w_q=G.w_q, w_scale=G.w_scale),
        ValueError,
        "w_q must have an even number of rows, those",
    ),
    (gated(kind="silu"), ValueError, "kind must be one of silu_mul, gelu_mul, gelu_tanh_mul; got"),
    (gated(inv_smooth=torch.ones(4)), ValueError, "inv_smooth must have shape [2] (one factor per"),
    (gated(out_scale=torch.ones(2)), ValueError, "gemm_s8_gated: out_scale must have shape [1]"),
    (gated(bias=torch.ones(2)), ValueError, "gemm_s8_gated: bias must have shape [4], got (2,)."),
    (gated(dtype=torch.int8), TypeError, "dtype must be float16, bfloat16 or float32, got"),
    (linear(x=G.x_q), TypeError, f"linear_s8: x must be {FLOAT_NAMES}, got int8."),
    (linear(w_q=G.w_q[:, :5]), ValueError, "the same K and N >= 1, got (4, 6) and (3, 5)."),
    (linear(inv_smooth=torch.ones(3)), ValueError, "inv_smooth must have shape [6] (one factor"),
    (linear(rotation=8), ValueError, "linear_s8: rotation must be 0 or a power of two from 2 to"),
    (linear(granularity="row"), ValueError, "must be 'token' or 'tensor', got 'row'; give"),
    (linear(residual=torch.ones(4, 6)), ValueError, "residual must have shape (4, 3), got (4, 6)."),
    (linear(residual=G.x_q[:, :3]), TypeError, f"residual must be {FLOAT_NAMES}, got int8."),
    (fused(x=G.x_q), TypeError, f"fused_linear_s8: x must be {FLOAT_NAMES}, got int8."),
    (
        fused("rms"),
        ValueError,
        f"kind must be one of rms_norm, layer_norm, {', '.join(KINDS)}; got",
    ),
    (fused("rms_norm"), ValueError, "fused_linear_s8: kind 'rms_norm' needs `norm_weight` [K]."),
    (
        fused("rms_norm", norm_weight=X[0], norm_bias=X[0]),
        ValueError,
        "kind 'rms_norm' takes no `norm_bias`; drop it.",
    ),
    (fused("layer_norm", gate=X), ValueError, "kind 'layer_norm' takes no `gate`; drop it."),
    (fused(norm_weight=X[0]), ValueError, "kind 'silu' takes no `norm_weight`; drop it."),
    (fused(norm_bias=X[0]), ValueError, "kind 'silu' takes no `norm_bias`; drop it."),
    (fused("silu_mul", eps=1e-5), ValueError, "kind 'silu_mul' takes no `eps`; drop it."),
    (fused("silu_mul", gate=X), ValueError, "reads gate and up from one x [..., 2K]; drop"),
    (fused("silu_mul", x=X[:, :5]), ValueError, "needs x [..., 2K], got an odd size: (4, 5)."),
    (fused("silu_mul"), ValueError, "the same K and N >= 1, got (4, 3) and (3, 6)."),
    (
        fused(gate=X[:1]),
        ValueError,
        "fused_linear_s8: gate must have x's shape (4, 6), got (1, 6).",
    ),
    (fused(gate=X.half()), TypeError, "fused_linear_s8: gate must be float32, got float16."),
    (
        fused("rms_norm", norm_weight=X[0, :5]),
        ValueError,
        "fused_linear_s8: norm_weight must have shape [6], got (5,).",
    ),
    (
        fused("layer_norm", norm_bias=X[0].int()),
        TypeError,
        f"fused_linear_s8: norm_bias must be {FLOAT_NAMES}, got int32.",
    ),
    (fused(w_q=G.w_q.float()), TypeError, "fused_linear_s8: w_q must be int8, got float32. Quant"),
    (fused(w_scale=torch.ones(2)), ValueError, "w_scale must have shape [3] or [1] (per output"),
    (fused(bias=torch.ones(4)), ValueError, "fused_linear_s8: bias must have shape [3], got (4,)."),
    (fused(residual=X), ValueError, "residual must have shape (4, 3), got (4, 6)."),
    (fused(inv_smooth=torch.ones(3)), ValueError, "inv_smooth must have shape [6] (one factor"),
    (fused(scale=torch.ones(4)), ValueError, "scale must have shape [1] (a static scale"),
    (fused(rotation=4), ValueError, "that divides K = 6, got 4."),
    (fused(granularity="row"), ValueError, "must be 'token' or 'tensor', got 'row'; give"),
    *cache_calls.REFUSED,
    *expert_calls.REFUSED,
]
