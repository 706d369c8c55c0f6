"""`SQK_WITHOUT_TILES`: rows of the GEMM tables that no plan takes (csrc/gemm/excluded.cpp, compiled without CUDA)."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.csrc.test_gemm_plan import (
    GPUS,
    LAYERS,
    assert_can_be_launched,
    compiled,
    for_int8,
    forced,
    params,
    plan,
)
from tests.support import c_gemm
from tests.support.c_gemm import Measured, Plan
from tests.support.c_interface import EXCLUDED_TILE, SUCCESS, UNKNOWN_TILE, UNSUPPORTED_SHAPE

VARIABLE = "SQK_WITHOUT_TILES"
H100 = GPUS["H100"][0]
TOKENS = (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300, 513, 4096)


pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("gemm_without"))


@pytest.fixture
def library(built: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    """Allows all rows again afterwards."""
    assert without(built, "") == SUCCESS
    yield built
    assert without(built, "") == SUCCESS


def without(library: ctypes.CDLL, names: str | None) -> int:
    status: int = library.sqk_gemm_without_tiles(None if names is None else names.encode())
    return status


def excluded(library: ctypes.CDLL) -> set[str]:
    tables = c_gemm.tables(library).values()
    return {tile["id"] for table in tables for tile in table["tiles"] if tile["excluded"]}


def tiles_of(library: ctypes.CDLL, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = c_gemm.tables(library)[table]["tiles"]
    return rows


def name_of(library: ctypes.CDLL, found: Plan) -> str:
    name: str = tiles_of(library, c_gemm.TABLES[found.table])[found.tile]["name"]
    return name


def test_every_row_has_a_name_of_one_word(library: ctypes.CDLL) -> None:
    names = []
    for name, table in c_gemm.tables(library).items():
        for tile in table["tiles"]:
            assert tile["id"] == f"{name}/{tile['name'].replace(' ', '-')}"
            assert not tile["excluded"]
            names.append(tile["id"])
    assert len(set(names)) == len(names)
    assert {"sm90/64x128x128-swap-stream-K", "sm80/stream-8x16"} <= set(names)


@pytest.mark.parametrize("gpu", ["H100", "A100", "L40S"])
def test_other_rows_replace_an_excluded_one(library: ctypes.CDLL, gpu: str) -> None:
    """Plans that took the excluded row take another one; all other plans stay the same."""
    device, table = GPUS[gpu]
    sizes = [(m, n, k) for n, k in LAYERS[:8] for m in TOKENS]
    tiles = tiles_of(library, table)
    before = {size: plan(library, params(*size), device) for size in sizes}
    moved = set()
    for tile in for_int8(tiles):
        assert without(library, tile["id"]) == SUCCESS
        assert excluded(library) == {tile["id"]}
        for size in sizes:
            p = params(*size)
            found = plan(library, p, device)
            assert_can_be_launched(p, found, device, tiles)
            assert found.tile != tile["tile"]
            if before[size].tile != tile["tile"]:
                assert bytes(found) == bytes(before[size])
            else:
                moved.add(tile["tile"])
        p = forced(tile, min(8, tile["m"]), 4096, 4096)
        assert c_gemm.plan(library, p, device)[0] == EXCLUDED_TILE
    assert moved == {found.tile for found in before.values()}
    assert without(library, "") == SUCCESS
    for size in sizes:
        assert bytes(plan(library, params(*size), device)) == bytes(before[size])


@pytest.mark.parametrize("gpu", ["H100", "A100", "L40S"])
def test_any_one_tile_is_enough(library: ctypes.CDLL, gpu: str) -> None:
    """A streaming tile is enough for the tokens that it holds. Beyond, and without any tile, the plan says why."""
    device, table = GPUS[gpu]
    tiles = for_int8(tiles_of(library, table))
    for left in tiles:
        names = ",".join(tile["id"] for tile in tiles if tile is not left)
        assert without(library, names) == SUCCESS
        for m in TOKENS:
            status, found = c_gemm.plan(library, params(m, 4096, 4096), device)
            if left["kernel"] == "stream" and m > left["m"]:
                assert status == EXCLUDED_TILE
            else:
                assert status == SUCCESS and found.tile == left["tile"]
    assert without(library, ",".join(tile["id"] for tile in tiles)) == SUCCESS
    for m in TOKENS:
        assert c_gemm.plan(library, params(m, 4096, 4096), device)[0] == EXCLUDED_TILE
    assert c_gemm.plan(library, params(0, 4096, 4096), device)[0] == SUCCESS
    for other, own in GPUS.values():
        if own != table:
            assert c_gemm.plan(library, params(64, 4096, 4096), other)[0] == SUCCESS


def test_a_problem_that_never_fits_is_not_blamed_on_the_list(library: ctypes.CDLL) -> None:
    small = c_gemm.Device(sms=132, capability=90, shared_bytes=64 << 10, wgmma=1)
    assert without(library, "sm90/64x128x128") == SUCCESS
    assert c_gemm.plan(library, params(5000, 64, 64), small)[0] == UNSUPPORTED_SHAPE


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", set()),
        (" , ,\n", set()),
        ("sm90/128x256x128", {"sm90/128x256x128"}),
        (" sm90/128x256x128 ,", {"sm90/128x256x128"}),
        ("sm90/128x256x128 stream-K", {"sm90/128x256x128-stream-K"}),
        ("stream 16x16", {f"{table}/stream-16x16" for table in c_gemm.TABLES}),
        ("64x128x128,sm80/16x64x128", {"sm90/64x128x128", "sm80/64x128x128", "sm80/16x64x128"}),
    ],
    ids=lambda value: repr(value) if isinstance(value, str) else "",  # sets have no order
)
def test_how_rows_are_named(library: ctypes.CDLL, names: str, expected: set[str]) -> None:
    assert without(library, names) == SUCCESS
    assert excluded(library) == expected


@pytest.mark.parametrize(
    "wrong", ["sm90/1x2x3", "sm75/stream-8x16", "128X256x128", "all", "*", "64x128", "7", "sm90/"]
)
def test_an_unknown_name_changes_nothing(library: ctypes.CDLL, wrong: str) -> None:
    assert without(library, "sm90/64x128x128") == SUCCESS
    assert without(library, f"stream-8x16,{wrong}") == UNKNOWN_TILE
    assert excluded(library) == {"sm90/64x128x128"}


def test_the_environment_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first plan. An unknown name then stops every plan, so that a broken tile is never taken silently."""
    monkeypatch.setenv(VARIABLE, "sm90/stream-8x16, stream-16x16")
    (tmp_path / "right").mkdir()
    fresh = compiled(tmp_path / "right")
    assert name_of(fresh, plan(fresh, params(1, 4096, 4096), H100)) == "16x64x256 swap"
    monkeypatch.setenv(VARIABLE, "sm90/2x2")
    assert name_of(fresh, plan(fresh, params(1, 4096, 4096), H100)) == "16x64x256 swap"
    assert excluded(fresh) == {"sm90/stream-8x16"} | {f"{t}/stream-16x16" for t in c_gemm.TABLES}
    # read again on request
    assert without(fresh, None) == UNKNOWN_TILE
    for m in (0, 1, 5000):
        for tile in (-1, 8):
            p = params(m, 4096, 4096, tile=tile)
            assert c_gemm.plan(fresh, p, H100)[0] == UNKNOWN_TILE
    assert c_gemm.choice(fresh, 1, 4096, 4096, H100) == {}
    monkeypatch.delenv(VARIABLE)
    assert without(fresh, None) == SUCCESS
    assert name_of(fresh, plan(fresh, params(1, 4096, 4096), H100)) == "stream 8x16"
    assert VARIABLE not in os.environ


def test_an_excluded_tile_is_not_taken_even_if_measured(library: ctypes.CDLL) -> None:
    measured = "128x128x128 stream-K"
    (row,) = (t["tile"] for t in tiles_of(library, "sm90") if t["name"] == measured)
    rows = (Measured * 1)(Measured(4096, 4096, 64, row, 1))
    rules = plan(library, params(64, 4096, 4096), H100).tile
    assert library.sqk_gemm_use_measured(2, 132, rows, ctypes.c_int64(1)) == SUCCESS
    try:
        assert plan(library, params(64, 4096, 4096), H100).tile == row != rules
        assert without(library, "sm90/128x128x128-stream-K") == SUCCESS
        assert plan(library, params(64, 4096, 4096), H100).tile == rules
    finally:
        assert library.sqk_gemm_use_measured(2, 132, None, ctypes.c_int64(0)) == SUCCESS


def test_plans_on_other_threads_see_one_list_or_the_other(library: ctypes.CDLL) -> None:
    first = plan(library, params(64, 4096, 4096), H100).tile
    tiles = tiles_of(library, "sm90")
    assert without(library, tiles[first]["id"]) == SUCCESS
    second = plan(library, params(64, 4096, 4096), H100).tile
    seen, stop = set[int](), threading.Event()

    def ask() -> None:
        p, found = params(64, 4096, 4096), Plan()
        while not stop.is_set():
            library.sqk_gemm_plan(ctypes.byref(p), ctypes.byref(H100), ctypes.byref(found))
            seen.add(found.tile)

    thread = threading.Thread(target=ask)
    thread.start()
    for turn in range(200):
        assert without(library, tiles[(first, second)[turn % 2]]["id"]) == SUCCESS
    stop.set()
    thread.join()
    assert seen <= {first, second}
