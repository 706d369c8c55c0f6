"""The choice of a GEMM's tile: the arithmetic of csrc/gemm/plan.cpp and its tables, compiled without CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import c_gemm, described
from tests.support.c_gemm import Device, Params, Plan
from tests.support.c_interface import INVALID_ARGUMENT, SUCCESS, UNSUPPORTED_SHAPE
from tools.build.plan import ROOT

pytestmark = pytest.mark.compiler

KIB = 1024
#: name -> (GPU, the table that serves it). The last four have no table of their own.
GPUS = {
    "A100": (Device(sms=108, capability=80, shared_bytes=163 * KIB, wgmma=0), "sm80"),
    "RTX 4090": (Device(sms=128, capability=89, shared_bytes=99 * KIB, wgmma=0), "sm89"),
    "L40S": (Device(sms=142, capability=89, shared_bytes=99 * KIB, wgmma=0), "sm89"),
    "H100": (Device(sms=132, capability=90, shared_bytes=227 * KIB, wgmma=1), "sm90"),
    "A10": (Device(sms=72, capability=86, shared_bytes=99 * KIB, wgmma=0), "sm89"),
    "H100, built without 9.0a": (Device(132, 90, 227 * KIB, 0), "sm80"),
    "B200": (Device(sms=148, capability=100, shared_bytes=227 * KIB, wgmma=0), "sm80"),
    "RTX 5090": (Device(sms=170, capability=120, shared_bytes=99 * KIB, wgmma=0), "sm89"),
}
each_gpu = pytest.mark.parametrize("gpu", GPUS)

#: (N, K) of whole layers and of a tensor-parallel rank's part: LLaMA, OPT, Mistral, Qwen, small ones, vocabularies.
LAYERS = (
    (4096, 4096), (12288, 4096), (22016, 4096), (4096, 11008), (1024, 4096), (6144, 4096),
    (5120, 5120), (20480, 5120), (5120, 20480), (7168, 7168), (28672, 7168), (7168, 28672),
    (8192, 8192), (57344, 8192), (8192, 28672), (10240, 8192), (1280, 8192), (8192, 1024),
    (2048, 2048), (3072, 768), (768, 3072), (1536, 576), (576, 1536), (49152, 576), (128256, 4096),
    (1024, 16384),
)  # fmt: skip
#: Every small M, then both sides of the tiles' edges.
TOKENS = (*range(1, 600), *(m + i for m in range(640, 4097, 64) for i in (0, 1)), 8192, 16384)
#: Rows that the estimate never prefers, because it takes the first of equal tiles. Measurements may prefer them. The
#: large tiles of mma.sync equal two of 128x128, whose two blocks on an SM hide each other's first and last clocks.
FOR_THE_TUNER = {
    ("sm80", "16x64x128"),
    ("sm80", "128x256x64"),
    ("sm89", "256x128x64"),
    ("sm90", "256x128x128"),
}


def compiled(folder: Path, *flags: str, root: Path = ROOT) -> ctypes.CDLL:
    """The plans and tables of this checkout, or of a copy of it."""
    return c_gemm.declare_plans(described.copied(folder, *flags, root=root))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("gemm_plan"))


@pytest.fixture(scope="module")
def tuning_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """With the candidates of a tuning build."""
    return compiled(tmp_path_factory.mktemp("gemm_plan_tuning"), "-DSQK_TUNING=1")


def params(m: int, n: int, k: int, **more: Any) -> Params:
    """A problem with aligned addresses, which are never read."""
    stride = -(-k // c_gemm.ALIGNMENT) * c_gemm.ALIGNMENT
    p = Params(m=m, n=n, k=k, x_q=4096, w_q=4096, x_scale=4096, w_scale=4096, y=4096, tile=-1)
    p.x_q_stride = p.w_q_stride = stride
    p.y_stride, p.y_dtype = n, 1
    for name, value in more.items():
        setattr(p, name, value)
    return p


def w4(m: int, n: int, k: int, **more: Any) -> Params:
    """The same with weights of 4 bits."""
    return params(m, n, k, **{"w_group": 4096, "w_q_stride": 64 * -(-k // 128), **more})


def forced(tile: dict[str, Any], m: int, n: int, k: int, **more: Any) -> Params:
    """A problem that takes this row, with int8 weights where the row serves them."""
    return (w4 if tile["w4_only"] else params)(m, n, k, tile=tile["tile"], **more)


def for_int8(tiles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [tile for tile in tiles if not tile["w4_only"]]


def plan(library: ctypes.CDLL, p: Params, device: Device) -> Plan:
    status, found = c_gemm.plan(library, p, device)
    assert status == SUCCESS
    return found


def rows(library: ctypes.CDLL, gpu: str) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = c_gemm.tables(library)[GPUS[gpu][1]]["tiles"]
    return table


def assert_can_be_launched(
    p: Params, found: Plan, device: Device, tiles: list[dict[str, Any]]
) -> None:
    """The plan is complete, keeps the limits of the GPU and the tile, and has the workspace of splits.h."""
    tile = tiles[found.tile]
    assert tile["tile"] == found.tile and found.launches == 1 and found.overlap == 0
    assert tile["kernel"] != "stream" or p.m <= tile["m"]
    assert (tile["kernel"] == "wgmma") <= bool(device.wgmma)
    assert found.shared_bytes == tile["shared_bytes"] <= device.shared_bytes
    whole = 1
    for size, side, cluster in zip((p.m, p.n), ("m", "n"), tile["cluster"], strict=True):
        across = -(-size // (tile[side] * cluster)) * cluster
        assert (across - cluster) * tile[side] < size <= across * tile[side]
        whole *= across
    k_tiles = -(-p.k // tile["k"])
    assert found.tiles == whole and found.blocks == whole * found.splits < 1 << 31
    assert 1 <= found.splits <= min(tile["most_splits"], k_tiles)
    counters, slots = -(-4 * whole // 256) * 256, 4 * whole * found.splits * tile["m"] * tile["n"]
    expected = (counters, counters + slots) if found.splits > 1 else (0, 0)
    assert (found.counter_bytes, found.workspace_bytes) == expected
    assert 0 < found.expected_clocks < float("inf")


def sweep(library: ctypes.CDLL, gpu: str) -> Iterator[tuple[int, int, list[tuple[int, Plan]]]]:
    """(N, K, [(M, plan), ...]) of every layer."""
    device = GPUS[gpu][0]
    for n, k in LAYERS:
        yield n, k, [(m, plan(library, params(m, n, k), device)) for m in TOKENS]


# --- the tables -------------------------------------------------------------------------------------


@each_gpu
def test_the_table_of_a_gpu(library: ctypes.CDLL, gpu: str) -> None:
    device, table = GPUS[gpu]
    found = plan(library, params(64, 4096, 4096), device)
    assert c_gemm.TABLES[found.table] == table
    for tile in rows(library, gpu):
        assert tile["shared_bytes"] <= device.shared_bytes, "every row can be forced"


def test_the_tables_are_complete(library: ctypes.CDLL) -> None:
    tables = c_gemm.tables(library)
    assert tuple(tables) == c_gemm.TABLES, "each file in gemm/tiles is in SQK_GEMM_TABLES"
    assert {table for _, table in GPUS.values()} == set(tables), "each table serves a GPU"
    for table in tables.values():
        tiles, rules = table["tiles"], table["rules"]
        assert [tile["tile"] for tile in tiles] == list(range(len(tiles)))
        assert len({tile["name"] for tile in tiles}) == len(tiles)
        most = [rule["most_m"] for rule in rules]
        assert most == sorted(set(most)) and most[-1] >= 1 << 40
        for rule in rules:
            assert rule["tiles"] and len(set(rule["tiles"])) == len(rule["tiles"])
            assert rule["when"] and rule["why"]
        wanted = {tile for rule in rules for tile in rule["tiles"]}
        assert wanted == {tile["tile"] for tile in for_int8(tiles)}, "a row that no rule names"


@pytest.mark.parametrize("table", c_gemm.TABLES)
def test_candidates_come_after_the_shipped_rows(
    library: ctypes.CDLL, tuning_library: ctypes.CDLL, table: str
) -> None:
    """No plan takes a candidate by itself, so a tuning build runs like any other."""
    shipped, tuning = (c_gemm.tables(built)[table] for built in (library, tuning_library))
    whole, count = tuning["tiles"], len(shipped["tiles"])
    assert whole[:count] == shipped["tiles"] and tuning["rules"] == shipped["rules"]
    assert not any(tile["candidate"] for tile in shipped["tiles"])
    assert len(whole) > count and all(tile["candidate"] for tile in whole[count:])
    assert [tile["tile"] for tile in whole] == list(range(len(whole)))
    assert len({tile["name"] for tile in whole}) == len(whole)
    device = next(device for device, own in GPUS.values() if own == table)
    for m, n, k in ((1, 4096, 4096), (40, 768, 3072), (333, 12288, 4096), (4096, 4096, 11008)):
        p = params(m, n, k)
        assert bytes(plan(tuning_library, p, device)) == bytes(plan(library, p, device))
    for tile in whole[count:]:
        for m in (1, tile["m"]):
            p = forced(tile, m, 4096, 4096)
            assert_can_be_launched(p, plan(tuning_library, p, device), device, whole)


@pytest.mark.parametrize("table", c_gemm.TABLES)
def test_every_tile_is_used(library: ctypes.CDLL, table: str) -> None:
    """Each tile is taken for some layer on some GPU, except those named above."""
    tiles = c_gemm.tables(library)[table]["tiles"]
    names = [tile["name"] for tile in tiles]
    taken = set()
    for gpu in (gpu for gpu, (_, own) in GPUS.items() if own == table):
        for _, _, plans in sweep(library, gpu):
            taken |= {names[found.tile] for _, found in plans}
    never = {(table, tile["name"]) for tile in for_int8(tiles)} - {(table, name) for name in taken}
    assert never == {row for row in FOR_THE_TUNER if row[0] == table}


@each_gpu
def test_the_choice_is_that_of_the_plan(library: ctypes.CDLL, gpu: str) -> None:
    device, table = GPUS[gpu]
    for n, k in LAYERS:
        for m in (1, 9, 17, 100, 300, 5000):
            found = plan(library, params(m, n, k), device)
            choice = c_gemm.choice(library, m, n, k, device)
            clocks = choice.pop("expected_clocks")
            assert clocks == found.expected_clocks
            names = (
                "tile",
                "splits",
                "launches",
                "tiles",
                "blocks",
                "shared_bytes",
                "workspace_bytes",
            )
            expected = {"table": table, **{name: getattr(found, name) for name in names}}
            assert {name: choice[name] for name in expected} == expected
    for m, n, k in ((0, 8, 8), (-1, 8, 8), (8, 0, 8), (8, 8, 0), (8, 8, 131072)):
        assert c_gemm.choice(library, m, n, k, device) == {}


# --- the plans --------------------------------------------------------------------------------------


@each_gpu
def test_every_layer_has_a_plan(library: ctypes.CDLL, gpu: str) -> None:
    device, tiles = GPUS[gpu][0], rows(library, gpu)
    for n, k, plans in sweep(library, gpu):
        for m, found in plans:
            assert_can_be_launched(params(m, n, k), found, device, tiles)


@each_gpu
def test_no_cliff(library: ctypes.CDLL, gpu: str) -> None:
    """One more token costs at most one wave: twice the work, and a little more if more SMs then share L2's bandwidth.

    More tokens also never take much less time.
    """
    jumps, drops = [], []
    for n, k, plans in sweep(library, gpu):
        most = 0.0
        for (m, one), (m_next, next_one) in pairwise(plans):
            most = max(most, one.expected_clocks)
            if m_next == m + 1 and next_one.expected_clocks > 2.2 * one.expected_clocks:
                jumps.append((m_next, n, k, next_one.expected_clocks / one.expected_clocks))
            if next_one.expected_clocks < 0.65 * most:
                drops.append((m_next, n, k, next_one.expected_clocks / most))
    assert not jumps and not drops


@pytest.mark.parametrize("table", c_gemm.TABLES)
def test_every_tile_can_be_forced(library: ctypes.CDLL, table: str) -> None:
    gpu = next(gpu for gpu, (_, own) in GPUS.items() if own == table)
    device, tiles = GPUS[gpu][0], rows(library, gpu)
    for tile in tiles:
        for m, n, k in ((1, 1, 1), (tile["m"], 4096, 4096), (8, 100, 131071)):
            for splits in range(tile["most_splits"] + 1):
                p = forced(tile, m, n, k, splits=splits)
                found = plan(library, p, device)
                assert_can_be_launched(p, found, device, tiles)
                assert found.tile == tile["tile"]
                assert splits in (0, found.splits) or found.splits == -(-k // tile["k"])
        refused = forced(tile, 1, 64, 4096, splits=tile["most_splits"] + 1)
        assert c_gemm.plan(library, refused, device)[0] == UNSUPPORTED_SHAPE
        if tile["kernel"] == "stream":
            refused = forced(tile, tile["m"] + 1, 64, 64)
            assert c_gemm.plan(library, refused, device)[0] == UNSUPPORTED_SHAPE
    beyond = params(1, 1, 1, tile=len(tiles))
    assert c_gemm.plan(library, beyond, device)[0] == INVALID_ARGUMENT


def test_a_tile_that_does_not_fit_the_gpu_is_refused_and_never_chosen(
    library: ctypes.CDLL,
) -> None:
    small = Device(sms=132, capability=90, shared_bytes=64 * KIB, wgmma=1)
    for tile in rows(library, "H100"):
        p = forced(tile, 5, 4096, 4096)
        fits = tile["shared_bytes"] <= small.shared_bytes
        assert c_gemm.plan(library, p, small)[0] == (SUCCESS if fits else UNSUPPORTED_SHAPE)
    assert plan(library, params(5, 4096, 4096), small).shared_bytes <= small.shared_bytes
    assert c_gemm.plan(library, params(5000, 4096, 4096), small)[0] == UNSUPPORTED_SHAPE


def test_no_tokens_need_no_launch(library: ctypes.CDLL) -> None:
    found = plan(library, params(0, 64, 64), GPUS["H100"][0])
    assert (found.launches, found.blocks, found.workspace_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"m": -1}, {"n": 0}, {"n": -5}, {"k": 0}, {"k": 131072}, {"m": (1 << 30) + 1}, {"n": (1 << 30) + 1},
        {"y_dtype": 4}, {"y_dtype": -1}, {"tile": -2}, {"splits": -1}, {"relu": 1},
        {"x_q": 4100}, {"w_q": 4104}, {"x_q_stride": 72}, {"w_q_stride": 72}, {"x_q_stride": 48},
        {"w_q_stride": 48}, {"x_q_stride": -64}, {"y_stride": 63}, {"out_scale": 4096}, {"y_dtype": 3},
        {"y_dtype": 3, "out_scale": 4096, "residual": 4096}, {"residual": 4096, "residual_dtype": 3},
        {"residual": 4096, "residual_dtype": -1}, {"x_q_stride": 1 << 40}, {"w_q_stride": 1 << 40},
    ],
    ids=str,
)  # fmt: skip
def test_refused(library: ctypes.CDLL, change: dict[str, int]) -> None:
    p = params(**{"m": 4, "n": 64, "k": 64, **change})
    for device, _ in GPUS.values():
        assert c_gemm.plan(library, p, device)[0] == INVALID_ARGUMENT


def test_the_limits_are_allowed(library: ctypes.CDLL) -> None:
    device = GPUS["H100"][0]
    requant = {"y_dtype": 3, "out_scale": 4, "relu": 1}
    for p in (
        params(4, 64, 131071),
        params(4, 64, 64, **requant),
        params(1, 1, 17, x_q_stride=1, w_q_stride=3, y_stride=0),  # strides of one row: unused
        params(4, 64, 64, y=4097, y_stride=65, residual=4097, residual_stride=64),
        params(1 << 30, 64, 64),
    ):
        plan(library, p, device)


def test_alignment_and_types_do_not_change_the_choice(library: ctypes.CDLL) -> None:
    """A view of y or another output type takes the same tile, so the sums have the same bits."""
    for gpu, (device, _) in GPUS.items():
        for m in (1, 30, 700):
            found = plan(library, params(m, 4096, 4096), device)
            changes: dict[str, Any]
            for changes in ({"y": 4098}, {"y_dtype": 0}, {"y_dtype": 3, "out_scale": 4}):
                other = plan(library, params(m, 4096, 4096, **changes), device)
                assert bytes(other) == bytes(found), gpu


@settings(deadline=None, max_examples=400)
@given(
    m=st.integers(0, 1 << 20) | st.integers(0, 300),
    n=st.integers(1, 1 << 18) | st.integers(1, 300),
    k=st.integers(1, 131071) | st.integers(1, 300),
    gpu=st.sampled_from(sorted(GPUS)),
    sms=st.none() | st.integers(1, 200),
    tile=st.integers(-1, 20),
    splits=st.integers(0, 9),
)
def test_every_plan_can_be_launched(
    library: ctypes.CDLL,
    m: int,
    n: int,
    k: int,
    gpu: str,
    sms: int | None,
    tile: int,
    splits: int,
) -> None:
    given_gpu, tiles = GPUS[gpu][0], rows(library, gpu)
    device = Device(
        sms or given_gpu.sms, given_gpu.capability, given_gpu.shared_bytes, given_gpu.wgmma
    )
    p = params(m, n, k, tile=tile, splits=splits)
    status, found = c_gemm.plan(library, p, device)
    if tile >= len(tiles):
        assert status == INVALID_ARGUMENT
    elif m == 0:
        assert status == SUCCESS and found.launches == 0
    elif status == SUCCESS:
        assert_can_be_launched(p, found, device, tiles)
        assert tile in (-1, found.tile)
    else:
        assert status == UNSUPPORTED_SHAPE and (tile >= 0 or splits > 0)
        p.tile, p.splits = -1, 0
        assert_can_be_launched(p, plan(library, p, device), device, tiles)
