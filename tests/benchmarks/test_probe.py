"""What a probe measures, and what the model makes of it. No GPU: the numbers are made up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.on_gpu import probe
from benchmarks.prediction.model import Model
from benchmarks.prediction.model_costs import MACHINES, MEMORY_SHARE, waves
from benchmarks.prediction.predict import GPUS, Planner

ROOT = Path(__file__).resolve().parents[2]
GPU, MACHINE = GPUS["H100"], MACHINES["H100"]
MEASURED = {
    "sms": 132, "dram_read_gb_per_s": 3015.0, "l2_read_tb_per_s": 5.0, "copy_gb_per_s": 2900.0,
    "dram_latency_clocks": 600.0, "l2_latency_clocks": 270.0, "graph_node_us": 1.5,
    "chain_us": 4.5, "chain_overlapped_us": 3.9, "max_active_clusters_1": 132,
    "max_active_clusters_2": 60, "max_active_clusters_4": 32, "blocks_per_sm_default": 1,
    "blocks_per_sm_asked": 2, "blocks_in_order": 0.98, "idle_sm_ghz": 1.98,
}  # fmt: skip


def test_lines_that_were_cut_off_or_are_no_members_are_left_out() -> None:
    text = '{"a": 1}\nnoise\n[2]\n{"order_failed": "cudaMalloc: no memory"}\n{"b": 2'
    assert probe.read_lines(text) == {"a": 1, "order_failed": "cudaMalloc: no memory"}


def test_what_was_measured_stands_in_place_of_what_was_assumed() -> None:
    machine = probe.assume(GPU, MACHINE, MEASURED)
    share = 3015 / 3350
    assert machine.memory_share == pytest.approx((1.05 * share, share, 0.97 * share))
    assert machine.l2_tb_per_s == pytest.approx((5.25, 5.0, 4.85))
    assert machine.launch_us == pytest.approx((1.455, 1.5, 1.575))
    assert machine.latency == (600, 1000, 1750)  # 480, 800, 1400 before
    assert machine.clusters == {1: 132, 2: 60, 4: 32}
    assert (machine.macs, machine.loaded_ghz) == (MACHINE.macs, MACHINE.loaded_ghz)
    # What was not measured stays as it was.
    assert probe.assume(GPU, MACHINE, {}) == MACHINE and MACHINE.memory_share == MEMORY_SHARE
    only = probe.assume(GPU, MACHINE, {"graph_node_us": 2.0})
    assert only.l2_tb_per_s == MACHINE.l2_tb_per_s and only.launch_us[1] == 2.0


@pytest.mark.parametrize("rate", [300.0, 4800.0])
def test_another_gpus_memory_is_not_believed(rate: float) -> None:
    with pytest.raises(ValueError, match="the data sheet of the H100"):
        probe.assume(GPU, MACHINE, {"dram_read_gb_per_s": rate})


def test_a_gpu_with_fewer_clusters_has_more_waves() -> None:
    tile = {"cluster": [2, 1]}
    assert waves(tile, 132, 1, 132) == 1
    assert waves(tile, 132, 1, 132, {2: 60}) == 2
    assert waves(tile, 132, 1, 132, {4: 32}) == 1


@pytest.fixture(scope="module")
def planner() -> Planner:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return Planner()


@pytest.mark.compiler
def test_the_model_predicts_with_it(planner: Planner) -> None:
    """Decoding a token is bound by memory: with half of the bandwidth it takes about twice as long."""
    slow = {"dram_read_gb_per_s": GPU.gb_per_s * MEMORY_SHARE[1] / 2}
    usual, found = (Model("H100", planner, measured=m).chosen(1, 11008, 4096) for m in ({}, slow))
    memory = 11008 * 4096 / (GPU.gb_per_s * MEMORY_SHARE[1] * 1e3)
    # What is neither memory nor waits for it, launch and first loads, is the same.
    assert found.us - usual.us == pytest.approx(memory, rel=0.1)
    assert Model("H100", planner, measured=MEASURED).chosen(1, 4096, 4096).us > 0


def test_the_findings_name_what_was_assumed() -> None:
    lines = probe.findings({**MEASURED, "order_failed": "why"}, GPU, MACHINE)
    text = "\n".join(lines)
    assert "3015 GB/s   assumed 3015" in text and "5.00 TB/s   assumed 5.9 (6.5 .. 5.5)" in text
    assert any("clusters of 2 at a time" in s and "60   assumed 66" in s for s in lines)
    assert lines[-1] == "order_failed: why"
    assert probe.findings(MEASURED, None, None) and not probe.findings({}, GPU, MACHINE)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "probe.json"
    for text in ("", "{}", "[]", '{"measured": 3}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"is no file of benchmarks/on_gpu/probe"):
            probe.read_assumptions(file)
    file.write_text(json.dumps({"measured": MEASURED}))
    assert probe.read_assumptions(file) == MEASURED


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_probe_compiles_without_a_warning(tmp_path: Path) -> None:
    for arch in ("80", "90a"):
        command = [
            "nvcc",
            "-std=c++17",
            "-O0",
            "-Werror",
            "all-warnings",
            "-o",
            str(tmp_path / "probe"),
        ]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(probe.SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_probe_that_takes_too_long_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "probe"
    program.write_text(
        f"#!{sys.executable}\nimport time\nprint('{{\"sms\": 132}}', flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(probe, "BUILD", tmp_path)
    assert probe.run_probe(3) == ({"sms": 132}, "stopped after 3 s")
    program.write_text(
        f"#!{sys.executable}\nprint('{{\"sms\": 132}}')\nraise SystemExit('error: gone')\n"
    )
    assert probe.run_probe(30) == ({"sms": 132}, "error: gone")
