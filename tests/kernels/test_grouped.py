"""The ops for experts equal the reference bit for bit on every backend, and the loop that they replace."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal, count_result

#: The rows of each expert.
COUNTS: tuple[tuple[int, ...], ...] = (
    (0, 1, 7, 129),
    (0, 0, 33),
    (70,),
    (2, 2, 2, 2, 2, 2, 2, 2, 2),
)


def check(
    backend: Backend,
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    what: str = "",
) -> Tensor:
    """The operands are on the backend's device, in any layout. Returns y on the CPU."""
    operands = (x_q, w_q, x_scale, w_scale, offsets)
    found = ops.grouped_gemm_s8(*operands, rows=rows, bias=bias, out_dtype=dtype)
    on_cpu = [None if t is None else t.cpu() for t in (*operands, rows, bias)]
    expected = reference.grouped_gemm_s8(*on_cpu, dtype)  # type: ignore[arg-type]
    assert found.is_contiguous()
    assert_bitwise_equal(found, expected, what)
    count_result()
    return found.cpu()


def check_operands(
    backend: Backend, e: cases.ExpertGemm, case: dict[str, Any], what: str
) -> Tensor:
    """Checks a case of `cases.covering`, which chooses what the call leaves out and the types."""
    bias = case.get("bias", torch.float32)
    gather = case.get("gather", True)
    put = backend.put
    return check(
        backend,
        put(e.x_q if gather else e.x_q[e.rows.long()]),
        put(e.w_q),
        put(e.x_scale[: None if case.get("per_token", True) else 1]),
        put(e.w_scale),
        put(e.offsets),
        put(e.rows) if gather else None,
        None if bias is None else put(e.bias.to(bias)),
        dtype=case.get("dtype", torch.float16),
        what=f"{what} {case}",
    )


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_counts(backend: Backend, counts: tuple[int, ...]) -> None:
    for i, case in enumerate(
        cases.covering(
            9,
            sum(counts),
            dtype=cases.FLOATS,
            bias=(None, *cases.FLOATS),
            gather=(True, False),
            per_token=(True, True, False),
            n=(1, 7, 130),
            k=(1, 16, 32, 75),
            elsewhere=(0, 5),
        )
    ):
        e = cases.expert_operands(
            0, len(counts), case["n"], case["k"], choices=1, counts=counts, elsewhere=case["elsewhere"], seed=i
        )  # fmt: skip
        y = check_operands(backend, e, case, str(counts))
        assert not y[len(y) - case["elsewhere"] :].any()


@pytest.mark.parametrize("experts", [1, 3, 64, 256])
def test_numbers_of_experts(backend: Backend, experts: int) -> None:
    for i, tokens in enumerate((1, 17, 90)):
        e = cases.expert_operands(tokens, experts, 40, 48, seed=i, elsewhere=tokens // 3)
        check_operands(backend, e, {"dtype": cases.FLOATS[i]}, f"{experts} {tokens}")


@pytest.mark.parametrize("rows", [False, True])
def test_no_rows(backend: Backend, rows: bool) -> None:
    put = backend.put
    e = cases.expert_operands(4, 3, 5, 7)
    for x_q in (e.x_q, e.x_q[:0]) if rows else (e.x_q[:0],):
        y = check(
            backend,
            put(x_q), put(e.w_q), put(e.x_scale[:0] if rows else e.x_scale[:1]), put(e.w_scale),
            put(torch.zeros(4, dtype=torch.int32)), put(e.rows[:0]) if rows else None,
        )  # fmt: skip
        assert y.shape == (0, 5)


def test_no_expert_has_a_row(backend: Backend) -> None:
    e = cases.expert_operands(9, 4, 33, 20)
    for value in (0, 5, 18):
        offsets = torch.full_like(e.offsets, value)
        y = check_operands(backend, e._replace(offsets=offsets), {}, f"{value}")
        assert not y.any()


def test_rows_of_no_expert_are_zeros_whatever_their_scale(backend: Backend) -> None:
    for dtype in cases.FLOATS:
        e = cases.expert_operands(60, 3, 77, 64, elsewhere=40)
        offsets = e.offsets.clone()
        offsets[0] = min(3, int(offsets[1]))
        e.x_scale[: int(offsets[0])] = torch.nan
        e.x_scale[int(offsets[-1]) :] = torch.inf
        y = check_operands(backend, e._replace(offsets=offsets), {"dtype": dtype}, "")
        outside = torch.cat([y[: int(offsets[0])], y[int(offsets[-1]) :]])
        assert len(outside) > 40 and not outside.any()


def test_each_expert_is_a_gemm(backend: Backend) -> None:
    """The equivalence that the docstring states."""
    e = cases.expert_operands(50, 5, 65, 96)
    put = backend.put
    y = check_operands(backend, e, {"dtype": torch.bfloat16}, "")
    for i, (first, last) in enumerate(itertools.pairwise(e.offsets.tolist())):
        x_q = put(e.x_q[e.rows[first:last].long()])
        own = ops.gemm_s8(
            *(x_q, put(e.w_q[i]), put(e.x_scale[first:last]), put(e.w_scale[i])),
            bias=put(e.bias[i]), out_dtype=torch.bfloat16,
        )  # fmt: skip
        assert_bitwise_equal(own.cpu(), y[first:last], f"expert {i}")
        count_result()


def test_nonfinite_scales_stay_in_their_row_or_expert(backend: Backend) -> None:
    counts = (20, 3, 30)
    e = cases.expert_operands(0, 3, 70, 64, choices=1, counts=counts)
    e.x_scale[1], e.x_scale[40] = torch.nan, torch.inf
    e.w_scale[1, 5], e.w_scale[2, 69], e.bias[0, 33] = torch.nan, -torch.inf, torch.nan
    clear = torch.ones(53, 70, dtype=torch.bool)
    clear[1], clear[40], clear[20:23, 5], clear[23:, 69], clear[:20, 33] = (False,) * 5
    for dtype in cases.FLOATS:
        y = check_operands(backend, e, {"dtype": dtype}, "")
        finite = y.isfinite()
        assert bool((finite | ~clear).all())
        assert not finite[1].any() and not finite[20:23, 5].any() and not finite[:20, 33].any()


def test_signed_zeros_and_subnormals(backend: Backend) -> None:
    e = cases.expert_operands(30, 2, 40, 48)
    e.x_q[::3] = 0
    e.x_scale[:7] = torch.tensor([0.0, -0.0, 1e-40, 1e-20, -1e-3, 1e18, 1e-38])
    e.w_scale[:, :7] = e.x_scale[:7]
    for bias in (None, torch.float32):
        for zero in (0.0, -0.0):
            e.bias[:, ::2] = zero
            check_operands(backend, e, {"bias": bias, "dtype": torch.float32}, f"{zero}")


def test_the_largest_sums_of_an_expert(backend: Backend) -> None:
    k = reference.MAX_K
    x_q = torch.full((3, k), -128, dtype=torch.int8)
    w_q = torch.stack([x_q[:2], cases.random_int8(2, k, low=100)])
    ones, offsets = torch.ones(1), torch.tensor([0, 1, 3]).int()
    operands = (x_q, w_q, ones, torch.ones(2, 2), offsets)
    y = check(backend, *map(backend.put, operands), dtype=torch.float32)
    assert float(y.abs().min()) > 1.6e9


def test_any_layout_of_the_operands(backend: Backend) -> None:
    """Views with other numbers around them. The op copies those that the kernels cannot read."""
    n, k = 20, 48
    e = cases.expert_operands(17, 3, n, k)
    rows = len(e.rows)

    def within(t: Tensor, *places: slice) -> Tensor:
        """A copy of `t` at these places of a larger tensor."""
        sizes = [
            (p.stop or size) * 2 * (p.step or 1) + 4
            for p, size in zip(places, t.shape, strict=True)
        ]
        wide = backend.put(torch.full(sizes, 77, dtype=t.dtype))
        view = wide[places]
        view = view[tuple(slice(0, size) for size in t.shape)]
        view.copy_(t)
        return view

    every = slice(0, None)
    layouts = {
        "x_q": (within(e.x_q, every, slice(16, None)), within(e.x_q, every, slice(3, None)),
                within(e.x_q, slice(0, None, 2), slice(0, None, 3)), within(e.x_q.T, every, every).T),
        "w_q": (within(e.w_q, every, every, slice(16, None)), within(e.w_q, every, slice(1, None), slice(1, None)),
                within(e.w_q, slice(0, None, 2), every, every),
                within(e.w_q.transpose(0, 2), every, every, every).transpose(0, 2),
                backend.put(e.w_q[:1]).expand(3, n, k), backend.put(e.w_q[:, :1]).expand(3, n, k)),
        "x_scale": (within(e.x_scale, slice(1, None, 2)), backend.put(e.x_scale[:1]).expand(rows)),
        "w_scale": (within(e.w_scale, every, slice(1, None)), within(e.w_scale.T, every, every).T),
        "offsets": (within(e.offsets, slice(1, None, 3)),),
        "rows": (within(e.rows, slice(1, None, 3)),),
        "bias": (within(e.bias, every, slice(3, None)), within(e.bias.half().T, every, every).T),
    }  # fmt: skip
    plain = {name: backend.put(getattr(e, name)) for name in layouts}
    for name, views in layouts.items():
        for i, view in enumerate(views):
            assert view.shape == plain[name].shape
            check(backend, *{**plain, name: view}.values(), what=f"{name} {i}")


# --- combine_experts --------------------------------------------------------------------------------


def check_sum(backend: Backend, y: Tensor, position: Tensor, weights: Tensor, what: str) -> Tensor:
    found = ops.combine_experts(y, position, weights)
    expected = reference.combine_experts(y.cpu(), position.cpu(), weights.cpu())
    assert found.is_contiguous()
    assert_bitwise_equal(found, expected, what)
    count_result()
    return expected


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_combine(backend: Backend, dtype: torch.dtype) -> None:
    for i, case in enumerate(
        cases.covering(
            15,
            cases.FLOATS.index(dtype),
            tokens=(0, 1, 7, 33),
            choices=(1, 2, 6),
            n=(1, 7, 64, 130, 2100),
            weights=cases.FLOATS,
        )
    ):
        tokens, choices, n = case["tokens"], case["choices"], case["n"]
        e = cases.expert_operands(tokens, 5, 1, 1, choices=choices, seed=i)
        y = backend.put(cases.activations(max(len(e.rows), 1), n, dtype, seed=i))
        weights = backend.put(e.weights.to(case["weights"]))
        check_sum(backend, y, backend.put(e.position), weights, f"{case}")


def test_any_layout_of_a_sum(backend: Backend) -> None:
    e = cases.expert_operands(9, 3, 1, 1)
    base = backend.put(cases.activations(2 * 18, 3 * 40, torch.float16))
    position, weights = backend.put(e.position), backend.put(e.weights)
    for name, y in {
        "narrowed, aligned": base[:18, 8:48],
        "narrowed": base[:18, 3:43],
        "every second row": base[::2, :40],
        "strided": base[:18, 1::3],
        "transposed": base.T[:18],
        "expanded": base[:1, :40].expand(18, 40),
        "one channel": base[:18, 5:6],
    }.items():
        check_sum(backend, y, position, weights, name)
    y = base[:18, :40]
    turned = position.T.contiguous().T, weights.T.contiguous().T
    check_sum(backend, y, *turned, "transposed choices")


def test_nonfinite_results_stay_in_their_token(backend: Backend) -> None:
    e = cases.expert_operands(12, 3, 1, 1)
    y = cases.activations(24, 33)
    y[3, 4], y[5] = torch.inf, torch.nan
    weights = e.weights.clone()
    weights[0, 0], weights[1, 1] = torch.inf, 0
    check_sum(backend, backend.put(y), backend.put(e.position), backend.put(weights), "")
