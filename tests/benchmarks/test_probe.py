"""What a probe measures, and the numbers that the table should then have. No GPU: the measurements are made up."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.prediction import probe
from benchmarks.prediction.gpus import GPUS

GPU = GPUS["H100"]
MACHINE = {"macs": 4096, "l2_bytes": 30, "sm_bytes": 64, "memory_bytes": 1650, "launch": 2500}
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


def test_measurements_become_the_numbers_of_a_table() -> None:
    row = probe.machine_row(MEASURED, GPU)
    # 5 TB/s over 132 SMs at the 1.98 GHz of the measurement; 3015 GB/s and 1.5 us in clocks of 1.83 GHz.
    assert row == {"l2_bytes": 19, "memory_bytes": 1648, "launch": 2745}
    assert probe.machine_row({"l2_read_tb_per_s": 5.0}, GPU) == {"l2_bytes": 21}
    assert set(row) < set(MACHINE)


def test_the_findings_name_what_was_assumed() -> None:
    lines = probe.findings({**MEASURED, "order_failed": "why"}, GPU, MACHINE)
    text = "\n".join(lines)
    assert "3015 GB/s   assumed 3020" in text and "5.00 TB/s   assumed 7.25" in text
    assert any("clusters of 2 at a time" in s and "60   assumed 66" in s for s in lines)
    assert lines[-1] == "order_failed: why"
    assert "l2_bytes 19 (is 30), memory_bytes 1648 (is 1650), launch 2745 (is 2500)" in lines[-2]
    assert probe.findings(MEASURED) and not probe.findings({}, GPU, MACHINE)


@pytest.mark.compiler
def test_a_file_is_held_against_the_table_of_its_gpu() -> None:
    (*_, last) = probe.findings_of({"machine": {"device": "NVIDIA H100"}, "measured": MEASURED})
    assert last.startswith("the GPU's table by this: l2_bytes 19 (is ")
    other = probe.findings_of({"machine": {"device": "NVIDIA X1"}, "measured": MEASURED})
    assert other == probe.findings(MEASURED)


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_probe_compiles_without_a_warning(tmp_path: Path) -> None:
    for arch in ("80", "90a"):
        command = ["nvcc", "-std=c++17", "-O0", "-Werror", "all-warnings"]
        command += ["-o", str(tmp_path / "probe")]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(probe.SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_probe_that_takes_too_long_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "probe"
    said = f"#!{sys.executable}\nprint('{{\"sms\": 132}}', flush=True)\n"
    program.write_text(said + "import time\ntime.sleep(60)\n")
    program.chmod(0o755)
    monkeypatch.setattr(probe, "BUILD", tmp_path)
    assert probe.run_probe(3) == ({"sms": 132}, "stopped after 3 s")
    program.write_text(said + "raise SystemExit('error: gone')\n")
    assert probe.run_probe(30) == ({"sms": 132}, "error: gone")
