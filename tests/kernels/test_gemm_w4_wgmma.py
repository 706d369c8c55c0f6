"""What Hopper's GEMM with weights of 4 bits has of its own: persistent blocks whose ring of stages goes on from tile to
tile, tiles in groups along m, and loads of weights before the kernel before it has ended.

test_gemm_w4_tiles.py compares sizes, types, values and splits of every row with the reference.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any

import pytest
import torch

from smoothquant_kernels import ops, reference
from tests.kernels.test_gemm_c_entry import Output, run
from tests.kernels.test_gemm_w4_tiles import Problem
from tests.support import backends, c_gemm, cases
from tests.support.backends import Backend
from tests.support.c_interface import SUCCESS
from tests.support.compare import assert_bitwise_equal, count_result


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`wgmma`: each row of the GPU that unpacks weights of 4 bits for wgmma; none but Hopper's."""
    if "wgmma" in metafunc.fixturenames:
        rows = backends.gemm_tiles(metafunc.config.getoption("--backend"), w4=True)
        tiles = [row for row in rows if row["kernel"] == "wgmma" and not row.get("excluded")]
        metafunc.parametrize("wgmma", tiles, ids=[row["name"].replace(" ", "_") for row in tiles])


def check(
    backend: Backend, library: ctypes.CDLL, tile: dict[str, Any], splits: int = 0, **case: Any
) -> None:
    problem = Problem(backend, case, torch.float16)
    assert run(library, backend, problem.params(tile["tile"], splits)) == SUCCESS
    problem.output.check(problem.expected, f"{tile['name']} {splits} {case}")


def test_smoke_w4_wgmma(compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]) -> None:
    for splits in sorted({1, wgmma["most_splits"]}):
        check(compiled, library, wgmma, splits, m=min(wgmma["m"], 35), n=35, k=1100)


def test_no_tokens(compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]) -> None:
    w = c_gemm.Params(n=8, k=8, w_q_stride=64, w_group=4096, y_dtype=1, tile=wgmma["tile"])
    assert library.sqk_gemm_s8(byref(w), None) == SUCCESS


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_ring_goes_on_from_tile_to_tile(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any], groups: int
) -> None:
    """A block computes several tiles along n, or parts of tiles, which begin and end anywhere in the ring."""
    units = 2 * c_gemm.current_device(library).sms + 1
    n, k = units * wgmma["n"] - 5, 128 * groups - 28
    for splits in range(1, min(groups, wgmma["most_splits"]) + 1):
        check(compiled, library, wgmma, splits, m=9, n=n, k=k, extra=1)


def test_tiles_in_groups_along_m(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any]
) -> None:
    """More than 2048 tokens: the last group of tiles is smaller. An odd number of tiles along n."""
    check(compiled, library, wgmma, m=2 * 2048 + wgmma["m"] + 1, n=2 * wgmma["n"] + 1, k=20)


@pytest.mark.parametrize("constant", [False, True])
def test_a_chain_of_kernels(
    compiled: Backend, library: ctypes.CDLL, wgmma: dict[str, Any], constant: bool
) -> None:
    """The kernels before write x_q and x_scale, and, if nobody promises that they are constant, the weights.

    The GEMM may start before they have ended (tests/csrc/test_overlap.py).
    """
    m, n, k = min(wgmma["m"], 37), 150, 600
    g = cases.w4_operands(m, n, k)
    x = cases.activations(m, k, torch.float16)
    # Any bytes are packed values, so the quantizer writes some. Offsets with which each value is an int8:
    source = cases.activations(n, g.w_q4.shape[1], torch.float16, seed=1)
    step = g.w_group[..., 0].int()
    offset = g.w_group[..., 1].int().minimum(127 - 15 * step)
    w_group = torch.stack([step, offset], -1).to(torch.int8)
    w_q4 = g.w_q4 if constant else reference.quantize(source)[0].view(torch.uint8)
    x_q, x_scale = reference.quantize(x)
    expected = reference.gemm_w4a8(x_q, w_q4, w_group, x_scale, g.w_scale)
    output = Output(compiled, m, n, torch.float16, True)
    x, source, w_q4, w_group, w_scale = map(compiled.put, (x, source, w_q4, w_group, g.w_scale))
    for turn in range(2):
        found, found_scale = ops.quantize(x, k_multiple=16)
        if not constant:
            w_q4 = ops.quantize(source)[0]
        params = c_gemm.params_of(
            *(found[:, :k], w_q4, found_scale, w_scale, output.y),
            w_group=w_group,
            tile=wgmma["tile"],
        )
        params.w_constant = constant
        assert run(library, compiled, params) == SUCCESS
        output.check(expected, f"{wgmma['name']}, turn {turn}")


@pytest.mark.parametrize("m", [1, 17, 40, 70, 130, 300])
def test_the_op(compiled: Backend, m: int) -> None:
    """The op takes a row that the plan chooses, and so does the whole layer."""
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
