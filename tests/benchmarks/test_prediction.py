"""The expected time of a GEMM: worked out by hand, against what others measured, and against runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib.blocks import GPU_SHAPES
from benchmarks.prediction import compare, expected, layers, rotation, yardstick
from benchmarks.prediction.gpus import GPUS, floor, gpu_of
from benchmarks.prediction.planner import choose, machine_of, predict, tables
from tests.benchmarks.programs import Done, python

pytestmark = pytest.mark.compiler
#: The best rates in the tables of the yardstick, in TOPS.
BEST_TOPS = {"A100": 586, "L40S": 662, "H100": 1601}


def tile_of(gpu: str, m: int, n: int, k: int) -> dict[str, Any]:
    found: dict[str, Any] = tables()[choose(GPUS[gpu], m, n, k)["table"]]["tiles"]
    return found[choose(GPUS[gpu], m, n, k)["tile"]]


def test_one_token_costs_the_bytes_of_the_weights() -> None:
    one, machine = predict(GPUS["A100"], 1, 4096, 4096), machine_of(GPUS["A100"])
    clocks = (4096 * 4096 + 4096 + 2 * 4096) / machine["memory_bytes"] + machine["overhead"]
    assert one.bound_by == "memory" and one.us == pytest.approx(clocks / 1.41e3, rel=1e-4)
    # The SMs' clock under load does not slow the memory down.
    assert predict(GPUS["A100"], 1, 4096, 4096, ghz=1.0) == one


def test_full_waves_of_mma_hide_all_but_a_fifth_of_the_overhead() -> None:
    """16 x 32 tiles of 128x128 on 108 SMs: the busiest one multiplies 5, two at a time."""
    tile, machine = tile_of("A100", 2048, 4096, 4096), machine_of(GPUS["A100"])
    assert (tile["name"], tile["warps_m"] * tile["warps_n"]) == ("128x128x64", 4)
    work = 128 * 128 * 4096 / (machine["macs"] * tile["rate"] / 100)
    clocks = 5 * work + machine["overhead"] * (1 + 4 * 0.2)
    one = predict(GPUS["A100"], 2048, 4096, 4096)
    assert one.bound_by == "tensor cores" and one.us == pytest.approx(clocks / 1.41e3, rel=1e-4)
    assert one.tops == pytest.approx(2 * 2048 * 4096 * 4096 / one.us / 1e6)
    # At half of the clock it takes twice as long.
    assert predict(GPUS["A100"], 2048, 4096, 4096, 1.41 / 2).us == pytest.approx(2 * one.us)


def test_cooperative_tiles_show_their_overhead() -> None:
    """16 x 16 tiles of 128x256 on 132 SMs: two each, one after the other."""
    tile, machine = tile_of("H100", 2048, 4096, 4096), machine_of(GPUS["H100"])
    assert (tile["name"], tile["schedule"]) == ("128x256x128", "cooperative")
    work = 128 * 256 * 4096 / (machine["macs"] * tile["rate"] / 100)
    one = predict(GPUS["H100"], 2048, 4096, 4096)
    assert one.us == pytest.approx(2 * (work + machine["overhead"]) / 1.83e3, rel=1e-4)


def test_few_tiles_wait_for_what_an_sm_takes_in_or_for_latency() -> None:
    gpu, machine = GPUS["H100"], machine_of(GPUS["H100"])
    one = predict(gpu, 64, 1024, 4096)  # 16 tiles of 64x64
    clocks = 4096 * (64 + 64) / machine["sm_bytes"] + machine["overhead"]
    assert one.bound_by == "SM intake" and one.us == pytest.approx(clocks / 1.83e3, rel=1e-4)
    assert predict(gpu, 64, 64, 64).bound_by == "latency"


@pytest.mark.parametrize("gpu", sorted(set(GPUS) - {"H200"}))
def test_no_expectation_beats_the_floor(gpu: str) -> None:
    """An H200 has an H100's numbers: it reads memory faster than those say."""
    for m in (1, 16, 64, 200, 2048, 8192):
        for n, k in ((4096, 4096), (1024, 4096), (4104, 4100), (11008, 4096), (8192, 28672)):
            one = predict(GPUS[gpu], m, n, k)
            assert one.floor_us == floor(GPUS[gpu], m, n, k)[0] < one.us


def test_no_measured_time_refutes_an_expected_one() -> None:
    rows = yardstick.rows()
    assert len(rows) == 61 and {one.gpu for one, _ in rows} == {"A100", "L40S", "H100", "H200"}
    assert not [ours for _, ours in rows if ours.ratio < 1]


@pytest.mark.parametrize("gpu", BEST_TOPS)
def test_no_measured_rate_is_above_the_expected_one(gpu: str) -> None:
    assert predict(GPUS[gpu], 8192, 65536, 16384).tops > BEST_TOPS[gpu]


def test_a_row_of_the_yardstick_has_the_bfloat16_time_of_its_own_table() -> None:
    found = {(r.gpu, r.what[:9], r.n, r.k, r.m): r for r in yardstick.measured()}
    assert found["A100", "int8 Tens", 8192, 8192, 2048].us == 519
    assert found["A100", "int8 Tens", 8192, 8192, 2048].bf16_us == 1008
    assert found["H100", "fp8 sglan", 4096, 4096, 2048].bf16_us == 90.9
    assert found["H100", "fp8 vLLM ", 4096, 4096, 2048].bf16_us is None
    header, rows = yardstick.table(yardstick.rows())
    assert all(len(row) == len(header) for row in rows)


def results(factors: dict[int, float]) -> dict[str, Any]:
    """As the GEMM benchmark writes them, of an H100 at 1.5 GHz that takes so many times what is expected."""
    rows: list[dict[str, Any]] = []
    for m, factor in factors.items():
        us = factor * predict(GPUS["H100"], m, 4096, 4096, ghz=1.5).us
        rows.append({"model": "LLaMA-7B", "layer": "o", "M": m, "N": 4096, "K": 4096, "us": us})
        rows[-1] |= {"tile": "x", "sm_mhz": 1500}
    rows.append(rows[0] | {"data": "real"})
    rows.append({"model": "LLaMA-7B", "layer": "o", "M": 3, "N": 4096, "K": 4096, "wrong": "y"})
    return {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "rows": rows}


def test_a_run_is_compared_at_its_own_clock() -> None:
    factors = {1: 1.0, 8: 4.0, 64: 0.5, 2048: 1.01}
    rows = compare.compare(results(factors))
    assert [row.ratio for row in rows] == pytest.approx(list(factors.values()))
    header, body = compare.by_class(rows)
    assert [line[0] for line in body] == ["M <= 8", "M 9-64", "M > 512", "all"]
    assert body[0] == ["M <= 8", "2", "2.00", "1.00 (LLaMA-7B o M 1)", "4.00 (LLaMA-7B o M 8)"]
    assert body[-1][2] == f"{math.prod(factors.values()) ** 0.25:.2f}"
    assert all(len(line) == len(header) for line in body)


def test_the_gpu_of_a_run() -> None:
    assert gpu_of({"device": "NVIDIA A100-SXM4-80GB"}) == "A100"
    assert gpu_of({"device": "NVIDIA GeForce RTX 4090"}) == "4090"
    with pytest.raises(ValueError, match="'CPU' is none of H100"):
        gpu_of({"device": "CPU"})


def printed(*arguments: str, **env: str) -> Done:
    return python("-m", "benchmarks.prediction", *arguments, **env)


def test_a_rotation_of_many_rows_hides_behind_memory() -> None:
    """8 stages of 256 channels: 3 within a thread and 5 between lanes, whose exchanges limit a single row."""
    assert rotation.stages(256) == (3, 5) and rotation.stages(4) == (2, 0)
    for gpu in ("A100", "L40S", "H100"):
        plain, rotated = (rotation.microseconds(gpu, 2048, 4096, group) for group in (0, 256))
        assert plain == rotated
    plain, rotated = (rotation.microseconds("H100", 1, 4096, group) for group in (0, 256))
    assert rotated - plain == pytest.approx(4096 * 5 / 32 / 1.83e3)


LLAMA = GPU_SHAPES[0]


def test_a_token_of_a_fused_layer_costs_its_weights() -> None:
    """LLaMA-7B on an A100: 202 MB of int8 weights at 1,835 GB/s, 9 kernels, and 16.8 MB of keys and values."""
    one = layers.Planned("A100", LLAMA, 1, 1, 1024).fused()
    weights = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert LLAMA.parameters == weights and one.kernels == 9
    assert weights / 1835.1e3 + 4 < one.gemms < 1.05 * weights / 1835.1e3 + 4
    assert one.quantizers == 3 * 2 and one.rest == pytest.approx(2 + 1 + 4 * 1025 * 4096 / 1835.1e3)


def test_a_prompt_in_float16_by_hand() -> None:
    """The yardstick's best rate on an H100 is that of M = 2048, N = K = 8192 in 351 us."""
    one = layers.Planned("H100", LLAMA, 1, 2048, 0).compiled_float16()
    best = 2e-6 * 2048 * 8192 * 8192 / 351
    assert layers.best_bf16("H100") == pytest.approx(best)
    assert one.gemms == pytest.approx(2e-6 * 2048 * LLAMA.parameters / best + 4)
    moved = 2048 * (2 * 8 * 4096 + 6 * 11008 + 4 * 3 * 4096) / 3015e3
    attention = 2 * 2048**2 * 4096 / (0.5 * 1979 / 2) / 1e6
    assert one.rest == pytest.approx(moved + attention + 5)
    # Neither int8 nor float16 is faster than what others measured.
    fused = layers.Planned("H100", LLAMA, 1, 2048, 0).fused()
    assert fused.gemms >= 2e-6 * 2048 * LLAMA.parameters / 1425


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (16, 1), (1, 2048)])
def test_the_gap_is_paid_by_every_kernel(
    sequences: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = layers.Planned("H100", LLAMA, sequences, tokens, 0)
    variants = (one.compiled_float16, one.unfused, one.fused)
    before = [variant() for variant in variants]
    monkeypatch.setattr(layers, "GAP", layers.GAP + 1)
    added = [variant().us - layer.us for variant, layer in zip(variants, before, strict=True)]
    # As host_time counts them; tests/benchmarks/test_host_time.py has the same numbers.
    single = (sequences, tokens) == (1, 1)
    assert added == pytest.approx([9, 7 + 31, 7 + 2] if single else [9, 14 + 31, 8 + 2])
    assert added == pytest.approx([layer.kernels for layer in before])


def test_layers_against_their_targets() -> None:
    header, rows = layers.table(("H100", "L40S"), ("Llama 3 8B",))
    assert all(len(row) == len(header) for row in rows) and len(rows) == 2 * len(layers.SITUATIONS)
    column = header.index("target")
    for row in rows:
        ratio, target = float(row[column - 1].rstrip("x")), row[column].split()
        assert target[1] == ("met" if ratio >= float(target[0].rstrip("x")) else "missed")
    assert "Llama 3 8B" in printed("--blocks", "--gpu", "H100").stdout
    other = printed("--blocks", "--gpu", "4090")
    assert other.returncode == 2 and "--blocks is for A100, L40S, H100, not 4090" in other.stderr


def test_the_command(tmp_path: Path) -> None:
    _, rows = expected.table("A100", ["LLaMA-7B up"], [1, 2048])
    done = printed("--gpu", "A100", "--layers", "LLaMA-7B up", "--tokens", "1", "2048")
    words = [line.split() for line in done.stdout.splitlines()]
    assert words[2:] == [" ".join(row).split() for row in rows]
    file = tmp_path / "gemm.json"
    file.write_text(json.dumps(results({8: 4.0, 2048: 0.5})))
    lines = printed("--compare", str(file)).stdout.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["ratio", "4.00", "0.50"]
    assert lines[-1].startswith("all")
    assert "L40S" in printed("--yardstick").stdout
    assert "A100  2048  13.71      +0.00" in printed("--rotation").stdout
    other = printed("--compare", str(file), CXX="no-such-compiler")
    assert other.returncode == 2 and "no-such-compiler was not found" in other.stderr
