"""The C entries for experts: every tile, operands that end with their memory, values out of range, and statuses."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.kernels.test_gemm_c_entry import POISON, Output, with_garbage
from tests.support import c_gemm, c_grouped, cases
from tests.support.backends import Backend
from tests.support.c_interface import INVALID_ARGUMENT, SUCCESS, UNSUPPORTED_SHAPE
from tests.support.compare import assert_bitwise_equal, count_result

#: The rows of each expert: none, one, below, at and above the edges of tiles; all rows in one; more experts than rows;
#: several experts to a lane.
COUNTS: tuple[tuple[int, ...], ...] = (
    (0, 1, 7, 129),
    (5,),
    (16, 64, 128, 0),
    (0, 0, 65, 0),
    (130, 17),
    tuple(i % 3 for i in range(70)),
)


@pytest.fixture(scope="module")
def entries(library: ctypes.CDLL) -> ctypes.CDLL:
    return c_grouped.declare(library)


def cubes_with_garbage(backend: Backend, t: Tensor, extra: int) -> Tensor:
    """A copy of [experts, n, k] int8 with garbage between rows and experts. Its memory ends with its last byte."""
    experts, n, k = t.shape
    stride = (-(-k // c_gemm.ALIGNMENT) + extra) * c_gemm.ALIGNMENT
    of_expert = (n + extra) * stride
    size = (experts - 1) * of_expert + (n - 1) * stride + k
    view = backend.put(torch.full((size,), POISON, dtype=torch.int8))
    view = view.as_strided((experts, n, k), (of_expert, stride, 1))
    view.copy_(t)
    return view


class Problem:
    """Operands on the backend's device, and the expected result.

    Rows before the first expert and after the last one have scales that are not finite; the kernels must not read them
    into their zeros.
    """

    def __init__(
        self, backend: Backend, case: dict[str, Any], dtype: torch.dtype, seed: int = 0
    ) -> None:
        counts: Sequence[int] = case["counts"]
        head, tail = case.get("around", (0, 0))
        n, k, experts = case["n"], case["k"], len(counts)
        self.m = m = head + sum(counts) + tail
        g = cases.generator(seed)
        x_rows = max(1, 2 * m // 3) if case.get("gather") else m
        x_q = cases.gemm_operands(x_rows, 1, k, seed=seed).x_q
        weights = cases.gemm_operands(1, experts * n, k, seed=seed + 1)
        w_q = weights.w_q.view(experts, n, k)
        w_scale, bias = weights.w_scale.view(experts, n), weights.bias.view(experts, n)
        x_scale = cases.gemm_operands(m if case.get("per_token", True) else 1, 1, k).x_scale
        if len(x_scale) == m:
            x_scale[:head], x_scale[m - tail :] = torch.nan, torch.inf
        rows = torch.randint(0, x_rows, (m,), generator=g).int() if case.get("gather") else None
        offsets = torch.tensor(list(itertools.accumulate(counts, initial=head))).int()
        has_bias = case.get("bias", True)
        self.expected = reference.grouped_gemm_s8(
            *(x_q, w_q, x_scale, w_scale, offsets, rows),
            bias if has_bias else None, dtype,
        )  # fmt: skip
        assert not self.expected[:head].any() and not self.expected[m - tail :].any()
        extra = case.get("extra", 0)
        self.x_q = with_garbage(backend, x_q, extra)
        self.w_q = cubes_with_garbage(backend, w_q, extra)
        put = backend.put
        self.x_scale, self.w_scale, self.offsets = put(x_scale), put(w_scale), put(offsets)
        self.bias = put(bias) if has_bias else None
        self.rows = None if rows is None else put(rows)
        self.output = Output(backend, m, n, dtype, case.get("aligned", True))

    def params(self, tile: int = -1) -> c_grouped.Params:
        return c_grouped.params_of(
            *(self.x_q, self.w_q, self.x_scale, self.w_scale, self.offsets, self.output.y),
            rows=self.rows, bias=self.bias, tile=tile,
        )  # fmt: skip


def run(entries: ctypes.CDLL, backend: Backend, params: c_grouped.Params) -> int:
    """Runs the kernel with a workspace of exactly the required size, which is not cleared. Returns the status."""
    status, plan = c_grouped.plan(entries, params)
    if status != SUCCESS:
        return status
    buffer = backend.put(torch.full((max(plan.workspace_bytes, 1),), 0x7F, dtype=torch.int8))
    params.workspace, params.workspace_bytes = buffer.data_ptr(), plan.workspace_bytes
    status = entries.sqk_grouped_gemm_s8(byref(params), None)
    if backend.device == "cuda":
        torch.cuda.synchronize()
    return status


def check_every_tile(
    backend: Backend, entries: ctypes.CDLL, problem: Problem, what: str, least: int = 3
) -> None:
    """Checks each row of the table that serves the problem, and the one that the plan chooses."""
    served = 0
    for tile in range(-1, c_grouped.tile_count(entries)):
        status = run(entries, backend, problem.params(tile))
        if tile >= 0 and status == UNSUPPORTED_SHAPE:
            continue
        assert status == SUCCESS, f"{what}, tile {tile}"
        problem.output.check(problem.expected, f"{what}, tile {tile}")
        served += tile >= 0
    assert served >= least, "hardly a tile serves this"


# --- every tile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gather", [False, True])
def test_smoke_grouped(compiled: Backend, entries: ctypes.CDLL, gather: bool) -> None:
    """Experts that share blocks' first and last rows with others; zeros around them; fast and slow stores."""
    sizes = ((torch.float16, 72, 160), (torch.float32, 35, 139), (torch.bfloat16, 33, 48))
    for i, (dtype, n, k) in enumerate(sizes):
        case = {"counts": (3, 0, 18, 1), "around": (2, 3), "n": n, "k": k, "gather": gather}
        problem = Problem(compiled, case, dtype, seed=i)
        check_every_tile(compiled, entries, problem, f"{case} {dtype}")


def test_odd_channels_of_aligned_rows(compiled: Backend, entries: ctypes.CDLL) -> None:
    """The scales of every second expert start at an odd position."""
    case = {"counts": (3, 2, 5), "n": 65, "k": 40}
    problem = Problem(compiled, case, torch.float16)
    check_every_tile(compiled, entries, problem, f"{case}")


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_every_tile_of_experts(compiled: Backend, entries: ctypes.CDLL, dtype: torch.dtype) -> None:
    for i, case in enumerate(
        cases.covering(
            2 * len(COUNTS),
            cases.FLOATS.index(dtype),
            counts=COUNTS,
            n=(1, 7, 64, 130),
            k=(1, 16, 32, 130, 200, 300),
            around=((0, 0), (0, 40), (3, 0), (130, 1)),
            gather=(False, True),
            bias=(True, False),
            per_token=(True, True, False),
            aligned=(True, False),
            extra=(0, 1, 3),
        )
    ):
        problem = Problem(compiled, case, dtype, seed=i)
        check_every_tile(compiled, entries, problem, f"{case}")


def test_the_stages_of_experts_go_round(compiled: Backend, entries: ctypes.CDLL) -> None:
    """K is much longer than every pipeline of stages, and ends inside of a tile."""
    for k in (3 * 6 * 128 + 17, 2 * 5 * 64):
        problem = Problem(compiled, {"counts": (2, 17), "n": 20, "k": k}, torch.float32)
        check_every_tile(compiled, entries, problem, f"{k}")


def test_many_tiles_of_experts(compiled: Backend, entries: ctypes.CDLL) -> None:
    """Blocks along n and along m, more than one group of them."""
    for case in (
        {"counts": (1, 9, 3), "n": 1030, "k": 33},
        {"counts": (0, 4200, 40), "n": 140, "k": 16},
    ):
        problem = Problem(compiled, case, torch.float16)
        check_every_tile(compiled, entries, problem, f"{case}")


@pytest.mark.parametrize("experts", [1, 30, 31, 62, 63, 256, 1024])
def test_any_number_of_experts(compiled: Backend, entries: ctypes.CDLL, experts: int) -> None:
    """Each lane of a warp takes the offsets of one expert or of several."""
    g = cases.generator(experts)
    counts = torch.bincount(torch.randint(0, experts, (60,), generator=g), minlength=experts)
    case = {"counts": counts.tolist(), "around": (1, 2), "n": 9, "k": 40}
    problem = Problem(compiled, case, torch.float16)
    check_every_tile(compiled, entries, problem, f"{experts} experts")


def test_one_row_or_expert_may_have_any_stride(compiled: Backend, entries: ctypes.CDLL) -> None:
    for counts, n in (((1,), 1), ((1,), 20), ((5,), 1)):
        problem = Problem(compiled, {"counts": counts, "n": n, "k": 30}, torch.float32)
        params = problem.params()
        params.w_q_expert_stride = 1
        if problem.m == 1:
            params.x_q_stride, params.y_stride = 1, 0
        if n == 1:
            params.w_q_stride = 3
        assert run(entries, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{counts} {n}")


# --- values out of range ----------------------------------------------------------------------------


def spoiled(offsets: Tensor, m: int, kind: str) -> Tensor:
    """Offsets that no caller may pass."""
    count = len(offsets)
    if kind == "descending":
        return offsets.flip(0).contiguous()
    if kind == "sawtooth":  # if each expert had its rows, there would be far more tiles than blocks
        return torch.tensor([0, m]).repeat(count)[:count].int()
    if kind == "negative":
        return offsets - m - 5
    if kind == "too large":
        return offsets + m + 5
    return torch.randint(-(2**31), 2**31 - 1, (count,), generator=cases.generator(count)).int()


@pytest.mark.parametrize(
    "kind", ["descending", "sawtooth", "negative", "too large", "random", "rows"]
)
def test_values_out_of_range_stay_inside_of_the_arrays(
    compiled: Backend, entries: ctypes.CDLL, kind: str
) -> None:
    """The simulator stops a read outside; the garbage around y shows a write."""
    for counts in ((3, 20, 1, 40), tuple(i % 4 for i in range(80))):
        case = {"counts": counts, "n": 70, "k": 50, "gather": True, "aligned": False}
        problem = Problem(compiled, case, torch.float16)
        if kind == "rows":
            wild = spoiled(problem.rows.cpu(), problem.m, "random")  # type: ignore[union-attr]
            problem.rows = compiled.put(wild)
        else:
            problem.offsets = compiled.put(spoiled(problem.offsets.cpu(), problem.m, kind))
        for tile in range(c_grouped.tile_count(entries)):
            status = run(entries, compiled, problem.params(tile))
            assert status in (SUCCESS, UNSUPPORTED_SHAPE), tile
            problem.output.y.fill_(POISON)
            problem.output.check_untouched()


def test_descending_offsets_count_as_the_largest_before(
    compiled: Backend, entries: ctypes.CDLL
) -> None:
    """All rows of y are written, whatever the offsets say: memory of others must not show through."""
    problem = Problem(compiled, {"counts": (10, 20, 30), "n": 40, "k": 64}, torch.float32)
    for wild, meant in (
        ((0, 30, 10, 60), (0, 30, 30, 60)),
        ((-7, 20, 99, 5), (0, 20, 60, 60)),
        ((50, 0, 0, 0), (50, 50, 50, 50)),
        ((20, 0, 0, 40), (20, 20, 20, 40)),
    ):
        problem.offsets = compiled.put(torch.tensor(wild).int())
        problem.expected = reference.grouped_gemm_s8(
            *(t.cpu() for t in (problem.x_q, problem.w_q, problem.x_scale, problem.w_scale)),
            torch.tensor(meant), None, problem.bias.cpu(), torch.float32,  # type: ignore[union-attr]
        )  # fmt: skip
        check_every_tile(compiled, entries, problem, f"{wild}")


# --- statuses ---------------------------------------------------------------------------------------


def test_statuses_of_wrong_problems(compiled: Backend, entries: ctypes.CDLL) -> None:
    case = {"counts": (2, 3), "n": 20, "k": 32, "gather": True}
    problem = Problem(compiled, case, torch.float16)
    tiles = c_grouped.tile_count(entries)
    wrong: dict[str, tuple[Any, ...]] = {
        "m": (-1, 2**30 + 1), "n": (0, -1, 2**30 + 1), "k": (0, -1, 2**17, 33), "experts": (0, -1, 1025),
        "x_q": (None, problem.x_q.data_ptr() + 8), "x_rows": (0, -1, 2**30 + 1), "x_q_stride": (31, 40, -32, 2**40),
        "offsets": (None,), "w_q": (None, problem.w_q.data_ptr() + 8), "w_q_stride": (16, 40, -32, 2**40),
        "w_q_expert_stride": (20 * 32 - 16, 20 * 32 + 8, -640, 2**40), "x_scale": (None,), "w_scale": (None,),
        "y": (None,), "y_stride": (19, -20), "y_dtype": (-1, 3, 4), "tile": (-2, tiles),
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            params = problem.params()
            setattr(params, name, value)
            status = entries.sqk_grouped_gemm_s8(byref(params), None)
            assert status == INVALID_ARGUMENT, f"{name} = {value}: {status}"
    params = problem.params()
    params.rows, params.x_rows = None, 4  # without rows, x_q has one for each row of y
    assert entries.sqk_grouped_gemm_s8(byref(params), None) == INVALID_ARGUMENT
    problem.output.check_untouched()
    assert run(entries, compiled, problem.params()) == SUCCESS
    problem.output.check(problem.expected, "nothing is wrong")


def test_no_rows_launch_nothing(compiled: Backend, entries: ctypes.CDLL) -> None:
    params = c_grouped.Params(m=0, n=5, k=7, experts=3, y_dtype=1, tile=-1, w_q_stride=16)
    params.w_q_expert_stride = 80
    status, plan = c_grouped.plan(entries, params)
    assert (status, plan.launches, plan.blocks) == (SUCCESS, 0, 0)
    assert entries.sqk_grouped_gemm_s8(byref(params), None) == SUCCESS


def test_a_plan_bounds_the_tiles(compiled: Backend, entries: ctypes.CDLL) -> None:
    """No more blocks than rows along m, and nearly none but full tiles for many rows."""
    for m, experts in ((1, 8), (8, 64), (100_000, 4)):
        p = c_grouped.Params(m=m, n=1000, k=64, experts=experts, x_rows=m, y_dtype=1, tile=-1)
        p.x_q_stride, p.w_q_stride, p.w_q_expert_stride, p.y_stride = 64, 64, 64_000, 1000
        status, plan = c_grouped.plan(entries, p)
        assert status == SUCCESS and plan.launches == 1
        assert 0 < plan.blocks <= (1000 / 16 + 1) * min(m, m / 16 + experts + 2)


# --- sums by weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_smoke_combine(compiled: Backend, entries: ctypes.CDLL, dtype: torch.dtype) -> None:
    for i, case in enumerate(
        cases.covering(
            12,
            cases.FLOATS.index(dtype),
            tokens=(1, 5, 17),
            choices=(1, 2, 8, 11),
            n=(1, 7, 8, 130, 1100),
            weights=cases.FLOATS,
            aligned=(True, False),
            y_aligned=(True, False, False),
        )
    ):
        g = cases.generator(i)
        tokens, choices, n = case["tokens"], case["choices"], case["n"]
        y_rows = tokens * choices + 2
        y = Output(compiled, y_rows, n, dtype, case["y_aligned"]).y
        y.copy_(cases.activations(y_rows, n, dtype, seed=i))
        y[0, 0], y[1, -1] = torch.nan, torch.inf
        position = torch.randint(0, y_rows, (tokens, choices), generator=g).int()
        weights = (torch.rand(tokens, choices, generator=g) - 0.2).to(case["weights"])
        weights[0, 0] = 0
        output = Output(compiled, tokens, n, dtype, case["aligned"])
        at, by = compiled.put(position), compiled.put(weights)
        params = c_grouped.combine_params_of(y, at, by, output.y)
        assert entries.sqk_combine_experts(byref(params), None) == SUCCESS
        output.check(reference.combine_experts(y.cpu(), position, weights), f"{case}")
        wild = torch.where(position % 2 == 0, position - y_rows - 2, position + 2**30).int()
        params.position = (at := compiled.put(wild)).data_ptr()
        assert entries.sqk_combine_experts(byref(params), None) == SUCCESS
        output.check(
            reference.combine_experts(y.cpu(), wild.clamp(0, y_rows - 1), weights), "clamped"
        )


def test_the_sum_of_zeros_keeps_its_sign(compiled: Backend, entries: ctypes.CDLL) -> None:
    y = torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, -0.0, 0.0, 0.0]])
    position, weights = (
        torch.tensor([[0, 1], [1, 1]]).int(),
        torch.tensor([[1.0, 1.0], [-1.0, 0.5]]),
    )
    out = compiled.put(torch.full((2, 4), 9.0))
    here = [compiled.put(t) for t in (y, position, weights)]
    params = c_grouped.combine_params_of(*here, out)
    assert entries.sqk_combine_experts(byref(params), None) == SUCCESS
    assert_bitwise_equal(out.cpu(), reference.combine_experts(y, position, weights))
    count_result()


def test_statuses_of_wrong_sums(compiled: Backend, entries: ctypes.CDLL) -> None:
    y, out = (compiled.put(torch.zeros(rows, 5)) for rows in (6, 3))
    position = compiled.put(torch.zeros(3, 2, dtype=torch.int32))
    weights = compiled.put(torch.ones(3, 2))
    wrong: dict[str, tuple[Any, ...]] = {
        "tokens": (-1,), "choices": (0, -1), "n": (0, -1), "y_rows": (0, -1), "y": (None,), "y_stride": (-5,),
        "position": (None,), "weights": (None,), "out": (None,), "out_stride": (4,), "dtype": (-1, 3, 4),
        "weights_dtype": (-1, 3, 4),
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            params = c_grouped.combine_params_of(y, position, weights, out)
            setattr(params, name, value)
            status = entries.sqk_combine_experts(byref(params), None)
            assert status == INVALID_ARGUMENT, f"{name} = {value}: {status}"
    params = c_grouped.CombineParams(tokens=0, choices=1, n=1)
    assert entries.sqk_combine_experts(byref(params), None) == SUCCESS
