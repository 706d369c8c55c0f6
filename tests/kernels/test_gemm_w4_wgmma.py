"""Hopper's GEMM with weights of 4 bits equals the reference bit for bit, on every tile.

A tile is forced through the C entry. Its operands end with their memory, so reading beyond them fails, and x_q has
garbage between its rows.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.kernels.test_gemm_c_entry import Output, run, with_garbage, workspace_of
from tests.support import backends, c_gemm, cases
from tests.support.backends import Backend
from tests.support.c_interface import SUCCESS
from tests.support.cases import W4Gemm
from tests.support.compare import assert_bitwise_equal, count_result

OTHER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float16,
    torch.float32: torch.bfloat16,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`wgmma`: each tile of the GPU that unpacks weights of 4 bits for wgmma; none but Hopper's."""
    if "wgmma" in metafunc.fixturenames:
        rows = backends.gemm_tiles(metafunc.config.getoption("--backend"), w4=True)
        tiles = [row for row in rows if row["kernel"] == "wgmma" and not row.get("excluded")]
        metafunc.parametrize("wgmma", tiles, ids=[row["name"].replace(" ", "_") for row in tiles])


class Problem:
    """Operands on the backend's device, and the expected result."""

    def __init__(
        self,
        backend: Backend,
        given: W4Gemm,
        dtype: torch.dtype = torch.float16,
        *,
        bias: bool = True,
        residual: str = "same",
        per_token: bool = True,
        per_channel: bool = True,
        aligned: bool = True,
        extra: int = 1,
    ) -> None:
        g = given._replace(
            x_scale=given.x_scale[: None if per_token else 1],
            w_scale=given.w_scale[: None if per_channel else 1],
        )
        self.backend = backend
        added = (
            g.residual.to({"same": dtype, "other": OTHER[dtype]}[residual]) if residual else None
        )
        self.expected = reference.gemm_w4a8(*g[:5], g.bias if bias else None, added, dtype)
        self.output = Output(backend, *self.expected.shape, dtype, aligned)
        self.options: dict[str, Any] = {"bias": backend.put(g.bias) if bias else None}
        if added is not None:
            self.options["residual"] = Output(backend, *added.shape, added.dtype, aligned).y
            self.options["residual"].copy_(added)
        w_q4 = with_garbage(backend, g.w_q4.view(torch.int8), 4 * (extra - 1))
        x_q = with_garbage(backend, g.x_q, extra) if len(g.x_q) else backend.put(g.x_q)
        self.operands = (x_q, w_q4, backend.put(g.x_scale), backend.put(g.w_scale))
        self.w_group = backend.put(g.w_group)

    def params(self, tile: dict[str, Any] | None, splits: int = 0, **more: int) -> c_gemm.Params:
        p = c_gemm.params_of(
            *self.operands,
            self.output.y,
            **self.options,
            w_group=self.w_group,
            tile=-1 if tile is None else tile["tile"],
            splits=splits,
        )
        for name, value in more.items():
            setattr(p, name, value)
        return p


def check(
    backend: Backend,
    library: ctypes.CDLL,
    tile: dict[str, Any],
    given: W4Gemm,
    splits: int = 0,
    dtype: torch.dtype = torch.float16,
    what: object = "",
    **options: Any,
) -> None:
    problem = Problem(backend, given, dtype, **options)
    assert run(library, backend, problem.params(tile, splits)) == SUCCESS
    problem.output.check(problem.expected, f"{tile['name']} {splits} {what} {options}")


def test_smoke_w4_wgmma(compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]) -> None:
    for splits in sorted({1, wgmma["most_splits"]}):
        check(compiled, library, wgmma, cases.w4_operands(min(wgmma["m"], 35), 35, 1100), splits)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_every_size(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any], dtype: torch.dtype
) -> None:
    """One, below, at and above the edges of tiles, clusters, groups of k and the ring; with splits and without."""
    m, n, most = wgmma["m"], wgmma["n"], wgmma["most_splits"]
    whole = wgmma["n"] * wgmma["cluster"][1]
    for i, case in enumerate(
        cases.covering(
            18,
            cases.FLOATS.index(dtype) + 3 * wgmma["tile"],
            m=(1, 17, m - 1, m, m + 1, 2 * m + 3),
            n=(1, n - 1, n, n + 1, whole + 7, 2 * whole + 1),
            k=(1, 127, 128, 129, 300, 1000),
            splits=sorted({0, 1, most}),
            bias=(True, False),
            residual=("", "same", "other"),
            per_token=(True, False),
            per_channel=(True, False),
            aligned=(True, False),
            extra=(1, 2),
        )
    ):
        given = cases.w4_operands(case.pop("m"), case.pop("n"), case.pop("k"), seed=i)
        check(compiled, library, wgmma, given, case.pop("splits"), dtype, given.x_q.shape, **case)


def test_no_tokens(compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]) -> None:
    problem = Problem(compiled, cases.w4_operands(0, 20, 300))
    assert library.sqk_gemm_s8(byref(problem.params(wgmma)), None) == SUCCESS


def legal_weights() -> tuple[Tensor, Tensor]:
    """(q [4096, 128], w_group [1, 4096, 2]): each step and offset with all values whose weight is an int8.

    Row by row the values move on, so all of them occur in all places of a group. Illegal ones are replaced by 0.
    """
    step, offset = torch.tensor(list(product(range(16), range(-128, 128)))).unbind(1)
    q = (torch.arange(128) + torch.arange(4096)[:, None] // 3) % 16
    q[q * step[:, None] + offset[:, None] > 127] = 0
    return q, torch.stack([step, offset], -1).to(torch.int8)[None]


def test_the_legal_weights() -> None:
    """The cases of the next test: each legal value, step and offset occurs."""
    q, w_group = legal_weights()
    found = reference.w4_weight(reference.pack_w4(q), w_group, 128).int()
    step, offset = w_group[0].int().unbind(1)
    assert torch.equal(found, q * step[:, None] + offset[:, None])
    wanted = {
        (value, s, o)
        for value, s, o in product(range(16), range(16), range(-128, 128))
        if value * s + o <= 127
    }
    rows = zip(q.tolist(), step.tolist(), offset.tolist(), strict=True)
    assert {(value, s, o) for values, s, o in rows for value in values} == wanted


def test_every_weight(compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]) -> None:
    """Every legal value, step and offset. Each token has a single 1 (or -128), so y shows single weights."""
    q, w_group = legal_weights()
    x_q = torch.diag(torch.tensor([1, -128]).repeat(64)).to(torch.int8)
    for rows in x_q.split(max(wgmma["m"], 64)):
        given = W4Gemm(
            rows, reference.pack_w4(q), w_group, torch.ones(1), torch.ones(1), torch.zeros(4096), torch.zeros(1)
        )  # fmt: skip
        options = {"bias": False, "residual": "", "per_token": False, "per_channel": False}
        check(compiled, library, wgmma, given, dtype=torch.float32, **options)


@pytest.mark.parametrize("turns", [1, 2])
def test_the_ring_goes_round(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any], turns: int
) -> None:
    """K is longer than the ring of stages, and so is each part of a split."""
    k = turns * cases.k_of_all_stages(wgmma) + 17
    for splits in {1, min(2, wgmma["most_splits"])}:
        check(compiled, library, wgmma, cases.w4_operands(5, 70 + turns, splits * k), splits)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_more_units_than_blocks(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any], groups: int
) -> None:
    """A block computes several tiles, along n and along m: the ring continues in the middle of a turn."""
    units = 2 * c_gemm.current_device(library).sms + 1
    k = 128 * groups - 28
    check(compiled, library, wgmma, cases.w4_operands(9, units * wgmma["n"] - 5, k))
    if groups < 3:
        check(compiled, library, wgmma, cases.w4_operands(units * wgmma["m"] - 5, 21, k))


def test_tiles_in_groups_along_m(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]
) -> None:
    """More than 2048 tokens: the last group of tiles is smaller."""
    check(compiled, library, wgmma, cases.w4_operands(2 * 2048 + wgmma["m"] + 1, 257, 20))


@pytest.mark.parametrize("fill", [0x7F, None], ids=str)
def test_the_workspace_of_splits_need_not_be_cleared(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any], fill: int | None
) -> None:
    """The next launch finds what the last one left in the workspace, and each number of splits gives the same bits."""
    problem = Problem(compiled, cases.w4_operands(min(wgmma["m"], 30), 200, 8 * 128 + 5))
    for splits in range(1, wgmma["most_splits"] + 1):
        params = problem.params(wgmma, splits)
        status, plan = c_gemm.plan(library, params)
        assert status == SUCCESS and plan.splits == splits
        assert (plan.workspace_bytes > 0) == (splits > 1)
        with workspace_of(compiled, params, max(plan.workspace_bytes, 1), fill):
            for _ in range(2):
                assert library.sqk_gemm_s8(byref(params), None) == SUCCESS
                problem.output.check(problem.expected, f"{wgmma['name']} {splits} {fill}")


def test_one_row_may_have_any_stride(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]
) -> None:
    for m, n in ((1, 1), (1, 20), (5, 1)):
        problem = Problem(compiled, cases.w4_operands(m, n, 300))
        params = problem.params(wgmma)
        if m == 1:
            params.x_q_stride, params.y_stride, params.residual_stride = 1, 0, -7
        if n == 1:
            params.w_q_stride = 3
        assert run(library, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{wgmma['name']} {m} {n}")


def test_nonfinite_values_stay_in_their_row_or_column(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]
) -> None:
    m = min(wgmma["m"], 40)
    given = cases.w4_operands(m, 70, 200)
    given.x_scale[1], given.x_scale[m - 1] = torch.nan, torch.inf
    given.w_scale[3], given.bias[42] = -torch.inf, torch.nan
    given.residual[2, 20] = torch.inf
    clear = torch.ones(m, 70, dtype=torch.bool)
    clear[[1, m - 1]], clear[:, [3, 42]], clear[2, 20] = False, False, False
    for dtype in cases.FLOATS:
        problem = Problem(compiled, given, dtype)
        assert torch.equal(problem.expected.isfinite(), clear)
        assert run(library, compiled, problem.params(wgmma)) == SUCCESS
        problem.output.check(problem.expected, wgmma["name"])


@pytest.mark.parametrize("constant", [False, True])
def test_a_chain_of_kernels(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any], constant: bool
) -> None:
    """The kernel before writes x_q and x_scale, and, if nobody promises that they are constant, the weights.

    On Hopper the GEMM may start before that kernel has ended (tests/csrc/test_overlap.py).
    """
    m, n, k = min(wgmma["m"], 37), 150, 600
    x = cases.activations(m, k, torch.float16)
    x_q, x_scale = reference.quantize(x)
    given = cases.w4_operands(m, n, k)._replace(x_q=x_q, x_scale=x_scale)
    # Any bytes are packed values: the quantizer writes some.
    source = cases.activations(n, given.w_q4.shape[1], torch.float16, seed=1)
    if not constant:
        given = given._replace(w_q4=reference.quantize(source)[0].view(torch.uint8))
        step = given.w_group[..., 0].clamp(max=15).int()
        offset = given.w_group[..., 1].int().clamp(max=127).minimum(127 - 15 * step)
        given = given._replace(w_group=torch.stack([step, offset], -1).to(torch.int8))
    problem = Problem(compiled, given)
    x, source = compiled.put(x), compiled.put(source)
    for turn in range(2):
        steps = [ops.quantize(x, k_multiple=16)]
        if not constant:
            steps.append(ops.quantize(source))
        weights = problem.operands[1] if constant else steps[-1][0]
        problem.operands = (steps[0][0][:, :k], weights, steps[0][1], problem.operands[3])
        params = problem.params(wgmma, w_constant=constant)
        assert run(library, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{wgmma['name']}, turn {turn}")


@pytest.mark.parametrize("m", [1, 17, 40, 70, 130, 300])
def test_the_op(compiled: Backend, m: int) -> None:
    """The op takes a tile that the plan chooses, and so does the whole layer."""
    g = cases.w4_operands(m, 131, 700)
    put = compiled.put
    for dtype in cases.FLOATS:
        bias, residual = g.bias.to(dtype), g.residual.to(dtype)
        added = {"bias": put(bias), "residual": put(residual)}
        found = ops.gemm_w4a8(*map(put, g[:5]), **added, out_dtype=dtype)
        expected = reference.gemm_w4a8(*g[:5], bias, residual, dtype)
        assert_bitwise_equal(found, expected, f"{m} {dtype}")
        x = cases.activations(m, 700, dtype)
        found = ops.linear_w4a8(put(x), *map(put, (g.w_q4, g.w_group, g.w_scale)), **added)
        x_q, x_scale = reference.quantize(x)
        expected = reference.gemm_w4a8(
            x_q, g.w_q4, g.w_group, x_scale, g.w_scale, bias, residual, dtype
        )
        assert_bitwise_equal(found, expected, f"linear {m} {dtype}")
        count_result()
