"""The W4A8 GEMM and layer equal the reference bit for bit: every number of tokens, layout, edge and size of K."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases
from tests.support.backends import Backend
from tests.support.cases import W4Gemm
from tests.support.compare import assert_bitwise_equal, count_result

#: M below and above the largest that takes the values in place, and of more than one block of rows.
TOKENS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40, 65, 257)
#: (N, K): one column and channel, K around a group and an odd number of groups, N around a panel.
SHAPES = ((1, 1), (3, 127), (33, 128), (50, 129), (48, 200), (97, 256), (130, 385), (7, 576))
OTHER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float16,
    torch.float32: torch.bfloat16,
}


def check(
    backend: Backend,
    x_q: Tensor,
    w_q4: Tensor,
    w_group: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    what: str = "",
) -> Tensor:
    """The operands are on the backend's device, in any layout. Returns y on the CPU."""
    arguments = (x_q, w_q4, w_group, x_scale, w_scale)
    found = ops.gemm_w4a8(*arguments, bias=bias, residual=residual, out_dtype=dtype)
    on_cpu = [None if t is None else t.cpu() for t in (*arguments, bias, residual)]
    expected = reference.gemm_w4a8(*on_cpu, dtype)  # type: ignore[arg-type]
    assert found.is_contiguous()
    assert_bitwise_equal(found, expected, what)
    count_result()
    return expected


def on_device(backend: Backend, gemm: W4Gemm) -> W4Gemm:
    return W4Gemm(*map(backend.put, gemm))


def check_case(backend: Backend, gemm: W4Gemm, case: dict[str, Any], what: str) -> None:
    """Checks a case of `cases.covering`, which chooses the types, the scales and what is added."""
    dtype: torch.dtype = case["dtype"]
    bias, residual = case["added"]
    types = {"same": dtype, "other": OTHER[dtype]}
    check(
        backend,
        *map(backend.put, gemm[:3]),
        backend.put(gemm.x_scale[: None if case["per_token"] else 1]),
        backend.put(gemm.w_scale[: None if case["per_channel"] else 1]),
        None if bias is None else backend.put(gemm.bias.to(bias)),
        None if residual is None else backend.put(gemm.residual.to(types[residual])),
        dtype=dtype,
        what=f"{what} {case}",
    )


@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens(backend: Backend, m: int) -> None:
    added = list(product((None, torch.float32, torch.bfloat16), (None, "same", "other")))
    for i, case in enumerate(
        cases.covering(
            9,
            m,
            dtype=cases.FLOATS,
            added=added,
            per_token=(True, False),
            per_channel=(True, False),
            shape=SHAPES,
        )
    ):
        n, k = case.pop("shape")
        check_case(backend, cases.w4_operands(m, n, k, seed=i), case, f"{m} {n} {k}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: Backend, shape: tuple[int, int]) -> None:
    for m, dtype in zip((1, 2, 6, 20, 70), (*cases.FLOATS, *cases.FLOATS), strict=False):
        gemm = on_device(backend, cases.w4_operands(m, *shape, seed=m))
        check(backend, *gemm, dtype=dtype, what=f"{m} {shape}")


@pytest.mark.parametrize("m", [1, 4, 12, 70])
def test_a_k_of_several_parts(backend: Backend, m: int) -> None:
    """More channels than any kernel multiplies at a time, with a last group that is alone and not whole."""
    for k in (4096 + 129, 16384 + 100):
        check(backend, *on_device(backend, cases.w4_operands(m, 21, k)), what=f"{m} {k}")


@pytest.mark.parametrize("m", [1, 3, 20])
def test_the_largest_integer_sums(backend: Backend, m: int) -> None:
    """Products with the steps alone go beyond 2^31, and the offsets bring them back."""
    n, k = 5, reference.MAX_K
    groups = reference.w4_groups(k)
    ones = backend.put(torch.ones(1))
    w_q4 = torch.full((n, 64 * groups), 0xFF, dtype=torch.uint8)
    for x, offset in ((-128, -98), (127, -98), (-128, -128), (127, -128)):
        w_group = torch.tensor([15, offset], dtype=torch.int8).expand(groups, n, 2)
        x_q = torch.full((m, k), x, dtype=torch.int8)
        operands = map(backend.put, (x_q, w_q4, w_group))
        y = check(backend, *operands, ones, ones, dtype=torch.float32, what=f"{x} {offset}")
        assert bool((y == torch.tensor(x * (225 + offset) * k).float()).all())
    zeros = torch.zeros_like(w_q4)
    w_group = torch.tensor([15, -128], dtype=torch.int8).expand(groups, n, 2)
    x_q = torch.full((m, k), -128, dtype=torch.int8)
    operands = map(backend.put, (x_q, zeros, w_group))
    y = check(backend, *operands, ones, ones, dtype=torch.float32, what="zeros")
    assert float(y.min()) > 2.1e9


@pytest.mark.parametrize("m", [2, 20])
def test_values_beyond_k_count_as_zero(backend: Backend, m: int) -> None:
    """Whatever lies in the rest of the last group, and after a row of x in memory."""
    for k in (1, 60, 64, 100, 190):
        g = cases.w4_operands(m, 9, k)
        w_q4 = reference.pack_w4(reference.unpack_w4(g.w_q4, k))
        filled = g.w_q4.clone()
        padding = reference.pack_w4(torch.full((9, k), 15)) == 0xFF
        filled[:, ~padding[0]] |= (reference.pack_w4(torch.full((9, k), 15)) ^ 0xFF)[:, ~padding[0]]
        wide = backend.put(torch.full((m, k + 300), 127, dtype=torch.int8))
        wide[:, :k] = backend.put(g.x_q)
        expected = reference.gemm_w4a8(g.x_q, w_q4, *g[2:])
        for name, packed in (("zeros", w_q4), ("random", g.w_q4), ("ones", filled)):
            rest = (backend.put(packed), *map(backend.put, g[2:]))
            y = check(backend, wide[:, :k], *rest, what=f"{k} {name}")
            assert_bitwise_equal(y, expected, f"{k} {name}")


@pytest.mark.parametrize("m", [3, 40])
def test_any_layout(backend: Backend, m: int) -> None:
    """Views into buffers with other numbers around them."""
    n, k = 37, 300
    g = on_device(backend, cases.w4_operands(m, n, k))
    width = g.w_q4.shape[1]
    bytes_of = backend.put(torch.full((2 * n, 2 * width + 3), 0xA5, dtype=torch.uint8))
    for name, view in (
        ("narrowed, aligned", bytes_of[:n, 16 : 16 + width]),
        ("narrowed", bytes_of[:n, 3 : 3 + width]),
        ("every second row", bytes_of[::2, :width]),
        ("strided", bytes_of[:n, : 2 * width : 2]),
        ("transposed", backend.put(torch.zeros(width, n, dtype=torch.uint8)).t()),
    ):
        view.copy_(g.w_q4)
        check(backend, g.x_q, view, *g[2:], what=f"w_q4 {name}")
        bytes_of.fill_(0xA5)
    row = g.w_q4[:1].expand(n, width)
    check(backend, g.x_q, row, *g[2:], what="w_q4 expanded")

    groups = len(g.w_group)
    wide = backend.put(torch.full((groups, n + 3, 5), 77, dtype=torch.int8))
    odd = wide.view(-1)[1 : 1 + 2 * groups * n].view(groups, n, 2)
    for name, view in (
        ("narrowed", wide[:, 2 : 2 + n, 1:3]),
        ("strided", wide[:, :n, ::3]),
        ("unaligned", odd),
        ("permuted", backend.put(torch.zeros(n, 2, groups, dtype=torch.int8)).permute(2, 0, 1)),
    ):
        view.copy_(g.w_group)
        check(backend, *g[:2], view, *g[3:], what=f"w_group {name}")
        wide.fill_(77)
    pair = g.w_group[:1, :1].expand(groups, n, 2)
    check(backend, *g[:2], pair, *g[3:], what="w_group expanded")

    base = backend.put(cases.random_int8(2 * m, 2 * k))
    for name, x_q in (
        ("narrowed", base[:m, 5 : 5 + k]),
        ("strided", base[::2, ::2]),
        ("deep", base.view(2, m, 2 * k)[:, :, :k][:1]),
        ("vector", base[1, :k]),
    ):
        residual = g.residual[0].expand(*x_q.shape[:-1], n)
        scale = g.x_scale[: x_q[..., 0].numel()]
        y = check(backend, x_q, *g[1:3], scale, g.w_scale, g.bias, residual, what=f"x_q {name}")
        assert y.shape == (*x_q.shape[:-1], n)


@pytest.mark.parametrize("m", [4, 40])
def test_nonfinite_values_stay_in_their_row_or_column(backend: Backend, m: int) -> None:
    g = cases.w4_operands(m, 70, 130)
    rows, columns = (1, m - 1), (3, 42, 69)
    g.x_scale[rows[0]], g.x_scale[rows[1]] = torch.nan, torch.inf
    g.w_scale[columns[0]], g.w_scale[columns[1]], g.bias[columns[2]] = torch.nan, -torch.inf, torch.nan  # fmt: skip
    g.residual[2, 20], g.residual[0, 21] = torch.inf, torch.nan
    clear = torch.ones(m, 70, dtype=torch.bool)
    clear[list(rows)], clear[:, list(columns)], clear[2, 20], clear[0, 21] = (False,) * 4
    for dtype in cases.FLOATS:
        y = check(backend, *on_device(backend, g), dtype=dtype)
        assert bool((y.isfinite() == clear).all())


def test_zero_rows_groups_and_steps(backend: Backend) -> None:
    g = cases.w4_operands(6, 40, 300)
    g.x_q[::2] = 0
    g.w_group[:, ::3, 0] = 0
    g.w_group[1] = 0
    for dtype in cases.FLOATS:
        y = check(backend, *on_device(backend, g)[:5], dtype=dtype)
        assert not y[::2].any()


# --- the whole layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [0, 1, 2, 5, 9, 17, 65])
def test_linear(backend: Backend, m: int) -> None:
    """Also with NaN, Inf and zeros in some tokens."""
    for i, case in enumerate(
        cases.covering(
            12,
            m,
            dtype=cases.FLOATS,
            scheme=("token", "tensor", "static"),
            smooth=(True, False),
            bias=(True, False),
            residual=(True, False),
            shape=((33, 100), (50, 256), (7, 648), (130, 72)),
            rotation=(0, 4),
            special=(False, True),
        )
    ):
        (n, k), dtype = case["shape"], case["dtype"]
        x = cases.activations(m, k, dtype, seed=i)
        if case["special"] and m > 2:
            x[0], x[1, 3], x[2, -1] = 0, torch.nan, -torch.inf
        g = cases.w4_operands(m, n, k, seed=i)
        smooth = cases.inverse_smooth(k, i) if case["smooth"] else None
        options = {**cases.quantize_options(case["scheme"]), "inv_smooth": smooth}
        options["rotation"] = case["rotation"]
        x_q, x_scale = reference.quantize(x, **options)
        bias = g.bias.to(dtype) if case["bias"] else None
        residual = g.residual.to(OTHER[dtype]) if case["residual"] else None
        expected = reference.gemm_w4a8(
            x_q, g.w_q4, g.w_group, x_scale, g.w_scale, bias, residual, dtype
        )
        added = {"bias": bias, "residual": residual}
        found = ops.linear_w4a8(
            *map(backend.put, (x, g.w_q4, g.w_group, g.w_scale)),
            **backend.move({**options, **added}),
        )
        assert_bitwise_equal(found, expected, f"{m} {case}")
        count_result()


def test_a_layer_equals_quantize_and_gemm(backend: Backend) -> None:
    """Blocks of rows that are packed one after the other, and a view of x."""
    n, k = 40, 1100
    g = on_device(backend, cases.w4_operands(300, n, k))
    wide = backend.put(cases.activations(600, k + 7, torch.float16))
    x = wide[::2, 3 : 3 + k]
    x_q, x_scale = ops.quantize(x)
    y = check(backend, x_q, *g[1:3], x_scale, g.w_scale, g.bias, g.residual)
    found = ops.linear_w4a8(x, *g[1:3], g.w_scale, bias=g.bias, residual=g.residual)
    assert_bitwise_equal(found, y)
    count_result()
