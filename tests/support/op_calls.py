"""Calls of every op, for the tests of the ops on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from smoothquant_kernels import ops
from tests.support import cases

#: The sizes of `CALLS`.
M, N, K = 6, 5, 18


class Call(NamedTuple):
    """One call of a public function of `ops`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.name)  # type: ignore[no-any-return]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.smoothquant_kernels, self.name).default  # type: ignore[no-any-return]

    def eager(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def calls(m: int = M) -> list[Call]:
    """Calls of every op with all of its arguments, and with each kind of scale and shape."""
    x, other = (cases.activations(m, K, torch.bfloat16, seed) for seed in (0, 1))
    inv_smooth, weight = cases.inverse_smooth(K), cases.inverse_smooth(K, 3)
    static = torch.tensor([0.02])
    smooth = {"inv_smooth": inv_smooth}
    half = {"inv_smooth": inv_smooth[: K // 2]}
    gemm = cases.gemm_operands(m, N, K)
    scalar = cases.gemm_operands(m, N, K, per_token=False, per_channel=False)
    gated = cases.gemm_operands(m, 2 * (N + 1), K)
    every: dict[str, Any] = {"bias": gemm.bias, "residual": gemm.residual}
    w4 = cases.w4_operands(m, N, K)
    experts = cases.expert_operands(m, 3, N, K, elsewhere=min(m, 2))
    x_sorted = experts.x_q[experts.rows.long()]
    y_sorted = cases.activations(len(experts.rows), N, torch.bfloat16, 4)
    w4_weight = (w4.w_q4, w4.w_group, w4.w_scale)

    def fused(kind: str) -> tuple[Any, ...]:
        return x, kind, gemm.w_q, gemm.w_scale

    return [
        Call("quantize", (x,), {}),
        Call("quantize", (x,), {**smooth, "granularity": "tensor"}),
        Call(
            "quantize", (x,), {**smooth, "scale": static, "granularity": "tensor", "k_multiple": 16}
        ),
        Call("quantize", (x,), {**smooth, "rotation": 2}),
        Call("rms_norm_quantize", (x, weight, 1e-5), {}),
        Call(
            "rms_norm_quantize",
            (x, weight, 1e-5),
            {"residual": other, **smooth, "scale": static, "k_multiple": 7, "rotation": 2},
        ),
        Call("layer_norm_quantize", (x, None, None, 1e-5), {}),
        Call(
            "layer_norm_quantize",
            (x, weight, inv_smooth, 1e-5),
            {"residual": other, **smooth, "granularity": "tensor", "k_multiple": 16},
        ),
        Call("layer_norm_quantize", (x, weight, None, 1e-5), {**smooth, "rotation": 2}),
        Call("act_quantize", (x, "relu"), {}),
        Call("act_quantize", (x, "gelu"), {"gate": other, **smooth, "rotation": 2}),
        Call("act_quantize", (x, "silu"), {"gate": other, **smooth, "k_multiple": K // 2}),
        Call("act_quantize", (x, "silu"), {"gate": other, **smooth, "granularity": "tensor"}),
        Call("act_quantize", (x, "gelu_tanh_mul"), {**half, "scale": static, "k_multiple": 16}),
        Call("gemm_s8", gemm[:4], {"out_dtype": torch.float16}),
        Call("gemm_s8", gemm[:4], {**every, "out_dtype": torch.bfloat16}),
        Call("gemm_s8", scalar[:4], {**every, "out_dtype": torch.float32}),
        Call("gemm_s8_requant", (*gemm[:4], static), {}),
        Call("gemm_s8_requant", (*gemm[:4], static), {"bias": gemm.bias, "relu": True}),
        Call("gemm_s8_gated", (*gated[:4], static), {"dtype": torch.float16}),
        Call(
            "gemm_s8_gated",
            (*gated[:4], static),
            {
                "kind": "gelu_tanh_mul",
                "bias": gated.bias,
                "inv_smooth": inv_smooth[: N + 1],
                "dtype": torch.bfloat16,
            },
        ),
        Call("linear_s8", (x, gemm.w_q, gemm.w_scale), {"granularity": "tensor"}),
        Call(
            "linear_s8", (x, gemm.w_q, gemm.w_scale), {"bias": gemm.bias, **smooth, "scale": static}
        ),
        Call(
            "linear_s8",
            (x, gemm.w_q, gemm.w_scale),
            {**smooth, "rotation": 2, "residual": gemm.residual},
        ),
        Call("gemm_w4a8", w4[:5], {"out_dtype": torch.float16}),
        Call("gemm_w4a8", w4[:5], {**every, "out_dtype": torch.float32}),
        Call("linear_w4a8", (x, *w4_weight), {"granularity": "tensor"}),
        Call("linear_w4a8", (x, *w4_weight), {"bias": gemm.bias, **smooth, "scale": static}),
        Call("linear_w4a8", (x, *w4_weight), {**smooth, "rotation": 2, "residual": gemm.residual}),
        Call(
            "fused_linear_s8",
            fused("rms_norm"),
            {"norm_weight": weight, "eps": 1e-5, **every, **smooth},
        ),
        Call("fused_linear_s8", fused("layer_norm"), {"granularity": "tensor"}),
        Call(
            "fused_linear_s8",
            fused("layer_norm"),
            {"norm_weight": weight, "norm_bias": inv_smooth, "eps": 1e-5, **smooth, "rotation": 2},
        ),
        Call("fused_linear_s8", fused("silu"), {"gate": other, **every, **smooth, "scale": static}),
        Call(
            "fused_linear_s8",
            (torch.cat([x, other], -1), *fused("gelu_tanh_mul")[1:]),
            {"residual": every["residual"], "granularity": "tensor", "rotation": 2},
        ),
        Call(
            "grouped_gemm_s8",
            experts[:5],
            {"rows": experts.rows, "bias": experts.bias, "out_dtype": torch.bfloat16},
        ),
        Call(
            "grouped_gemm_s8",
            (x_sorted, experts.w_q, static, experts.w_scale, experts.offsets),
            {"out_dtype": torch.float32},
        ),
        Call("combine_experts", (y_sorted, experts.position, experts.weights), {}),
        Call("combine_experts", (y_sorted, experts.position, experts.weights.bfloat16()), {}),
    ]


CALLS = calls()
IDS = [f"{call.name}-{i}" for i, call in enumerate(CALLS)]
each_call = pytest.mark.parametrize("call", CALLS, ids=IDS)
