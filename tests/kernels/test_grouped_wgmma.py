"""Hopper's GEMM by experts through its C entry: every tile, where rows and experts begin and end, and bad offsets."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.kernels.test_gemm_c_entry import Output, with_garbage, workspace_of
from tests.support import c_gemm, c_grouped, cases
from tests.support.backends import Backend
from tests.support.c_grouped import Tile
from tests.support.c_interface import (
    INVALID_ARGUMENT,
    SUCCESS,
    UNSUPPORTED_SHAPE,
    WORKSPACE_TOO_SMALL,
)
from tests.support.compare import assert_bitwise_equal, count_result

TILES = c_grouped.wgmma_tiles()
#: Rows of each expert.
COUNTS = (
    (0, 1, 7, 129),
    (3,),
    (0, 70, 0),
    (0, 0, 20, 0, 0),
    tuple(e % 4 for e in range(64)),
    (16, 64, 128, 17),
)


@pytest.fixture(params=TILES, ids=lambda tile: tile.name)
def own(request: pytest.FixtureRequest) -> Tile:
    found: Tile = request.param
    return found


@pytest.fixture
def hopper(compiled: Backend, library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, on a GPU with wgmma."""
    if not c_gemm.current_device(library).wgmma:
        pytest.skip("no wgmma on this GPU")
    return c_grouped.declare(library)


def matrices_with_garbage(backend: Backend, t: Tensor, extra: int) -> Tensor:
    """`with_garbage` for [experts, n, k], with `extra` rows of garbage between experts."""
    experts, n, k = t.shape
    rows = torch.full((experts, n + extra, k), 77, dtype=torch.int8)
    rows[:, :n] = t
    flat = with_garbage(backend, rows.flatten(0, 1)[: experts * (n + extra) - extra], extra)
    stride = flat.stride(0)
    return flat.as_strided((experts, n, k), ((n + extra) * stride, stride, 1))


class Problem:
    """Operands on the backend's device, and the expected result."""

    def __init__(
        self,
        backend: Backend,
        counts: Sequence[int],
        n: int,
        k: int,
        *,
        head: int = 0,
        tail: int = 0,
        gathered: bool = False,
        bias: bool = True,
        per_token: bool = True,
        dtype: torch.dtype = torch.float16,
        aligned: bool = True,
        extra: int = 0,
    ) -> None:
        m, experts = head + sum(counts) + tail, len(counts)
        offsets = torch.tensor([*itertools.accumulate(counts, initial=head)], dtype=torch.int32)
        x_rows = m // 2 + 1 if gathered else m
        weights = [cases.gemm_operands(1, n, k, seed=7 * e) for e in range(experts)]
        x = cases.gemm_operands(x_rows, 1, k).x_q
        w_q = torch.stack([w.w_q for w in weights])
        w_scale = torch.stack([w.w_scale for w in weights])
        added = torch.stack([w.bias for w in weights]) if bias else None
        x_scale = cases.gemm_operands(m, 1, 1, seed=1).x_scale[: None if per_token else 1]
        rows = None
        if gathered:
            g = cases.generator(3)
            rows = torch.randint(0, x_rows, (m,), generator=g, dtype=torch.int32)
        arguments = (x, w_q, x_scale, w_scale, offsets, rows, added, dtype)
        self.expected = reference.grouped_gemm_s8(*arguments)
        self.backend, self.experts, self.m = backend, experts, m
        self.x, self.w_q = (
            with_garbage(backend, x, extra),
            matrices_with_garbage(backend, w_q, extra),
        )
        self.x_scale, self.w_scale, self.offsets = map(backend.put, (x_scale, w_scale, offsets))
        self.rows = None if rows is None else backend.put(rows)
        self.bias = None if added is None else backend.put(added)
        self.output = Output(backend, m, n, dtype, aligned)

    def params(self, tile: int = -1) -> c_grouped.Params:
        return c_grouped.params_of(
            *(self.x, self.w_q, self.x_scale, self.w_scale, self.offsets, self.output.y),
            rows=self.rows,
            bias=self.bias,
            tile=tile,
        )

    def check(self, library: ctypes.CDLL, tile: Tile, what: object = "") -> None:
        assert run(library, self.backend, self.params(tile.row)) == SUCCESS
        self.output.check(self.expected, f"{tile.name} {what}")


def run(library: ctypes.CDLL, backend: Backend, params: c_grouped.Params, **memory: Any) -> int:
    """Runs the kernels with a workspace of exactly the required size. Returns the status."""
    status, plan = c_grouped.plan(library, params)
    if status != SUCCESS:
        return status
    with workspace_of(backend, params, max(plan.workspace_bytes, 1), **memory):
        status = library.sqk_grouped_gemm_s8(byref(params), None)
        if backend.device == "cuda":
            torch.cuda.synchronize()
    return status


# --- equal to the reference -------------------------------------------------------------------------


@pytest.mark.parametrize("gathered", [False, True])
def test_smoke_grouped_wgmma(
    compiled: Backend, hopper: ctypes.CDLL, own: Tile, gathered: bool
) -> None:
    problem = Problem(compiled, (1, 0, 19, 4), 35, 300, head=2, tail=3, gathered=gathered)
    problem.check(hopper, own)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_every_tile(compiled: Backend, hopper: ctypes.CDLL, own: Tile, dtype: torch.dtype) -> None:
    for case in cases.covering(
        6,
        cases.FLOATS.index(dtype) + 3 * own.row,
        counts=COUNTS,
        n=(1, 7, 35, own.n, own.n + 1, own.n - 2),
        k=(1, 100, 128, 129, 300, 16),
        head=(0, 3),
        tail=(0, 20, 1),
        gathered=(False, True),
        bias=(True, False),
        per_token=(True, True, False),
        aligned=(True, False),
        extra=(0, 1, 2),
    ):
        Problem(compiled, dtype=dtype, **case).check(hopper, own, case)


def test_the_ring_goes_on_from_tile_to_tile(
    compiled: Backend, hopper: ctypes.CDLL, own: Tile
) -> None:
    """A block computes tiles of several experts, which begin and end anywhere in the ring."""
    blocks = c_gemm.current_device(hopper).sms
    for steps in (1, 2, own.stages + 1):
        counts = [1 + e % 3 for e in range(2 * blocks + 1)]
        problem = Problem(compiled, counts, 9, 128 * steps - 5, tail=1)
        problem.check(hopper, own, steps)


def test_tiles_in_groups_along_m(compiled: Backend, hopper: ctypes.CDLL, own: Tile) -> None:
    """More than 2048 tokens of one expert: the last group of tiles is smaller."""
    problem = Problem(compiled, (1, 2048 + own.m + 1, 2), 2 * own.n + 1, 20)
    problem.check(hopper, own)


def test_most_experts(compiled: Backend, hopper: ctypes.CDLL, own: Tile) -> None:
    counts = [int(e in (0, 511, 1023)) for e in range(1024)]
    Problem(compiled, counts, 3, 17, head=1).check(hopper, own)


def test_experts_without_rows(compiled: Backend, hopper: ctypes.CDLL, own: Tile) -> None:
    """All of y is zeros."""
    for head, tail, gathered in ((0, 5, False), (5, 0, True), (3, 4, False)):
        problem = Problem(compiled, (0, 0), 20, 40, head=head, tail=tail, gathered=gathered)
        assert not problem.expected.any()
        problem.check(hopper, own, (head, tail))


def test_equal_to_the_gemm_of_each_expert(
    compiled: Backend, hopper: ctypes.CDLL, own: Tile
) -> None:
    problem = Problem(compiled, (5, 18, 2), 70, 260, dtype=torch.float32)
    assert run(hopper, compiled, problem.params(own.row)) == SUCCESS
    bounds = problem.offsets.tolist()
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        assert problem.bias is not None
        single = ops.gemm_s8(
            *(problem.x[first:last], problem.w_q[e], problem.x_scale[first:last]),
            problem.w_scale[e],
            bias=problem.bias[e],
            out_dtype=torch.float32,
        )
        assert_bitwise_equal(problem.output.y[first:last], single, f"{own.name} {e}")
        count_result()


def test_scales_that_are_not_finite(compiled: Backend, hopper: ctypes.CDLL, own: Tile) -> None:
    """They stay in their row and their channel."""
    problem = Problem(compiled, (2, 5), 12, 50)
    problem.x_scale[1], problem.x_scale[4] = float("nan"), float("inf")
    problem.w_scale[1, 3] = float("-inf")
    cpu = [
        t.cpu() for t in (problem.x, problem.w_q, problem.x_scale, problem.w_scale, problem.offsets)
    ]
    assert problem.bias is not None
    problem.expected = reference.grouped_gemm_s8(*cpu, bias=problem.bias.cpu())
    problem.check(hopper, own)


def test_one_row_may_have_any_stride(compiled: Backend, hopper: ctypes.CDLL, own: Tile) -> None:
    for counts, n in (((1,), 1), ((1, 0, 0), 1), ((5,), 20), ((0, 1), 5)):
        problem = Problem(compiled, counts, n, 100)
        params = problem.params(own.row)
        if problem.m == 1:
            params.x_q_stride, params.y_stride = 1, 0
        if n == 1:
            params.w_q_stride = 3
        if len(counts) == 1:
            params.w_q_expert_stride = -5
        assert run(hopper, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{own.name} {counts} {n}")


@pytest.mark.parametrize("counts", [(2, 0, 3), (40, 50), (100,), (300, 1)], ids=str)
def test_the_op(compiled: Backend, hopper: ctypes.CDLL, counts: tuple[int, ...]) -> None:
    """The op takes the row that the plan chooses, and 4 rows fit these means of 16, 64, 128 and more."""
    g = cases.expert_operands(0, len(counts), 131, 200, counts=counts, choices=1, elsewhere=4)
    put = compiled.put
    for rows in (g.rows, None):
        x = g.x_q if rows is not None else g.x_q[g.rows.long()]
        given = (x, g.w_q, g.x_scale, g.w_scale, g.offsets)
        found = ops.grouped_gemm_s8(
            *map(put, given), rows=None if rows is None else put(rows), bias=put(g.bias)
        )
        assert_bitwise_equal(found, reference.grouped_gemm_s8(*given, rows, g.bias), str(counts))
        count_result()


@pytest.mark.parametrize("gathered", [False, True])
def test_a_chain_of_kernels(
    compiled: Backend, hopper: ctypes.CDLL, own: Tile, gathered: bool
) -> None:
    """The kernel before writes x_q and x_scale; the GEMM may start before it has ended (tests/csrc/test_overlap.py)."""
    m, k = 40, 300
    problem = Problem(compiled, (3, 0, 30), 35, k, tail=7, gathered=gathered)
    x = cases.activations(m, k, torch.float16)
    x_q, x_scale = reference.quantize(x)
    rows = None if problem.rows is None else problem.rows.cpu()
    given = (problem.w_q.cpu(), x_scale, problem.w_scale.cpu(), problem.offsets.cpu(), rows)
    assert problem.bias is not None
    expected = reference.grouped_gemm_s8(x_q, *given, problem.bias.cpu())
    x = compiled.put(x)
    for turn in range(2):
        found, problem.x_scale = ops.quantize(x, k_multiple=16)
        problem.x = found[:, :k]
        assert run(hopper, compiled, problem.params(own.row)) == SUCCESS
        problem.output.check(expected, f"{own.name}, turn {turn}")


# --- nothing outside the arrays ---------------------------------------------------------------------

BAD = 2**31 - 1


@pytest.mark.parametrize(
    "offsets",
    [
        (0, 40, 3, 40, 0),
        (-5, -3, 10, 20, 30),
        (BAD, BAD, BAD, BAD, BAD),
        (-BAD, BAD, -BAD, BAD, -BAD),
        (30, 20, 10, 5, 0),
        (0, 10, 20, 30, 1000),
        (7, -1, 41, 39, 40),
    ],
    ids=str,
)
def test_bad_offsets_stay_inside(
    compiled: Backend, hopper: ctypes.CDLL, own: Tile, offsets: tuple[int, ...]
) -> None:
    """The simulator stops at any access outside of an array, and the garbage around y stays."""
    for gathered in (False, True):
        problem = Problem(compiled, (10, 10, 10, 10), 35, 100, gathered=gathered)
        assert problem.m == 40
        problem.offsets.copy_(torch.tensor(offsets, dtype=torch.int32))
        if problem.rows is not None:
            problem.rows[::3], problem.rows[1::3] = -BAD, BAD
        assert run(hopper, compiled, problem.params(own.row)) == SUCCESS
        problem.output.y.fill_(77)
        problem.output.check_untouched()


def test_offsets_out_of_range_are_clamped(
    compiled: Backend, hopper: ctypes.CDLL, own: Tile
) -> None:
    problem = Problem(compiled, (10, 0, 20), 35, 100)
    problem.offsets[0], problem.offsets[-1] = -9, BAD
    problem.check(hopper, own)


# --- plans and statuses -----------------------------------------------------------------------------


def test_the_plan_chooses_by_the_mean(compiled: Backend, hopper: ctypes.CDLL) -> None:
    by_row = {tile.row: tile for tile in TILES}
    # More than 16 rows in all, which a streaming kernel would take.
    for rows, m in ((6, 16), (16, 16), (17, 64), (64, 64), (65, 128), (128, 128), (129, 128)):
        params = c_grouped.Params(
            m=3 * rows, x_rows=3 * rows, n=8, k=8, experts=3, x_q_stride=16, w_q_stride=16,
            w_q_expert_stride=128, y_stride=8, y_dtype=1, tile=-1,
        )  # fmt: skip
        status, plan = c_grouped.plan(hopper, params)
        assert status == SUCCESS and by_row[plan.tile].m == m, rows
        assert plan.launches == 1 and plan.workspace_bytes == 0
        params.rows, params.x_rows = 4096, 2
        status, plan = c_grouped.plan(hopper, params)
        assert status == SUCCESS and plan.launches == 2
        assert plan.workspace_bytes == 3 * rows * 128


def test_weights_without_a_map(compiled: Backend, hopper: ctypes.CDLL, own: Tile) -> None:
    """A distance between experts that is no multiple of that between channels: other kernels serve."""
    problem = Problem(compiled, (3, 4), 5, 40, extra=1)
    wide = compiled.put(torch.zeros(2, 6 * 64 + 16, dtype=torch.int8))
    w_q = wide.as_strided((2, 5, 40), (wide.stride(0), 64, 1))
    w_q.copy_(problem.w_q)
    problem.w_q = w_q
    assert c_grouped.plan(hopper, problem.params(own.row))[0] == UNSUPPORTED_SHAPE
    status, plan = c_grouped.plan(hopper, problem.params())
    assert status == SUCCESS and plan.tile not in [row.row for row in TILES]
    assert run(hopper, compiled, problem.params()) == SUCCESS
    problem.output.check(problem.expected, own.name)


def test_statuses(compiled: Backend, hopper: ctypes.CDLL, own: Tile) -> None:
    """A refused call must not launch."""
    problem = Problem(compiled, (3, 4), 20, 64, gathered=True)
    params = problem.params(own.row)
    size = c_grouped.plan(hopper, params)[1].workspace_bytes
    with workspace_of(compiled, params, size):
        params.workspace_bytes -= 1
        assert hopper.sqk_grouped_gemm_s8(byref(params), None) == WORKSPACE_TOO_SMALL
        params.workspace_bytes += 1
        kept, params.workspace = params.workspace, None
        assert hopper.sqk_grouped_gemm_s8(byref(params), None) == INVALID_ARGUMENT
        problem.output.check_untouched()
        params.workspace = kept
        for _ in range(2):  # what the last launch left in the workspace does not matter
            assert hopper.sqk_grouped_gemm_s8(byref(params), None) == SUCCESS
            problem.output.check(problem.expected, own.name)
    empty = c_grouped.Params(
        n=8, k=8, experts=2, w_q_stride=16, w_q_expert_stride=128, y_dtype=1, tile=own.row
    )
    assert hopper.sqk_grouped_gemm_s8(byref(empty), None) == SUCCESS
