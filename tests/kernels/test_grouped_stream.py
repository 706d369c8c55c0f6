"""The streaming GEMM by experts equals the reference bit for bit, by its C entry.

Each test runs every streaming tile that holds all rows. The operands end with their memory, and rows and experts have
garbage between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.kernels.test_gemm_c_entry import POISON, Output, with_garbage
from tests.kernels.test_grouped_c_entry import cubes_with_garbage
from tests.support import c_grouped, c_interface, cases
from tests.support.backends import Backend
from tests.support.c_interface import SUCCESS, UNSUPPORTED_SHAPE

EXPERTS = (1, 3, 8, 64, 256)
#: One element; a piece; around a chunk and a stage; several stages; more stages than warps.
CHANNELS = (1, 16, 31, 63, 64, 127, 128, 129, 300, 1000, 2049)
#: Of the output: one, around a tile, several tiles.
OUTPUTS = (1, 15, 16, 17, 24, 35, 130)


@pytest.fixture(scope="module")
def grouped(library: ctypes.CDLL) -> ctypes.CDLL:
    return c_grouped.declare(library)


def tiles_for(library: ctypes.CDLL, m: int) -> list[int]:
    """The streaming tiles that hold m rows. The rules choose the smallest one."""
    found = []
    for most in (8, 16):
        probe = c_grouped.Params(m=most, n=1, k=1, experts=1, x_rows=most, y_stride=1, y_dtype=1)
        probe.x_q_stride, probe.tile = 16, -1
        status, plan = c_grouped.plan(library, probe)
        assert status == SUCCESS and plan.workspace_bytes == 0
        found.append(plan.tile)
    assert len(set(found)) == 2
    return found[0 if m <= 8 else 1 :]


class Problem:
    """Operands on the backend's device.

    Args:
        counts: the rows of each expert; `before` and `after` them are rows of none.
        x_rows: rows of x_q, which `rows` names at random; None: `rows` is null.
    """

    def __init__(
        self,
        backend: Backend,
        counts: Sequence[int],
        n: int,
        k: int,
        dtype: torch.dtype = torch.float16,
        *,
        before: int = 0,
        after: int = 0,
        x_rows: int | None = None,
        bias: bool = True,
        per_token: bool = True,
        extra: int = 0,
        seed: int = 0,
    ) -> None:
        g = cases.generator(seed + 9)
        experts, m = len(counts), before + sum(counts) + after
        count = m if x_rows is None else x_rows
        self.offsets = torch.tensor([before, *accumulate(counts, initial=before)][1:]).int()
        self.rows = None if x_rows is None else torch.randint(0, count, (m,), generator=g).int()
        self.x_q = cases.random_int8(count, k, seed=seed)
        self.x_q[-1] = -128
        self.w_q = cases.random_int8(experts, n, k, seed=seed + 1)
        self.w_q[:, -1] = -128
        unit = 1.0 / (74.0 * k**0.5)
        self.x_scale = (torch.rand(m if per_token else 1, generator=g) + 0.1) * unit
        self.w_scale = (torch.rand(experts, n, generator=g) + 0.1) / 74.0
        self.bias = torch.randn(experts, n, generator=g) if bias else None
        self.backend, self.m, self.dtype, self.extra = backend, m, dtype, extra
        self.output = Output(backend, m, n, dtype, aligned=extra % 2 == 0)

    def expected(self) -> Tensor:
        return reference.grouped_gemm_s8(
            self.x_q, self.w_q, self.x_scale, self.w_scale, self.offsets, self.rows, self.bias, self.dtype,
        )  # fmt: skip

    def params(self, tile: int) -> c_grouped.Params:
        """Also copies the operands to the device."""
        put = self.backend.put
        x_q = with_garbage(self.backend, self.x_q, self.extra)
        w_q = cubes_with_garbage(self.backend, self.w_q, self.extra)
        x_scale, w_scale, offsets = map(put, (self.x_scale, self.w_scale, self.offsets))
        rows, bias = (None if t is None else put(t) for t in (self.rows, self.bias))
        self.kept = (x_q, w_q, x_scale, w_scale, offsets, rows, bias)
        return c_grouped.params_of(
            x_q, w_q, x_scale, w_scale, offsets, self.output.y, rows=rows, bias=bias, tile=tile
        )

    def run(self, library: ctypes.CDLL, tile: int, **changes: int) -> int:
        """Launches, and returns the status; the result is in `output`."""
        params = self.params(tile)
        for name, value in changes.items():
            setattr(params, name, value)
        status: int = library.sqk_grouped_gemm_s8(byref(params), None)
        if self.backend.device == "cuda":
            torch.cuda.synchronize()
        return status

    def check(self, library: ctypes.CDLL, what: str = "", **changes: int) -> None:
        expected = self.expected()
        for tile in tiles_for(library, self.m):
            assert self.run(library, tile, **changes) == SUCCESS, what
            self.output.check(expected, f"{what} {tuple(self.w_q.shape)} tile {tile}")


def some_counts(rows: int, experts: int, seed: int) -> list[int]:
    """`rows` rows for random experts."""
    chosen = torch.randint(0, experts, (rows,), generator=cases.generator(seed))
    return torch.bincount(chosen, minlength=experts).tolist()


# --- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [5, 13])
def test_smoke_grouped_stream(compiled: Backend, grouped: ctypes.CDLL, m: int) -> None:
    for experts, n, k in ((3, 35, 300), (64, 48, 512)):
        counts = some_counts(m - 2, experts, seed=m)
        problem = Problem(compiled, counts, n, k, before=1, after=1, x_rows=4, extra=1)
        problem.check(grouped)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("m", range(1, 17))
def test_every_number_of_rows(
    compiled: Backend, grouped: ctypes.CDLL, m: int, experts: int
) -> None:
    """Random experts: every type of y, bias and scales, `rows` or not, rows of no expert before and after."""
    for i, dtype in enumerate(cases.FLOATS):
        turn = 3 * (16 * EXPERTS.index(experts) + m) + i
        before, after = min(turn % 4, m // 2), min(turn % 3, m // 3)
        Problem(
            compiled, some_counts(m - before - after, experts, turn), OUTPUTS[turn % 7],
            CHANNELS[turn % 11] if experts < 64 else CHANNELS[turn % 9], dtype,
            before=before, after=after, x_rows=(None, 1, 5, 40)[turn % 4], bias=turn % 5 > 0,
            per_token=turn % 7 > 0, extra=turn % 3, seed=turn,
        ).check(grouped, f"{m} rows")  # fmt: skip


@pytest.mark.parametrize(
    "counts",
    [(16,), (0, 0, 16, 0), (1,) * 16, (7, 1, 0, 8), (0, 7, 0, 1, 0), (0, 1), (7,), (8, 8)],
    ids=str,
)
@pytest.mark.parametrize("k", [16, 100, 640])
def test_every_kind_of_expert(
    compiled: Backend, grouped: ctypes.CDLL, counts: tuple[int, ...], k: int
) -> None:
    for dtype, x_rows, extra in zip(cases.FLOATS, (None, 3, 16), (0, 1, 2), strict=True):
        Problem(compiled, counts, 45, k, dtype, x_rows=x_rows, extra=extra).check(grouped)


@pytest.mark.parametrize("k", CHANNELS)
@pytest.mark.parametrize("n", OUTPUTS)
def test_every_number_of_channels(compiled: Backend, grouped: ctypes.CDLL, n: int, k: int) -> None:
    dtype, extra = cases.FLOATS[(n + k) % 3], (n + k) % 2
    for counts in ((2, 0, 3), (9, 1)):
        Problem(compiled, counts, n, k, dtype, x_rows=7, extra=extra, seed=n).check(grouped)


@pytest.mark.parametrize("experts", [31, 32, 33, 128, 129, 1023, 1024])
def test_the_last_of_many_experts(compiled: Backend, grouped: ctypes.CDLL, experts: int) -> None:
    """The experts with rows are at the edges of what a lane, or one of its loads, takes."""
    for others in ((0,), (0, 30), (experts // 2, experts - 2)):
        counts = [0] * experts
        for expert in {*others, experts - 1}:
            counts[expert] += 2
        Problem(compiled, counts, 3, 20, torch.float32, x_rows=5).check(grouped, f"{others}")


@pytest.mark.parametrize(
    ("counts", "k"),
    [((16,), 8200), ((13, 3), 8200), ((0, 7, 1), 10_001), ((1, 4, 3), 10_001), ((15,), 40_000)],
    ids=str,
)
def test_long_rows(
    compiled: Backend, grouped: ctypes.CDLL, counts: tuple[int, ...], k: int
) -> None:
    """Activations fit into shared memory for a few rows of an expert and not for others."""
    Problem(compiled, counts, 18, k, torch.float32, x_rows=9).check(grouped)


def test_the_largest_k(compiled: Backend, grouped: ctypes.CDLL) -> None:
    """The sum of extreme values fits the 32-bit accumulator."""
    for counts in ((1, 2), (0, 16)):
        problem = Problem(compiled, counts, 3, 131_071, torch.float32)
        problem.x_q.fill_(-128)
        problem.check(grouped)


def test_a_block_takes_several_tiles(compiled: Backend, grouped: ctypes.CDLL) -> None:
    """Its ring continues from one to the next; some warps have two stages of a row, the others one."""
    tiles = 8 if compiled.name == "simulator" else 160
    for counts, k in (((2,), 600), ((3, 0, 4), 2300), ((10, 3), 4100)):
        Problem(compiled, counts, 3 * 16 * tiles + 5, k, torch.float32, x_rows=8).check(grouped)


# --- edges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 8, 16])
def test_rows_of_no_expert_are_zeros(compiled: Backend, grouped: ctypes.CDLL, m: int) -> None:
    for dtype in cases.FLOATS:
        for before in {0, m // 2, m}:
            problem = Problem(compiled, (0,) * 5, 37, 64, dtype, before=before, after=m - before)
            problem.check(grouped)


def test_more_rows_are_another_tile(compiled: Backend, grouped: ctypes.CDLL) -> None:
    """One expert may have all rows, so none may have more than the tile."""
    small, large = tiles_for(grouped, 1)
    for m, tile in ((9, small), (17, large), (17, small)):
        problem = Problem(compiled, (m, *(0,) * 63), 5, 64)
        assert problem.run(grouped, tile) == UNSUPPORTED_SHAPE
        problem.output.check_untouched()
    assert problem.run(grouped, -1) == SUCCESS
    problem.output.check(problem.expected(), "17 rows")
    params = c_grouped.Params(m=17, n=5, k=64, experts=64, x_rows=17, y_stride=5, y_dtype=1)
    params.x_q_stride, params.w_q_stride, params.w_q_expert_stride, params.tile = 64, 64, 320, -1
    status, plan = c_grouped.plan(grouped, params)
    assert status == SUCCESS and plan.tile not in (small, large)


def test_no_rows_launch_nothing(compiled: Backend, grouped: ctypes.CDLL) -> None:
    params = c_grouped.Params(n=5, k=64, experts=4, y_dtype=1, tile=-1)
    params.w_q_stride, params.w_q_expert_stride = 64, 320
    status, plan = c_grouped.plan(grouped, params)
    assert status == SUCCESS and plan.launches == plan.blocks == 0
    assert grouped.sqk_grouped_gemm_s8(byref(params), None) == SUCCESS


def test_one_row_may_have_any_stride(compiled: Backend, grouped: ctypes.CDLL) -> None:
    one_channel = Problem(compiled, (2, 0, 3), 1, 300, torch.float32)
    one_channel.check(grouped, w_q_stride=3)
    one_row = Problem(compiled, (0, 1), 20, 300, torch.float32)
    one_row.check(grouped, x_q_stride=1, y_stride=0)
    one_expert = Problem(compiled, (4,), 20, 300, torch.float32)
    one_expert.check(grouped, w_q_expert_stride=7)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_nonfinite_scales_stay_in_their_row_or_expert(
    compiled: Backend, grouped: ctypes.CDLL, dtype: torch.dtype
) -> None:
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])
    problem = Problem(compiled, (3, 0, 2, 4), 21, 200, dtype, before=1, after=2, x_rows=6)
    problem.x_scale[[0, 2, 5, -1]] = bad
    problem.w_scale[2, [0, 7, 15, 20]] = bad
    problem.w_scale[1] = torch.nan  # of an expert without rows
    assert problem.bias is not None
    problem.bias[3, [1, 8, 16, 19]] = bad
    y = problem.expected()
    assert bool(y[6:10, 2].isfinite().all()) and bool((y[[0, -1]] == 0).all())
    problem.check(grouped)


BAD_OFFSETS = (
    (-5, 3, 2, 9, 4),
    (0, 100, 200, 300, 1 << 30),
    (-(1 << 31), (1 << 31) - 1, -(1 << 31), (1 << 31) - 1, -(1 << 31)),
    ((1 << 31) - 1,) * 5,
    (-1,) * 5,
    (9, 7, 5, 3, 1),
    (4, 0, 16, 0, 16),
)


@pytest.mark.parametrize("m", [3, 16])
@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
def test_bad_offsets_touch_nothing_else(
    compiled: Backend, grouped: ctypes.CDLL, offsets: tuple[int, ...], m: int
) -> None:
    """The simulator checks the bounds of every access; y's surroundings are checked here."""
    for x_rows in (None, 2):
        problem = Problem(compiled, (m, 0, 0, 0), 35, 300, x_rows=x_rows, extra=1)
        problem.offsets = torch.tensor(offsets).int()
        for tile in tiles_for(grouped, m):
            assert problem.run(grouped, tile) == SUCCESS
            problem.output.y.fill_(POISON)
            problem.output.check_untouched()


def test_bad_rows_touch_nothing_else(compiled: Backend, grouped: ctypes.CDLL) -> None:
    """They are clamped."""
    given = torch.tensor([-1, 4, -(1 << 31), (1 << 31) - 1, 2, 1 << 30, 3, -7]).int()
    problem = Problem(compiled, (3, 0, 5), 35, 300, x_rows=4)
    problem.rows = given.clamp(0, 3)
    expected = problem.expected()
    problem.rows = given
    for tile in tiles_for(grouped, 8):
        assert problem.run(grouped, tile) == SUCCESS
        problem.output.check(expected, f"tile {tile}")


# --- order of launches --------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [6, 14])
def test_a_chain_of_kernels(compiled: Backend, grouped: ctypes.CDLL, m: int) -> None:
    """Offsets and rows, then x_q and its scales, are what the kernel before has just written.

    On Hopper this one may start before it has ended; tests/csrc/test_overlap.py runs the chains so.
    """
    put, k = compiled.put, 304
    problem = Problem(compiled, (m - 4, 0, 3), 21, k, before=1, x_rows=m)
    x = cases.activations(m, k, torch.float16)
    problem.x_q, problem.x_scale = reference.quantize(x)
    expected = problem.expected()
    assert problem.rows is not None
    numbers = torch.cat([problem.offsets, problem.rows])
    # A quantizer with a scale of 1 copies these bytes: all are less than 128.
    digits = put(numbers.view(torch.int8).float()[None])
    one, x = put(torch.ones(1)), put(x)
    x_q, x_scale = put(torch.zeros(m, k, dtype=torch.int8)), put(torch.zeros(m))
    copied, unused = put(torch.zeros(digits.shape, dtype=torch.int8)), put(torch.zeros(1))
    to_numbers = c_interface.params_of(digits, copied, unused, scheme="static", scale=one)
    to_rows = c_interface.params_of(x, x_q, x_scale)
    for tile in tiles_for(grouped, m):
        params = problem.params(tile)
        params.x_q, params.x_q_stride, params.x_scale = x_q.data_ptr(), k, x_scale.data_ptr()
        params.offsets = copied.data_ptr()
        params.rows = copied.data_ptr() + 4 * len(problem.offsets)
        for before, last in ((to_rows, to_numbers), (to_numbers, to_rows)):
            for t in (copied, x_q, x_scale):
                t.zero_()
            for launch in (before, last):
                assert grouped.sqk_quantize(byref(launch), None) == SUCCESS
            assert grouped.sqk_grouped_gemm_s8(byref(params), None) == SUCCESS
            problem.output.check(expected, f"{m} rows, tile {tile}")
