"""Calls of every op on a GPU, and the comparison of their results with the CPU's."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from smoothquant_kernels import SmoothQuantConfig, reference
from tests.support import cases, tolerance
from tests.support.compare import assert_all_bitwise_equal
from tests.support.op_calls import Call

#: Ops whose results may differ from the CPU's by the bound of tests/support/tolerance.py.
ROUNDED = ("rms_norm_quantize", "layer_norm_quantize", "act_quantize")
GPU = "cuda"
EPS = 1e-5

T = TypeVar("T")


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def move(value: T, device: str) -> T:
    """The same value with copies of its tensors. Dense tensors keep their strides."""
    moved: T = tree_map(lambda t: t.to(device, copy=True) if isinstance(t, Tensor) else t, value)
    return moved


def problems(m: int, k: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> list[Call]:
    """Calls of every op on the GPU, with x [M, K] and all optional tensors. The exact ops rotate as well."""
    rotation = SmoothQuantConfig(rotation=256).rotation_of(k)
    x, other = (cases.activations(m, k, dtype, seed + i) for i in (0, 1))
    weight, bias = (cases.inverse_smooth(k, seed + i).to(dtype) for i in (2, 3))
    made = []
    for scheme in cases.SCHEMES:
        options = cases.quantize_options(scheme)
        options |= {"inv_smooth": cases.inverse_smooth(k, seed), "k_multiple": 16}
        made += [
            Call("quantize", (x,), options),
            Call("quantize", (x,), {**options, "rotation": rotation}),
            Call("rms_norm_quantize", (x, weight, EPS), {**options, "residual": other}),
            Call("layer_norm_quantize", (x, weight, bias, EPS), {**options, "residual": other}),
            Call("act_quantize", (x, "silu"), {**options, "gate": other}),
        ]
    gemm = cases.gemm_operands(m, 24, k, dtype=dtype, seed=seed)
    added = {"bias": gemm.bias, "residual": gemm.residual}
    made += [
        Call("quantize", (x.t().contiguous().t(),), {}),  # the op copies it first
        Call("gemm_s8", gemm[:4], {**added, "out_dtype": dtype}),
        Call("gemm_s8_requant", (*gemm[:4], torch.ones(1)), {"bias": gemm.bias, "relu": True}),
        Call("gemm_s8_gated", (*gemm[:4], torch.ones(1)), {"bias": gemm.bias, "dtype": dtype}),
    ]
    for scheme in cases.SCHEMES:
        options = cases.quantize_options(scheme)
        options |= {"inv_smooth": cases.inverse_smooth(k, seed), **added}
        fused = (x, "relu", gemm.w_q, gemm.w_scale)  # exact on every backend
        made.append(Call("fused_linear_s8", fused, {**options, "gate": other}))
        for turned in (0, rotation):
            call = Call("linear_s8", (x, gemm.w_q, gemm.w_scale), {**options, "rotation": turned})
            made.append(call)
    return [move(call, GPU) for call in made]


def assert_like_the_cpu(call: Call, found: Any) -> None:
    """Norms and activations stay within `tolerance` of the reference. All other ops equal the CPU bit for bit."""
    call = move(call, "cpu")
    expected = call.eager()
    if call.name not in ROUNDED:
        assert_all_bitwise_equal(found, expected, call.name)
        return
    if call.name == "gemm_s8_gated":
        y = reference.gemm_s8(*call.args[:4], call.kwargs["bias"], out_dtype=call.kwargs["dtype"])
        gate, up = reference.separate_gate_up(y)
        options = {"gate": gate, "scale": call.args[4]}
        call = Call("act_quantize", (up, "silu"), options)
    x, options = call.args[0], call.kwargs
    inv_smooth, residual = options.get("inv_smooth"), options.get("residual")
    if call.name == "act_quantize":
        near = tolerance.activation(x, call.args[1], options.get("gate"), inv_smooth)
    else:
        norm = {"rms": tolerance.rms_norm, "layer": tolerance.layer_norm}[call.name.split("_")[0]]
        near = norm(reference.add_residual(x, residual), *call.args[1:], inv_smooth)
    k = near.v.shape[-1]
    granularity = options.get("granularity", "token")
    for x_q, x_scale, *total in (found, expected):
        assert not x_q[..., k:].any(), "the padding must be zero"
        tolerance.assert_quantized(
            (x_q[..., :k], x_scale), near, options.get("scale"), granularity, call.name
        )
        assert len(total) == (residual is not None)
    assert_all_bitwise_equal(found[2:], expected[2:], f"{call.name}: x + residual")
    assert not found[0].numel() or int((found[0].cpu().int() - expected[0]).abs().max()) <= 1
