"""The packing of 4-bit weights, spelled again in plain loops, and the weight that they represent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.support import cases
from tests.support.compare import assert_bitwise_equal

#: K that are one channel, whole groups, and everything between.
SIZES = (1, 3, 16, 31, 127, 128, 129, 200, 256, 385)


def place_of(channel: int) -> tuple[int, int]:
    """(byte, bits to shift right) of a channel in a packed row."""
    group, rest = divmod(channel, 128)
    i, rest = divmod(rest, 32)
    half, rest = divmod(rest, 16)
    t, j = divmod(rest, 4)
    return 64 * group + 16 * t + 4 * i + j, 4 * half


def packed(q: list[list[int]]) -> list[list[int]]:
    k = len(q[0])
    rows = [[0] * (64 * ((k + 127) // 128)) for _ in q]
    for row, values in zip(rows, q, strict=True):
        for channel, value in enumerate(values):
            byte, shift = place_of(channel)
            row[byte] += value << shift
    return rows


def unpacked(w_q4: list[list[int]], k: int) -> list[list[int]]:
    places = [place_of(channel) for channel in range(k)]
    return [[row[byte] >> shift & 15 for byte, shift in places] for row in w_q4]


def weight(w_q4: Tensor, w_group: Tensor, k: int) -> list[list[int]]:
    rows = unpacked(w_q4.tolist(), k)
    groups = w_group.tolist()
    return [
        [
            value * groups[channel // 128][n][0] + groups[channel // 128][n][1]
            for channel, value in enumerate(row)
        ]
        for n, row in enumerate(rows)
    ]


def test_places_are_all_halves_of_all_bytes_once() -> None:
    places = [place_of(channel) for channel in range(256)]
    assert sorted(places) == [(byte, shift) for byte in range(128) for shift in (0, 4)]


@pytest.mark.parametrize("k", SIZES)
def test_pack_and_unpack(k: int) -> None:
    q = torch.randint(0, 16, (3, k), generator=cases.generator(k))
    w_q4 = reference.pack_w4(q)
    assert w_q4.dtype == torch.uint8 and w_q4.tolist() == packed(q.tolist())
    assert_bitwise_equal(reference.unpack_w4(w_q4, k), q.to(torch.uint8))
    # Any bytes are values, also beyond K.
    w_q4 = torch.randint(0, 256, w_q4.shape, generator=cases.generator(k)).to(torch.uint8)
    assert reference.unpack_w4(w_q4, k).tolist() == unpacked(w_q4.tolist(), k)


@pytest.mark.parametrize("step", range(16))
def test_every_value_step_and_offset(step: int) -> None:
    """All combinations whose weight is an int8, in groups of their own."""
    offsets = range(-128, 128 - 15 * step)
    q = torch.arange(16).repeat(8)[None]
    w_q4 = reference.pack_w4(q.repeat(1, len(offsets)))
    w_group = torch.tensor([[[step, offset]] for offset in offsets], dtype=torch.int8)
    k = 128 * len(offsets)
    found = reference.w4_weight(w_q4, w_group, k)
    assert found.dtype == torch.int8
    assert found.tolist() == [
        [value * step + offset for offset in offsets for value in q[0].tolist()]
    ]


@pytest.mark.parametrize("k", SIZES)
def test_the_weight_and_the_product(k: int) -> None:
    g = cases.w4_operands(4, 5, k, seed=k)
    w_q = weight(g.w_q4, g.w_group, k)
    assert reference.w4_weight(g.w_q4, g.w_group, k).tolist() == w_q
    x_q = g.x_q.tolist()
    sums = torch.tensor([[sum(a * b for a, b in zip(x, w, strict=True)) for w in w_q] for x in x_q])
    for dtype in cases.FLOATS:
        y = reference.gemm_w4a8(*g, out_dtype=dtype)
        assert y.dtype == dtype and y.shape == (4, 5)
        # Both sums are exact integers below 2^24 here, so that float32 rounds only what follows.
        exact = sums.double() * g.w_scale.double() * g.x_scale.double()[:, None]
        exact = exact + g.bias.double() + g.residual.double()
        size = sums.abs().double() * g.w_scale * g.x_scale[:, None] + g.bias.abs().double()
        size = size + g.residual.abs().double()
        # Three float32 operations, each rounded by at most 2^-24 of its result, which is at most
        # `size`, and one rounding to the output type.
        bound = 3.01 * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * (exact.abs() + 1e-6 * size)
        assert bool(((y.double() - exact).abs() <= bound + torch.finfo(dtype).tiny).all())


def test_the_largest_sums_are_exact() -> None:
    """Steps of 15 and offsets of -128 go beyond 2^31 on the way; what they add up to is in int32."""
    k = reference.MAX_K
    q = torch.full((1, k), 15, dtype=torch.uint8)
    w_group = torch.tensor([15, -98], dtype=torch.int8).expand(reference.w4_groups(k), 1, 2)
    x_q = torch.full((1, k), -128, dtype=torch.int8)
    one = torch.ones(1)
    y = reference.gemm_w4a8(x_q, reference.pack_w4(q), w_group, one, one, None, None, torch.float32)
    assert y.item() == float(torch.tensor(-128 * 127 * k).float())


def test_nonfinite_scales_reach_their_row_or_column_only() -> None:
    g = cases.w4_operands(4, 6, 200)
    g.x_scale[1], g.x_scale[2], g.w_scale[3], g.w_scale[4] = torch.nan, torch.inf, torch.nan, -torch.inf  # fmt: skip
    clear = torch.ones(4, 6, dtype=torch.bool)
    clear[1:3], clear[:, 3:5] = False, False
    for dtype in cases.FLOATS:
        y = reference.gemm_w4a8(*g, out_dtype=dtype)
        assert bool((y.isfinite() == clear).all())


def test_groups() -> None:
    assert [reference.w4_groups(k) for k in (1, 127, 128, 129, 256, 257)] == [1, 1, 1, 2, 2, 3]
    assert reference.W4_GROUP == 128 and reference.W4_MAX == 15
    assert reference.pack_w4(torch.zeros(2, 129)).shape == (2, 128)


def test_sums_beyond_a_byte_wrap_around() -> None:
    w_q4 = reference.pack_w4(torch.full((1, 1), 15))
    w_group = torch.tensor([[[15, 127]]], dtype=torch.int8)
    assert reference.w4_weight(w_q4, w_group, 1).item() == 15 * 15 + 127 - 256
