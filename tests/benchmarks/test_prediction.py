"""The prediction model's arithmetic on cases worked out by hand, its counts against the built library, comparisons."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from kernel_gates import GatesError, find_tools

from benchmarks.prediction import model_compare, model_counters
from benchmarks.prediction.model import COSTS, Model, prediction_table
from benchmarks.prediction.model_costs import (
    MACHINES,
    RATE,
    Costs,
    co_resident,
    costs_of,
    dram_bytes,
    grid,
    stream_k_share,
    time_of,
    turn_clocks,
    waves,
    wgmma_wavefronts,
)
from benchmarks.prediction.predict import GPUS, HEADER, Planner, floor

SHAPES = (
    (1, 4096, 4096),
    (64, 1024, 4096),
    (200, 4104, 4100),
    (2048, 11008, 4096),
    (8192, 4096, 11008),
)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner()


@pytest.fixture(scope="module")
def models(planner: Planner) -> dict[str, Model]:
    return {name: Model(name, planner) for name in GPUS}


def tile(**changed: Any) -> dict[str, Any]:
    return {
        "name": "t", "kernel": "wgmma", "m": 128, "n": 256, "k": 128, "stages": 4,
        "schedule": "cooperative", "swap_ab": False, "cluster": [2, 1], "most_splits": 1,
        "shared_bytes": 197632,
    } | changed  # fmt: skip


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_tiles_waves_and_bytes() -> None:
    # 2048 / 128 = 16 and 11008 / 256 = 43, nothing wasted; 132 SMs: 5.2 waves.
    assert grid(tile(), 2048, 11008) == (688, 1.0) and waves(tile(), 688, 1, 132) == 6
    # One token: a cluster of two is launched whole, 256 rows for 1; 3 tiles of 256 for 700.
    assert grid(tile(), 1, 700) == (6, 256 * 768 / 700)
    assert waves(tile(cluster=[1, 1]), 66, 4, 132) == 2
    # 33 SMs hold 16 clusters of two.
    assert waves(tile(), 33, 1, 33) == 2
    assert dram_bytes(2, 3, 5) == 2 * 5 + 3 * 5 + 4 * (2 + 3) + 2 * 2 * 3
    assert dram_bytes(2, 3, 5, 2) - dram_bytes(2, 3, 5) == 2 * 5 + 3 * 5


def test_stream_k_shares_the_last_waves() -> None:
    assert stream_k_share(264, 32, 132) == 2  # full waves: nothing is shared
    assert stream_k_share(66, 8, 132) == 1  # too little of k
    assert stream_k_share(66, 64, 132) == 66 / 132
    assert stream_k_share(300, 64, 132) == 1 + 168 / 132  # one whole wave, two shared


def test_what_a_turn_takes() -> None:
    # 128x256x128 in clusters of 2 along m: 2 x 4 wgmma, each 64 rows of A and 256 of B, 32 bytes a row.
    reads, all_of_it = wgmma_wavefronts(tile())
    assert reads == 2 * 4 * (64 + 256) * 32 / 128 and all_of_it == reads + 384 * 128 / 128
    costs = Costs(8, 64, 40, all_of_it, reads, 1000)
    found = turn_clocks(tile(), costs, MACHINES["H100"], 32.0, 0)
    assert found == {
        "tensor cores": 128 * 256 * 128 / 4096,
        "issue": 8 * 64 / 4 + 40 / 4,
        "shared memory": 640,
        "L2": (128 + 256 / 2) * 128 / 32,
        "SM's intake": 384 * 128 / 64,
    }
    worse = turn_clocks(tile(), costs, MACHINES["H100"], 32.0, 2)
    assert worse["shared memory"] == 1024 and worse["tensor cores"] == 1024 / RATE["wgmma"][2]
    # The swapped tile's 64-row side are channels.
    assert wgmma_wavefronts(tile(m=16, n=64, k=256, swap_ab=True))[0] == 8 * (64 + 16) * 32 / 128


def test_a_whole_time_by_hand() -> None:
    """One tile on one SM of an H100 at 1 GHz: a clock is a nanosecond."""
    one = tile(m=64, n=64, k=128, cluster=[1, 1], schedule="pingpong")
    costs = Costs(4, 0, 0, 0, 0, 800)
    found = time_of(GPUS["H100"], MACHINES["H100"], one, costs, (64, 64, 1024), 1, 0, ghz=1.0)
    # 8 turns of (64 + 64) x 128 bytes at 64 a clock are the longest; 2 x 64 x 64 bytes of y: 128 clocks, and 800
    # instructions of 4 warps on 4 schedulers, of which 0.7 are the machine's: 560.
    assert found.binds == "L2" and found.main_loop == pytest.approx(8 * 256 / 1000)
    assert found.launch == 0.5 and found.first_loads == pytest.approx(0.480)
    assert found.stores == pytest.approx(0.560) and found.sharing == found.memory == 0
    assert found.us == pytest.approx(0.5 + 0.48 + 2.048 + 0.56)
    assert found.tops == pytest.approx(2 * 64 * 64 * 1024 / found.us / 1e6)


def test_two_blocks_of_mma_share_an_sm() -> None:
    block = tile(kernel="mma", warps_m=2, warps_n=2, shared_bytes=80 * 1024)
    assert co_resident(block, GPUS["A100"]) == 2
    assert co_resident(block | {"shared_bytes": 96 * 1024}, GPUS["A100"]) == 1
    assert co_resident(block | {"warps_n": 4}, GPUS["A100"]) == 1
    assert co_resident(tile(), GPUS["H100"]) == 1


# --- what must hold of every tile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", sorted(GPUS))
@pytest.mark.compiler
def test_never_below_the_floor_and_parts_add_up(gpu: str, models: dict[str, Model]) -> None:
    model = models[gpu]
    for m, n, k in SHAPES:
        lowest = floor(model.gpu, m, n, k)[0]
        every = model.all(m, n, k)
        assert every and [one.us for one in every] == sorted(one.us for one in every)
        for one in every:
            assert lowest < one.low < one.us < one.high, one.name
            assert one.us == pytest.approx(one.likely.us)
        row = model.row(m, n, k)
        # The parts are sums of floats.
        assert sum(row["parts_us"].values()) == pytest.approx(row["us"], rel=1e-12)
        assert all(part >= 0 for part in row["parts_us"].values())
        assert row["loses"] >= 1 and row["best_us"] == every[0].us


@pytest.mark.parametrize("gpu", ["A100", "H100"])
@pytest.mark.compiler
def test_more_tokens_never_take_less_time_with_the_same_tile(
    gpu: str, models: dict[str, Model]
) -> None:
    model = models[gpu]
    for known in model.tiles:
        if known["schedule"] == "stream-K":
            continue  # a full wave needs no sharing, and may be faster than one that is almost full
        # The clock falls where tensor cores bind, so one clock for all.
        times = [
            model.predict(m, 4096, 4096, known["name"], ghz=1.4).us
            for m in (1, 8, 16, 100, 128, 129, 640, 2048, 2049, 8192)
            if known["kernel"] != "stream" or m <= known["m"]
        ]
        assert times == sorted(times), known["name"]


@pytest.mark.compiler
def test_the_table_of_the_documentation() -> None:
    header, rows = prediction_table("A100", tokens=(1, 2048))
    assert header == HEADER and len(rows) == 10 and all(len(row) == len(header) for row in rows)


@pytest.mark.compiler
def test_a_tile_that_was_not_counted_is_scaled(planner: Planner) -> None:
    known = json.loads(COSTS.read_text())
    tiles = planner.tables["sm80"]["tiles"]
    of = next(t for t in tiles if t["name"] == "128x128x64")
    twice = of | {"name": "128x128x128 new", "k": 128, "shared_bytes": 2 * of["shared_bytes"]}
    counted = costs_of(known, "sm80", tiles, of)
    scaled = costs_of(known, "sm80", [of, twice], twice)
    assert counted.counted and not scaled.counted
    assert scaled.instructions == 2 * counted.instructions
    assert scaled.tile_instructions == counted.tile_instructions
    with pytest.raises(ValueError, match="--counters"):
        costs_of({"sass": {}}, "sm80", tiles, of)


# --- counts -----------------------------------------------------------------------------------------------------------

SASS = """
        /*0000*/                   MOV R1, R2 ;                         /* 0x0 */
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;             /* 0x0 */
        /*0020*/                   IMMA.16832.S8.S8 R4, R8.ROW, R9.COL, R4 ; /* 0x0 */
        /*0030*/              @!PT LDS RZ, [RZ] ;                       /* 0x0 */
        /*0040*/               @P0 LDGSTS.E.BYPASS.128 [R2], [R4.64] ;  /* 0x0 */
        /*0050*/               @P1 BRA 0x10 ;                           /* 0x0 */
        /*0060*/               @P2 BRA 0x0 ;                            /* 0x0 */
        /*0070*/                   BRA 0x70;                            /* 0x0 */
"""


def test_the_innermost_loop_that_multiplies() -> None:
    found = model_counters.loop_counts(model_counters.instructions(SASS))
    assert found == {
        "instructions": 4, "tensor": 1, "macs": 4096, "ldsm": 1, "lds": 0, "copies": 1,
        "barriers": 0, "producer": 0, "code": 7,
    }  # fmt: skip
    assert model_counters.macs_of("IGMMA.64x256x32.S8.S8") == 64 * 256 * 32
    with pytest.raises(ValueError, match="no loop"):
        model_counters.loop_counts([])


def test_the_simulators_counts_are_taken_apart() -> None:
    def launch(executed: int, waves: int) -> dict[str, Any]:
        return {
            "grid": [2, 1, 1], "block": [128, 1, 1], "warp_instructions": executed,
            "shared": {"wavefronts": waves}, "global_store": {"requests": 8, "sectors": 64},
        }  # fmt: skip

    # 8 warps: 100 instructions each, and 10 a turn; a block's turn takes 50 wavefronts.
    found = model_counters.per_turn_and_tile(launch(8 * 180, 800), launch(8 * 260, 1600))
    assert found == {
        "wavefronts": 50, "tile_instructions": 100, "stores": 4, "store_sectors": 32, "conflicts": 1.0,
    }  # fmt: skip


@pytest.mark.compiler
def test_the_counts_multiply_whole_tiles(planner: Planner) -> None:
    """The loop that was found is the main loop: its multiply-adds are the tile's, for every tile that ships."""
    known = json.loads(COSTS.read_text())["sass"]
    for table, rows in known.items():
        for row in planner.tables[table]["tiles"]:
            if row["name"] not in rows:
                assert row.get("candidate"), f"{table} {row['name']} ships and was not counted"
                continue
            macs, area = rows[row["name"]]["macs"], row["m"] * row["n"] * row["k"]
            if row["kernel"] == "stream":
                assert macs == area  # a warp's own part of k
            elif row["kernel"] == "wgmma":
                # An IGMMA is of four warps.
                assert macs * (1 if row["schedule"] == "pingpong" else 2) == area
            else:
                assert macs * row["warps_m"] * row["warps_n"] == area


@pytest.mark.cuda_build
@pytest.mark.compiler
def test_the_counts_are_those_of_the_library(planner: Planner) -> None:
    """Three kernels of three kinds, which differ in all that ptxas decides; `--counters` reads all of them anew."""
    if not model_counters.LIBRARY.is_file():
        pytest.skip("the library is not built")
    try:
        find_tools(os.environ)
    except GatesError as reason:
        pytest.skip(str(reason))
    known = json.loads(COSTS.read_text())
    if model_counters.library_facts() != known["library"]:
        pytest.skip(f"the library is built by {model_counters.library_facts()}")
    some = {"sm80": ("64x64x128",), "sm90": ("16x64x256 swap",)}
    asked = {
        table: {"tiles": [t for t in planner.tables[table]["tiles"] if t["name"] in names]}
        for table, names in some.items()
    }
    found = model_counters.from_sass(asked)
    expected = {
        table: {name: known["sass"][table][name] for name in names} for table, names in some.items()
    }
    assert found == expected, "run: python benchmarks/model.py --counters"


# --- against a run ----------------------------------------------------------------------------------------------------


def results(model: Model, factors: dict[int, float]) -> dict[str, Any]:
    """As bench_gemm.py writes them, by a GPU that takes so many times what is predicted at 1.5 GHz."""
    rows = []
    for m, factor in factors.items():
        one = model.chosen(m, 4096, 4096, ghz=1.5)
        rows.append(
            {"model": "LLaMA-7B", "layer": "o", "M": m, "N": 4096, "K": 4096, "tile": one.name,
             "sm_mhz": 1500, "us": factor * one.us}
        )  # fmt: skip
    refused = {"model": "LLaMA-7B", "layer": "o", "M": 3, "N": 4096, "K": 4096, "wrong": "y"}
    return {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "rows": [*rows, refused]}


@pytest.mark.compiler
def test_a_run_is_compared_at_its_own_clock(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["H100"]
    factors = {1: 1.0, 8: 4.0, 64: 0.5, 2048: 1.01}
    path = tmp_path / "gemm.json"
    path.write_text(json.dumps(results(model, factors)))
    rows = model_compare.compare(json.loads(path.read_text()), model=model)
    assert [row["M"] for row in rows] == list(factors)
    assert [row["ratio"] for row in rows] == pytest.approx(list(factors.values()))
    assert [row["within"] for row in rows] == [True, False, False, True]
    assert all(row["same_tile"] for row in rows)
    groups = {one["class"]: one for one in model_compare.by_class(rows)}
    assert groups["M <= 8"]["geomean"] == pytest.approx(2.0) and groups["M <= 8"]["within"] == 1
    assert groups["all"]["worst"]["M"] == 8 and groups["all"]["cases"] == 4
    assert groups["all"]["geomean"] == pytest.approx(math.prod(factors.values()) ** 0.25)
    header, body = model_compare.comparison_table(path, model=model)
    assert [row[0] for row in body] == ["M <= 8", "M 9-64", "M > 512", "all"]
    assert all(len(row) == len(header) for row in body)


def test_names_of_a_run() -> None:
    assert model_compare.gpu_of({"device": "NVIDIA A100-SXM4-80GB"}) == "A100"
    assert model_compare.gpu_of({"device": "NVIDIA GeForce RTX 4090"}) == "4090"
    with pytest.raises(ValueError, match="'CPU', none of H100"):
        model_compare.gpu_of({"device": "CPU"})
    assert model_compare.split_name("64x64x256 swap") == ("64x64x256 swap", 1)
    assert model_compare.split_name("128x128x64 /3") == ("128x128x64", 3)


@pytest.mark.compiler
def test_a_tile_that_is_gone_is_predicted_by_the_dispatch(models: dict[str, Model]) -> None:
    found = results(models["H100"], {2048: 1.0})
    found["rows"][0]["tile"] = "1x1x1"
    (row,) = model_compare.compare(found, model=models["H100"])
    assert not row["same_tile"] and row["ratio"] == pytest.approx(1.0)


def test_the_simulators_counts_are_not_lost_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "costs.json"
    file.write_text('{"simulated": {"sm80": {}}}')
    monkeypatch.setattr(model_counters, "collect", lambda tables: {"kernels": {}})
    with pytest.raises(SystemExit, match="nothing was written"):
        model_counters.write({}, file)
    assert file.read_text() == '{"simulated": {"sm80": {}}}'
    monkeypatch.setattr(model_counters, "collect", lambda tables: {"simulated": {"sm90": {}}})
    model_counters.write({}, file)
    assert json.loads(file.read_text()) == {"simulated": {"sm90": {}}}
