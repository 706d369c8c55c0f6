"""GEMMs with weights of 4 bits equal the reference bit for bit: every row that serves them, through the C entry.

Each operand ends with its memory, so that a read beyond it is an error in the simulator.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.kernels.test_gemm_c_entry import POISON, Output, run, with_garbage, workspace_of
from tests.support import c_gemm, cases
from tests.support.backends import Backend
from tests.support.c_interface import (
    INVALID_ARGUMENT,
    SUCCESS,
    UNSUPPORTED_SHAPE,
    WORKSPACE_TOO_SMALL,
)
from tests.support.cases import W4Gemm
from tests.support.compare import assert_bitwise_equal, count_result

GROUP = reference.W4_GROUP
#: K below, at and above a group, an odd number of them, and both sides of a 16-byte piece of the last one.
KS = (1, 15, 16, 17, 31, 127, 128, 129, 300, 640, 1000)


def put_w4(backend: Backend, g: W4Gemm, extra: int) -> W4Gemm:
    """On the backend's device, with garbage between the rows of both matrices."""
    w_q4 = with_garbage(backend, g.w_q4.view(torch.int8), 2 * extra)
    return W4Gemm(with_garbage(backend, g.x_q, extra), w_q4, *map(backend.put, g[2:]))


class Problem:
    """Operands on the backend's device, and the expected result."""

    def __init__(
        self, backend: Backend, case: dict[str, Any], dtype: torch.dtype, seed: int = 0
    ) -> None:
        m, n = case["m"], case["n"]
        g = cases.w4_operands(m, n, case["k"], seed=seed)
        g = g._replace(
            x_scale=g.x_scale[: None if case.get("per_token", True) else 1],
            w_scale=g.w_scale[: None if case.get("per_channel", True) else 1],
        )
        aligned: bool = case.get("aligned", True)
        bias = g.bias if case.get("bias", True) else None
        residual = None
        if case.get("residual", True):
            residual = g.residual.to(case.get("residual_dtype", dtype))
        self.expected = reference.gemm_w4a8(*g[:5], bias, residual, dtype)
        self.added: dict[str, Any] = {"bias": None if bias is None else backend.put(bias)}
        if residual is not None:
            self.added["residual"] = Output(backend, m, n, residual.dtype, aligned).y
            self.added["residual"].copy_(residual)
        self.gemm = put_w4(backend, g, case.get("extra", 0))
        self.output = Output(backend, m, n, dtype, aligned)

    def params(self, tile: int = -1, splits: int = 0) -> c_gemm.Params:
        x_q, w_q4, w_group, x_scale, w_scale, *_ = self.gemm
        how = {**self.added, "w_group": w_group, "tile": tile, "splits": splits}
        return c_gemm.params_of(x_q, w_q4, x_scale, w_scale, self.output.y, **how)


def most_tokens(tile: dict[str, Any], m: int) -> int:
    return min(tile["m"], m) if tile["kernel"] == "stream" else m


# --- every row --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_every_tile_of_w4(
    compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any], dtype: torch.dtype
) -> None:
    most = w4_tile["most_splits"]
    sizes = {**cases.gemm_sizes(w4_tile), "k": KS}
    for i, case in enumerate(
        cases.covering(
            len(KS),
            cases.FLOATS.index(dtype) + 3 * w4_tile["tile"],
            bias=(True, False),
            residual=(True, True, False),
            residual_dtype=cases.FLOATS,
            aligned=(False, True),
            extra=(0, 1, 3),
            per_token=(True, False),
            per_channel=(True, False),
            splits=sorted({0, 1, min(2, most), most}),
            **sizes,
        )
    ):
        problem = Problem(compiled, case, dtype, seed=i)
        params = problem.params(w4_tile["tile"], case["splits"])
        assert run(library, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{w4_tile['name']} {case}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_whole_groups_of_channels(
    compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any], dtype: torch.dtype
) -> None:
    """With rows of y and residual at multiples of 16 bytes the epilogue takes its fast path."""
    for i, (bias, residual) in enumerate(((True, True), (False, True), (True, False))):
        case = {"m": most_tokens(w4_tile, w4_tile["m"] + 21), "n": 2 * w4_tile["n"] + 40, "k": 200}
        case |= {"bias": bias, "residual": residual, "per_token": i > 0, "per_channel": i < 2}
        problem = Problem(compiled, case, dtype, seed=i)
        assert run(library, compiled, problem.params(w4_tile["tile"])) == SUCCESS
        problem.output.check(problem.expected, f"{w4_tile['name']} {case}")


@pytest.mark.parametrize("turns", [2, 3])
def test_the_stages_of_w4_go_round(
    compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any], turns: int
) -> None:
    """K is much longer than the pipeline of stages, and so is each part of a split."""
    k = turns * cases.k_of_all_stages(w4_tile) + 17
    for splits in {1, min(3, w4_tile["most_splits"])}:
        case = {"m": min(w4_tile["m"], 20) - turns, "n": 30 + turns, "k": splits * k}
        problem = Problem(compiled, case, torch.float32)
        assert run(library, compiled, problem.params(w4_tile["tile"], splits)) == SUCCESS
        problem.output.check(problem.expected, f"{w4_tile['name']} {case} {splits}")


def test_every_number_of_stages_and_splits(
    compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any]
) -> None:
    """One group more than the one before, from less than the pipeline holds, in each number of parts."""
    for groups in range(1, max(w4_tile["stages"], 2) + 3):
        for splits in range(1, min(w4_tile["most_splits"], groups) + 1):
            case = {"m": 5, "n": 19, "k": groups * GROUP - 3, "residual": False}
            problem = Problem(compiled, case, torch.float32, seed=groups)
            for _ in range(2):
                params = problem.params(w4_tile["tile"], splits)
                assert run(library, compiled, params) == SUCCESS
                problem.output.check(problem.expected, f"{w4_tile['name']} {groups} {splits}")


def test_many_tiles(compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any]) -> None:
    tiles = 2 * c_gemm.current_device(library).sms + 1
    many = [{"m": most_tokens(w4_tile, 21), "n": tiles * w4_tile["n"] - 5, "k": 100}]
    if w4_tile["kernel"] != "stream":
        many += [{"m": tiles * w4_tile["m"] - 5, "n": 21, "k": 100}]
    for case in many:
        problem = Problem(compiled, case, torch.float16)
        assert run(library, compiled, problem.params(w4_tile["tile"], 1)) == SUCCESS
        problem.output.check(problem.expected, f"{w4_tile['name']} {case}")


@pytest.mark.parametrize("fill", [0x7F, None], ids=str)
def test_the_workspace_of_w4_need_not_be_cleared(
    compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any], fill: int | None
) -> None:
    case = {"m": most_tokens(w4_tile, 30), "n": w4_tile["n"] - 3, "k": 20 * w4_tile["k"] + 1}
    problem = Problem(compiled, case, torch.float16)
    params = problem.params(w4_tile["tile"], w4_tile["most_splits"])
    status, plan = c_gemm.plan(library, params)
    assert status == SUCCESS
    if plan.workspace_bytes == 0:
        assert w4_tile["most_splits"] == 1 and w4_tile["schedule"] != "stream-K"
        return
    with workspace_of(compiled, params, plan.workspace_bytes, fill):
        for _ in range(2):
            assert library.sqk_gemm_s8(byref(params), None) == SUCCESS
            problem.output.check(problem.expected, f"{w4_tile['name']} {fill}")
        params.workspace_bytes -= 1
        assert library.sqk_gemm_s8(byref(params), None) == WORKSPACE_TOO_SMALL
    problem.output.check_untouched()


def test_one_row_of_w4_may_have_any_stride(
    compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any]
) -> None:
    for m, n in ((1, 1), (1, 20), (5, 1)):
        problem = Problem(compiled, {"m": m, "n": n, "k": 300}, torch.float32)
        params = problem.params(w4_tile["tile"])
        if m == 1:
            params.x_q_stride, params.y_stride, params.residual_stride = 1, 0, -7
        if n == 1:
            params.w_q_stride = 3
        assert run(library, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{w4_tile['name']} {m} {n}")


# --- every value ------------------------------------------------------------------------------------


def every_weight() -> tuple[Tensor, Tensor]:
    """q [512, 1024] and w_group [8, 512, 2]: each step with each offset, and with each the values that give an int8."""
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(-128, 128))
    step, offset = pairs.view(8, 512, 2).unbind(-1)
    most = torch.where(step > 0, (127 - offset).div(step.clamp(min=1), rounding_mode="floor"), 15)
    most = most.clamp(max=15)[..., None]
    place = torch.arange(GROUP)
    q = (place + place // 16) % 16 % (most + 1)  # each value in low and in high halves
    return q.transpose(0, 1).reshape(512, -1), torch.stack([step, offset], -1).to(torch.int8)


def test_every_weight_is_unpacked(
    compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any]
) -> None:
    """Each token is a 1 and zeros, so y is the weights themselves. A row for few tokens adds up many of them."""
    q, w_group = every_weight()
    n, k = q.shape
    of_weight = w_group.transpose(0, 1).repeat_interleave(GROUP, 1).long()
    seen = ((q * 16 + of_weight[..., 0]) * 256 + of_weight[..., 1] + 128).unique()
    legal = sum(
        -128 <= value * step + offset <= 127
        for value in range(16)
        for step in range(16)
        for offset in range(-128, 128)
    )
    assert len(seen) == legal, "a value that no weight has"
    weight = (q * of_weight[..., 0] + of_weight[..., 1]).float()
    assert_bitwise_equal(
        reference.w4_weight(reference.pack_w4(q), w_group, k).float(), weight, "reference"
    )
    ones = torch.ones(1)
    x_q = torch.eye(k, dtype=torch.int8)
    if w4_tile["kernel"] == "stream":
        x_q = cases.random_int8(w4_tile["m"], k)
    bits = W4Gemm(x_q, reference.pack_w4(q), w_group, ones, ones, ones, ones)
    g = put_w4(compiled, bits, 0)
    output = Output(compiled, len(x_q), n, torch.float32, True)
    p = c_gemm.params_of(
        *(g.x_q, g.w_q4, g.x_scale, g.w_scale), output.y, w_group=g.w_group, tile=w4_tile["tile"]
    )
    assert run(library, compiled, p) == SUCCESS
    output.check(x_q.float() @ weight.T, w4_tile["name"])


def test_special_tokens(compiled: Backend, library: ctypes.CDLL, w4_tile: dict[str, Any]) -> None:
    """Zeros, NaN and Inf in one token's scale touch no other row; the largest sums fit."""
    case = {"m": most_tokens(w4_tile, 8), "n": 33, "k": 300}
    problem = Problem(compiled, case, torch.float32)
    g = problem.gemm
    g.x_q[0], g.x_q[1] = 0, -128
    g.x_scale[2], g.x_scale[3] = torch.nan, torch.inf
    host = [t.cpu() for t in (g.x_q, g.w_q4.view(torch.uint8), *g[2:])]
    residual = problem.added["residual"].cpu()
    expected = reference.gemm_w4a8(*host[:5], host[5], residual, torch.float32)
    assert run(library, compiled, problem.params(w4_tile["tile"])) == SUCCESS
    assert bool(problem.output.y[2].isnan().all()) and bool(problem.output.y[4:].isfinite().all())
    problem.output.check(expected, w4_tile["name"])


# --- statuses and ops -------------------------------------------------------------------------------


def test_rows_serve_what_they_say(compiled: Backend, library: ctypes.CDLL) -> None:
    """Another row refuses and launches nothing."""
    problem = Problem(compiled, {"m": 4, "n": 20, "k": 200}, torch.float16)
    int8 = cases.gemm_operands(4, 20, 200)
    stride = -(-200 // c_gemm.ALIGNMENT) * c_gemm.ALIGNMENT
    x_q, w_q = (compiled.put(torch.nn.functional.pad(t, (0, stride - 200))) for t in int8[:2])
    scales = [compiled.put(t) for t in int8[2:4]]
    for tile in c_gemm.all_tiles(library):
        if not tile["w4"]:
            status = library.sqk_gemm_s8(byref(problem.params(tile["tile"])), None)
            assert status == UNSUPPORTED_SHAPE, tile["name"]
        if tile["w4_only"]:
            p = c_gemm.params_of(
                x_q[:, :200], w_q[:, :200], scales[0], scales[1], problem.output.y, tile=tile["tile"]
            )  # fmt: skip
            assert library.sqk_gemm_s8(byref(p), None) == UNSUPPORTED_SHAPE, tile["name"]
    for name, value in (("w_group", 8), ("w_q", 8), ("w_q_stride", 1)):
        p = problem.params()
        setattr(p, name, getattr(p, name) + value)
        assert library.sqk_gemm_s8(byref(p), None) == INVALID_ARGUMENT, name
    problem.output.check_untouched()


def unaligned(t: Tensor) -> Tensor:
    """A copy whose address is odd."""
    buffer = torch.full((t.numel() + 17,), POISON, dtype=t.dtype)
    start = 1 if buffer.data_ptr() % 2 == 0 else 2
    view = buffer[start : start + t.numel()].view(t.shape)
    view.copy_(t)
    return view


@pytest.mark.parametrize("m", [0, 1, 17, 33, 130])
def test_the_op_takes_any_layout(compiled: Backend, library: ctypes.CDLL, m: int) -> None:
    """The binding copies what the kernels cannot read."""
    tiles = c_gemm.w4_tiles(library)
    if not any(tile["kernel"] != "stream" or m <= tile["m"] for tile in tiles):
        pytest.skip("this GPU's table has no row for so many tokens")
    for i, dtype in enumerate(cases.FLOATS):
        n, k = 45 + i, 300
        g = cases.w4_operands(m, n, k, seed=m + i)
        expected = reference.gemm_w4a8(*g[:5], g.bias, g.residual.to(dtype), dtype)
        wide = torch.cat([g.x_q, g.x_q], 1)
        layouts = {
            "dense": (g.x_q, g.w_q4, g.w_group),
            "odd addresses": (unaligned(g.x_q), unaligned(g.w_q4), unaligned(g.w_group)),
            "columns of a wider x": (wide[:, k:], g.w_q4, g.w_group),
            "transposed": (
                g.x_q.T.contiguous().T,
                g.w_q4.T.contiguous().T,
                g.w_group.transpose(0, 1).contiguous().transpose(0, 1),
            ),
        }
        for what, layout in layouts.items():
            x_q, w_q4, w_group = map(compiled.put, layout)
            rest = [compiled.put(t) for t in (g.x_scale, g.w_scale, g.bias, g.residual.to(dtype))]
            y = ops.gemm_w4a8(
                *(x_q, w_q4, w_group, rest[0], rest[1]),
                bias=rest[2], residual=rest[3], out_dtype=dtype,
            )  # fmt: skip
            assert_bitwise_equal(y.cpu(), expected, f"{what} {m} {dtype}")
            count_result()
