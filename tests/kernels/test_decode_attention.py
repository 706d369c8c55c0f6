"""Attention to an int8 cache on every backend, within a bound of the reference that is derived for each output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops
from tests.support import cases
from tests.support.attention import Expected, assert_close, expected, problem
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal

DIMS = (1, 16, 63, 64, 80, 96, 100, 128, 129, 256)
#: Around a warp's 16 tokens and a block's 64, empty, and all.
LENGTHS = ([0, 1], [15, 16], [17, 63], [64, 65], [79, 80])


def run(backend: Backend, given: dict[str, Any]) -> Tensor:
    copies = {name: t.clone() if isinstance(t, Tensor) else t for name, t in given.items()}
    return ops.decode_attention_s8(**backend.move(copies))


def check(backend: Backend, **sizes: Any) -> Tensor:
    given = problem(**sizes)
    y = run(backend, given)
    assert y.dtype == given["q"].dtype and y.is_contiguous()
    assert_close(y, expected(given), str(sizes))
    return y


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_smoke_decode_attention(backend: Backend, dtype: torch.dtype) -> None:
    check(backend, dtype=dtype, lengths=[80, 33])
    check(
        backend, dtype=dtype, lengths=[70, 5], group=3, tokens=2, dim=100, smooth=True, rotation=4
    )
    check(backend, dtype=dtype, group=2, dim=128, static=True)
    check(backend, dtype=dtype, lengths=[70, 33], size=16, paged=5, rotation=64, window=40)


@pytest.mark.parametrize("dim", DIMS)
def test_every_head(backend: Backend, dim: int) -> None:
    rotation = dim & -dim if dim % 2 == 0 else 0
    for group, tokens in ((1, 1), (2, 5)):
        sizes: dict[str, Any] = {"dim": dim, "group": group, "tokens": tokens}
        check(backend, lengths=[80, 37], **sizes, smooth=True, rotation=rotation)
        check(backend, lengths=[80, 37], **sizes, static=True)


@pytest.mark.parametrize("group", [1, 3, 8, 9])
def test_every_number_of_queries(backend: Backend, group: int) -> None:
    for tokens in range(1, 9):
        check(backend, lengths=[80, 66], group=group, tokens=tokens, seed=tokens)
    check(backend, lengths=[80, 66], group=group, tokens=8, dim=256)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_every_length(backend: Backend, lengths: list[int], tokens: int) -> None:
    for options in ({}, {"static": True}, {"window": 7}, {"rotation": 64}):
        check(backend, lengths=lengths, tokens=tokens, **options)
    y = check(backend, lengths=[lengths[0], 0], tokens=tokens)
    assert not y[1].any(), "an empty sequence gives zeros"


@pytest.mark.parametrize("size", [1, 5, 16, 24, 64])
def test_blocks(backend: Backend, size: int) -> None:
    """Shuffled tables; behind the end they name no block, and blocks hold garbage."""
    entries = -(-150 // size)
    for seed, lengths in enumerate(([0, 150], [1, size], [size + 1, 64], [65, 129])):
        check(backend, lengths=lengths, size=size, paged=entries, seed=seed, group=2, dim=80)
        check(backend, lengths=lengths, size=size, paged=entries, tokens=3, static=True, window=20)


@pytest.mark.parametrize("size", [5, 17, 64])
def test_a_ring(backend: Backend, size: int) -> None:
    for length in (0, 1, size - 1, size, size + 1, 3 * size + 2, 2**31 - 400):
        for tokens in (1, min(4, size)):
            check(backend, lengths=[length, length // 2], size=size, ring=True, tokens=tokens)
        check(backend, lengths=[length, 2], size=size, ring=True, window=3, static=True)


def masks(batch: int, heads: int, tokens: int, columns: int) -> Tensor:
    return torch.rand(batch, heads, tokens, columns, generator=cases.generator(9)) < 0.6


@pytest.mark.parametrize("ring", [False, True], ids=["", "ring"])
def test_masks(backend: Backend, ring: bool) -> None:
    """Of all sequences and heads, or of one for all; strides; left padding; a query that sees nothing."""
    length = 200 if ring else 80
    for rows, heads in ((2, 4), (2, 1), (1, 4), (1, 1)):
        mask = masks(rows, heads, 3, 80)
        check(backend, lengths=[length, 61], group=2, tokens=3, mask=mask, ring=ring)
        check(backend, lengths=[length, 61], group=2, tokens=3, mask=mask, ring=ring, window=30)
    padding = torch.ones(2, 1, 1, 80, dtype=torch.bool)
    padding[0, ..., :70] = False
    padding[1] = False
    y = check(backend, lengths=[length, 61], mask=padding, ring=ring)
    assert not y[1].any()
    transposed = masks(80, 2, 6, 2).permute(3, 2, 1, 0)
    check(backend, lengths=[length, 61], group=3, tokens=2, mask=transposed, ring=ring)


def test_views(backend: Backend) -> None:
    """Queries [B, T, H, D], a cache whose blocks and heads have something between them, expanded lengths."""
    given = problem(lengths=[80, 80], group=2, tokens=3, dim=64)
    want = expected(given)
    moved = backend.move(given)
    moved["q"] = moved["q"].transpose(1, 2).contiguous().transpose(1, 2)
    moved["lengths"] = moved["lengths"][:1].expand(2)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        t = moved[name]
        wide = t.new_zeros(t.shape[0], t.shape[1] + 1, t.shape[2] + 3, *t.shape[3:])
        wide[:, 1:, 3:] = t
        moved[name] = wide[:, 1:, 3:]
    assert not moved["q"].is_contiguous()
    assert_close(ops.decode_attention_s8(**moved), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_not_finite_scales(backend: Backend, value: float) -> None:
    """They reach the queries that attend to the token, and no others."""
    for half in ("k", "v"):
        for token in (0, 40, 77, 79):
            given = problem(lengths=[80, 80], group=2, tokens=4)
            given[f"{half}_cache"][0, 1, token] = 0
            given[f"{half}_scale"][0, 1, token] = value
            want = expected(given)
            reached = 4 - max(0, token - 76)
            assert int((~want.y.isfinite()).any(-1).sum()) == 2 * reached
            assert_close(run(backend, given), want, f"{half} {token}")
            given["mask"] = torch.ones(1, 1, 4, 80, dtype=torch.bool)
            given["mask"][..., token] = False
            assert expected(given).y.isfinite().all()
            assert_close(run(backend, given), expected(given), f"{half} {token}, hidden")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_not_finite_queries(backend: Backend, value: float) -> None:
    for options in ({}, {"rotation": 64}, {"static": True}):
        given = problem(lengths=[80, 0], group=3, tokens=2, **options)
        given["q"][:, 1, 1, 5] = value
        want = expected(given)
        assert int((~want.y.isfinite()).any(-1).sum()) == 1
        assert_close(run(backend, given), want)


def test_scores_of_minus_infinity(backend: Backend) -> None:
    """A product with an infinite scale: weight 0 beside others, NaN if there is no other, as softmax has it."""
    given = problem(lengths=[80, 80])
    given["q"] = given["q"].abs().clamp(min=0.1)
    for token in (3, 50):
        given["k_cache"][0, 0, token] = -100
        given["k_scale"][0, 0, token] = float("inf")
    want = expected(given)
    assert want.y.isfinite().all()
    assert_close(run(backend, given), want)
    given["k_cache"][0, 0], given["k_scale"][0, 0] = -100, float("inf")
    want = expected(given)
    assert int(want.y.isnan().any(-1).sum()) == 1
    assert_close(run(backend, given), want)


def test_scales_beyond_float16(backend: Backend) -> None:
    """Weight times scale leaves float16's range on either side; one outlier that nobody attends to much."""
    for factor in (1e-30, 1e-9, 1e9, 1e30):
        given = problem(lengths=[80, 65], group=2, dtype=torch.float32)
        given["v_scale"] *= factor
        assert_close(run(backend, given), expected(given), str(factor))
    given = problem(lengths=[80, 65], group=2, dtype=torch.float32)
    given["v_scale"][..., 7] *= 1e6
    given["k_scale"][..., 7] *= 8
    given["k_cache"][..., 7, :] = 127
    given["q"] = -given["q"].abs()
    assert_close(run(backend, given), expected(given), "an outlier of little weight")
    given["k_scale"] *= 20  # only the largest score counts
    assert_close(run(backend, given), expected(given), "large scores")


@pytest.mark.parametrize("queries", [(2, 3), (3, 8)], ids=["narrow", "wide"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_tiles(backend: Backend, dim: int, queries: tuple[int, int]) -> None:
    """So many sequences and heads that a part of a sequence is longer than a ring of tiles."""
    group, tokens = queries
    sizes: dict[str, Any] = {"batch": 3, "heads": 4, "dim": dim, "group": group, "tokens": tokens}
    lengths = [600, 1, 499]
    check(backend, lengths=lengths, size=600, **sizes, rotation=64, smooth=True)
    check(backend, lengths=lengths, size=24, paged=25, **sizes, window=407)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_order_of_the_maxima(backend: Backend, dim: int) -> None:
    """Scores that grow or fall from token to token: the sums so far are rescaled at each step, or never."""
    for sign in (1, -1):
        size = 600
        given = problem(batch=4, heads=4, size=size, dtype=torch.float32, dim=dim)
        given["q"][:] = 1.0
        given["k_cache"][..., :dim] = 127
        steps = torch.arange(size) * 0.1 * sign  # of the scores
        given["k_scale"][:] = (steps - steps.min()) / (127 * dim * given["scale"])
        given["v_scale"] *= torch.logspace(-4, 4, size)[
            torch.randperm(size, generator=cases.generator(3))
        ]
        assert_close(run(backend, given), expected(given), str(sign))


def test_nothing_to_do(backend: Backend) -> None:
    nothing: tuple[dict[str, Any], ...] = (
        {"lengths": [80, 80], "tokens": 0},
        {"lengths": [], "batch": 0},
    )
    for sizes in nothing:
        given = problem(**sizes)
        assert run(backend, given).shape == given["q"].shape


@pytest.mark.parametrize("dim", [64, 256])
def test_many_splits(backend: Backend, dim: int) -> None:
    """One head of a long sequence; lengths with fewer chunks than splits, and one that fills them unevenly."""
    for length in (1, 64, 65, 500, 700):
        for tokens in (1, 3):
            sizes = {"batch": 1, "heads": 1, "size": 704, "dim": dim, "tokens": tokens}
            check(backend, lengths=[length], group=dim // 32, **sizes, rotation=64)


def test_the_same_bits_again(backend: Backend) -> None:
    given = problem(lengths=[700, 450], size=704, group=4, dim=128, smooth=True, rotation=128)
    first = run(backend, given)
    for _ in range(3):
        assert_bitwise_equal(run(backend, given), first, "again")


def test_the_bound_is_not_loose() -> None:
    """Defects of the size that a kernel could have are outside of the bound."""
    given = problem(lengths=[80, 80], group=2, tokens=2, dtype=torch.float32)
    want = expected(given)
    assert float((want.bound / want.y.abs().mean()).max()) < 0.02
    for wrong in (
        {"lengths": given["lengths"] - 1},
        {"scale": given["scale"] * 1.01},
        {"window": 79},
        {"v_scale": given["v_scale"].roll(1, -1)},
        {"k_scale": given["k_scale"].roll(1, 1)},
    ):
        y = expected({**given, **wrong}).y
        with pytest.raises(AssertionError, match="times the bound"):
            assert_close(y, Expected(want.y, want.bound))
