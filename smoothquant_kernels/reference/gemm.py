"""INT8 GEMMs with their epilogues."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.reference.rows import (
    FUSED_KINDS,
    activation,
    inverse_scale,
    quantize,
    round_to_int8,
)

#: Channels of gate, then as many of up, in the weight of `gemm_s8_gated`. One thread of a GPU holds the sums of both.
GATE_BLOCK = 8


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Correctly rounded float32 `a * b + c`, as the GPU's and CPU's fused multiply-add compute it.

    The float64 product of two float32 numbers is exact. The float64 sum is not, and rounding it to float32 could round
    twice. So its last bit is made odd whenever bits were lost (round to odd, Boldo & Melquiond 2008), which leaves the
    second rounding as the only one.
    """
    p, c64 = torch.broadcast_tensors(a.double() * b.double(), c.double())
    s = p + c64
    t = s - p
    lost = (p - (s - t)) + (c64 - t)  # Knuth's TwoSum: s + lost is the exact sum
    even = (s.contiguous().view(torch.int64) & 1) == 0
    adjust = torch.isfinite(s) & torch.isfinite(lost) & (lost != 0) & even
    towards = torch.where(lost > 0, torch.inf, -torch.inf).to(s.dtype)
    return torch.where(adjust, torch.nextafter(s, towards), s).float()


def gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """INT8 GEMM with fused dequantization: `fma(acc * w_scale, x_scale, bias) + residual`, rounded once."""
    acc = x_q.reshape(-1, x_q.shape[-1]).double() @ w_q.double().T  # exact
    y = acc.to(torch.int32).float() * w_scale.float()  # through int32, which has no -0
    x_column = x_scale.float()[:, None]
    y = y * x_column if bias is None else fma(y, x_column, bias.float())
    if residual is not None:
        y = y + residual.reshape(y.shape).float()
    return y.to(out_dtype).reshape(*x_q.shape[:-1], w_q.shape[0])


def gemm_s8_requant(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`gemm_s8` whose float32 result is quantized by a static scale, after an optional ReLU."""
    y = gemm_s8(x_q, w_q, x_scale, w_scale, bias, out_dtype=torch.float32)
    if relu:
        y = torch.relu(y)
    return round_to_int8(y * inverse_scale(out_scale.float()))


def gate_up_order(channels: int) -> Tensor:
    """The row of gate-then-up [2 * channels] that stands at each row of the interleaved weight of `gemm_s8_gated`.

    Blocks of 8 rows of gate and 8 of up take turns. If 8 does not divide `channels`, the last two are shorter.
    """
    blocks = torch.arange(2 * channels).view(2, channels).split(GATE_BLOCK, dim=1)
    return torch.cat([block.flatten() for block in blocks])


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """The rows of gate and up [I, ...] in the order of `gate_up_order`: weights, scales, biases of `gemm_s8_gated`."""
    return torch.cat([gate, up])[gate_up_order(len(gate)).to(gate.device)]


def separate_gate_up(y: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up), each [..., I], of columns [..., 2 I] in the order of `gate_up_order`."""
    order = torch.argsort(gate_up_order(y.shape[-1] // 2)).to(y.device)
    gate, up = y[..., order].chunk(2, dim=-1)
    return gate, up


def gemm_s8_gated(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    kind: str = "silu_mul",
    bias: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """`gemm_s8` with a weight in `gate_up_order`, rounded to `dtype`, then act(gate) * up, quantized."""
    y = gemm_s8(x_q, w_q, x_scale, w_scale, bias, out_dtype=dtype)
    gate, up = separate_gate_up(y)
    return quantize(activation(up, FUSED_KINDS[kind], gate), inv_smooth, out_scale)
