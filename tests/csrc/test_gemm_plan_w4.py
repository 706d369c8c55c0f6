"""The plans of GEMMs with weights of 4 bits, without CUDA: which rows serve, what they cost, what is refused."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any

import pytest

from tests.csrc.test_gemm_plan import (
    GPUS,
    LAYERS,
    TOKENS,
    assert_can_be_launched,
    compiled,
    each_gpu,
    params,
    plan,
    rows,
    w4,
)
from tests.support import c_gemm
from tests.support.c_gemm import Device
from tests.support.c_interface import EXCLUDED_TILE, INVALID_ARGUMENT, SUCCESS, UNSUPPORTED_SHAPE

pytestmark = pytest.mark.compiler

#: GPUs whose table has rows for any number of tokens.
each_gpu_of_mma = pytest.mark.parametrize("gpu", [gpu for gpu, (_, own) in GPUS.items() if own != "sm90"])  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("gemm_w4"))


def serves(tile: dict[str, Any], m: int) -> bool:
    return bool(tile["w4"] and (tile["kernel"] != "stream" or m <= tile["m"]))


@each_gpu
def test_every_layer_takes_a_row_for_4_bits(library: ctypes.CDLL, gpu: str) -> None:
    device, tiles = GPUS[gpu][0], rows(library, gpu)
    taken = set()
    for n, k in LAYERS:
        for m in TOKENS[::7]:
            status, found = c_gemm.plan(library, w4(m, n, k), device)
            if not any(serves(tile, m) for tile in tiles):
                assert status == UNSUPPORTED_SHAPE
                continue
            assert status == SUCCESS
            assert_can_be_launched(w4(m, n, k), found, device, tiles)
            assert serves(tiles[found.tile], m)
            taken.add(tiles[found.tile]["name"])
    assert taken or not any(tile["w4"] for tile in tiles)


@pytest.mark.parametrize("table", ["sm80", "sm89"])
def test_every_row_for_4_bits_is_used(library: ctypes.CDLL, table: str) -> None:
    tiles = c_gemm.tables(library)[table]["tiles"]
    taken = set()
    for gpu in (gpu for gpu, (_, own) in GPUS.items() if own == table):
        for n, k in LAYERS:
            taken |= {plan(library, w4(m, n, k), GPUS[gpu][0]).tile for m in TOKENS[::5]}
    assert taken >= {tile["tile"] for tile in tiles if tile["w4_only"]}


@each_gpu
def test_a_row_is_forced_for_the_weights_that_it_serves(library: ctypes.CDLL, gpu: str) -> None:
    device = GPUS[gpu][0]
    for tile in rows(library, gpu):
        for problem, allowed in ((params, not tile["w4_only"]), (w4, tile["w4"])):
            status, _ = c_gemm.plan(library, problem(8, 64, 256, tile=tile["tile"]), device)
            assert status == (SUCCESS if allowed else UNSUPPORTED_SHAPE), tile["name"]


@each_gpu
def test_int8_takes_the_same_rows_as_ever(library: ctypes.CDLL, gpu: str) -> None:
    device, tiles = GPUS[gpu][0], rows(library, gpu)
    for n, k in LAYERS:
        for m in TOKENS[::11]:
            assert not tiles[plan(library, params(m, n, k), device).tile]["w4_only"]


def test_a_row_for_4_bits_has_the_shared_memory_of_its_stages(library: ctypes.CDLL) -> None:
    """Tokens of 128 bytes, channels of 64 and two for the step and the offset; two blocks fit an SM."""
    for table, per_sm in (("sm80", 164), ("sm89", 100)):
        for tile in c_gemm.tables(library)[table]["tiles"]:
            if tile["kernel"] != "mma" or not tile["w4_only"]:
                continue
            assert tile["k"] == 128 and tile["name"].startswith("w4 ")
            assert tile["shared_bytes"] == tile["stages"] * (128 * tile["m"] + 66 * tile["n"])
            assert 2 * (tile["shared_bytes"] + 1024) <= per_sm * 1024, tile["name"]


@each_gpu_of_mma
def test_few_tokens_cost_half_of_int8(library: ctypes.CDLL, gpu: str) -> None:
    """Reading the weights takes the time: 66 bytes for 128 of them."""
    device = GPUS[gpu][0]
    for n, k in ((28672, 8192), (22016, 4096), (8192, 28672)):
        for m in (20, 32):
            clocks = [plan(library, made(m, n, k), device).expected_clocks for made in (w4, params)]
            assert 0.45 < clocks[0] / clocks[1] < 0.75, (m, n, k, clocks)
        many = [plan(library, made(4096, n, k), device).expected_clocks for made in (w4, params)]
        assert 0.95 < many[0] / many[1] < 1.3, (n, k, many)


@each_gpu_of_mma
def test_no_cliff(library: ctypes.CDLL, gpu: str) -> None:
    """As for int8."""
    device = GPUS[gpu][0]
    for n, k in LAYERS[::3]:
        plans = [(m, plan(library, w4(m, n, k), device).expected_clocks) for m in TOKENS]
        most = 0.0
        for (m, one), (m_next, next_one) in pairwise(plans):
            most = max(most, one)
            assert m_next != m + 1 or next_one < 2.2 * one, (m, n, k)
            assert next_one > 0.65 * most, (m, n, k)


def test_measured_rows_are_for_int8(library: ctypes.CDLL) -> None:
    device, table = GPUS["A100"]
    tiles = c_gemm.tables(library)[table]["tiles"]
    index = c_gemm.TABLES.index(table)
    other = next(t["tile"] for t in tiles if t["name"] == "128x256x64")

    def use(tile: int) -> int:
        row = c_gemm.Measured(4096, 4096, 64, tile, 1)
        one = (ctypes.byref(row), ctypes.c_int64(1))
        status: int = library.sqk_gemm_use_measured(index, device.sms, *one)
        return status

    before = bytes(plan(library, w4(64, 4096, 4096), device))
    try:
        for tile in tiles:
            allowed = not tile["w4_only"] and tile["kernel"] != "stream"  # 64 tokens
            assert use(tile["tile"]) == (SUCCESS if allowed else INVALID_ARGUMENT), tile["name"]
        assert use(other) == SUCCESS
        assert plan(library, params(64, 4096, 4096), device).tile == other
        assert bytes(plan(library, w4(64, 4096, 4096), device)) == before
    finally:
        library.sqk_gemm_use_measured(index, device.sms, None, ctypes.c_int64(0))


def test_other_rows_replace_an_excluded_one(library: ctypes.CDLL) -> None:
    device, table = GPUS["A100"]
    tiles = [tile for tile in c_gemm.tables(library)[table]["tiles"] if tile["w4"]]
    mma = [tile for tile in tiles if tile["kernel"] == "mma"]
    try:
        for tile in mma:
            library.sqk_gemm_without_tiles(tile["id"].encode())
            assert c_gemm.plan(library, w4(64, 64, 256, tile=tile["tile"]), device)[0] == EXCLUDED_TILE  # fmt: skip
            for m in (1, 40, 1000):
                assert plan(library, w4(m, 4096, 4096), device).tile != tile["tile"]
        library.sqk_gemm_without_tiles(",".join(tile["id"] for tile in tiles).encode())
        assert c_gemm.plan(library, w4(64, 4096, 4096), device)[0] == EXCLUDED_TILE
        plan(library, params(64, 4096, 4096), device)
    finally:
        library.sqk_gemm_without_tiles(b"")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"w_group": 4104}, INVALID_ARGUMENT),
        ({"w_q": 4104}, INVALID_ARGUMENT),
        ({"w_q_stride": 112}, INVALID_ARGUMENT),  # 128 bytes hold two groups
        ({"w_q_stride": 136}, INVALID_ARGUMENT),
        ({"y_dtype": 3, "out_scale": 4096}, INVALID_ARGUMENT),
        ({"activation": 6}, INVALID_ARGUMENT),
        ({"k": 131072}, INVALID_ARGUMENT),
        ({"splits": 99}, UNSUPPORTED_SHAPE),
        ({"n": 1, "w_q_stride": 5}, SUCCESS),
        ({"w_q_stride": 144}, SUCCESS),
        ({"m": 0}, SUCCESS),
    ],
    ids=str,
)
def test_refused(library: ctypes.CDLL, change: dict[str, int], status: int) -> None:
    p = w4(4, 64, 200)
    for name, value in change.items():
        setattr(p, name, value)
    assert c_gemm.plan(library, p, GPUS["A100"][0])[0] == status


def test_a_gpu_with_too_little_shared_memory_has_no_plan(library: ctypes.CDLL) -> None:
    turing = Device(sms=40, capability=75, shared_bytes=64 * 1024, wgmma=0)
    assert plan(library, w4(64, 4096, 4096), turing).shared_bytes <= turing.shared_bytes
    tiny = Device(sms=40, capability=75, shared_bytes=32 * 1024, wgmma=0)
    assert c_gemm.plan(library, w4(64, 4096, 4096), tiny)[0] == UNSUPPORTED_SHAPE


@each_gpu
def test_few_tokens_are_streamed_if_they_fit(library: ctypes.CDLL, gpu: str) -> None:
    """All activations of a streaming kernel are in shared memory, next to the weights of four warps."""
    device, tiles = GPUS[gpu][0], rows(library, gpu)
    for m in (1, 8, 9, 16):
        stream = next(tile for tile in tiles if tile["kernel"] == "stream" and m <= tile["m"])
        others = any(serves(tile, m) and tile["kernel"] != "stream" for tile in tiles)
        for k in (4096, 40960):
            fits = m * k + 4 * 6432 <= device.shared_bytes - 2500
            assert fits == (m == 1 or k == 4096)
            status, _ = c_gemm.plan(library, w4(m, 8192, k, tile=stream["tile"]), device)
            assert status == (SUCCESS if fits else UNSUPPORTED_SHAPE)
            if fits or others:
                found = plan(library, w4(m, 8192, k), device)
                assert (tiles[found.tile]["kernel"] == "stream") == fits
