"""The order of gate and up, and the specification of the gated GEMM."""

from __future__ import annotations

import pytest
import torch

from smoothquant_kernels import reference
from tests.support import cases
from tests.support.compare import assert_bitwise_equal


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 16, 30])
def test_gate_and_up_take_turns_in_blocks(channels: int) -> None:
    gate, up = torch.arange(channels), torch.arange(channels) + 1000
    rows = reference.interleave_gate_up(gate, up)
    for c in range(channels):
        block, size = c // 8, min(8, channels - c // 8 * 8)
        assert rows[16 * block + c % 8] == c and rows[16 * block + size + c % 8] == c + 1000
    for found, expected in zip(reference.separate_gate_up(rows), (gate, up), strict=True):
        assert torch.equal(found, expected)
    weight = reference.interleave_gate_up(gate[:, None].expand(-1, 3), up[:, None].expand(-1, 3))
    assert torch.equal(weight, rows[:, None].expand(-1, 3))


@pytest.mark.parametrize("kind", reference.FUSED_KINDS)
def test_gated_equals_gemm_then_activation(kind: str) -> None:
    gate, up = (cases.gemm_operands(9, 13, 33, seed=seed) for seed in (0, 1))
    scale, factors = torch.tensor([0.01]), cases.inverse_smooth(13)
    both = [torch.cat([getattr(gate, name), getattr(up, name)]) for name in ("w_q", "w_scale")]
    y = reference.gemm_s8(gate.x_q, both[0], gate.x_scale, both[1], out_dtype=torch.bfloat16)
    expected = reference.quantize(reference.activation(y, kind), factors, scale)
    w_q, w_scale = (
        reference.interleave_gate_up(getattr(gate, name), getattr(up, name))
        for name in ("w_q", "w_scale")
    )
    found = reference.gemm_s8_gated(
        gate.x_q, w_q, gate.x_scale, w_scale, scale, kind, None, factors, torch.bfloat16
    )
    for one, other in zip(found, expected, strict=True):
        assert_bitwise_equal(one, other)
