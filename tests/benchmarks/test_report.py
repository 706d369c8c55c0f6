"""The report of a run: its text has the files' numbers, its pictures are drawn, what is missing is said."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pages import plots, report
from benchmarks.prediction.gpus import GPUS, floor
from tests.benchmarks.test_first_light import ALL_OK, row
from tests.benchmarks.test_probe import MEASURED
from tests.benchmarks.test_tables import BLOCK, GEMM, LINEAR, MACHINE, QUANTIZE, gemm_row, write
from tools.build.plan import ROOT

CPU = ROOT / "benchmarks" / "results" / "epyc-avx2_2026-11-23"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that has everything; numbers that nobody measured."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("results")
    files = {"gemm": GEMM, "quantize": QUANTIZE, "linear": LINEAR, "block": BLOCK}
    for name, rows in files.items():
        write(folder, f"{name}.json", rows)
    assert report.main([str(folder)]) == 0
    return folder / "report"


def test_a_report_has_text_a_page_csv_and_four_small_pictures(made: Path) -> None:
    pictures = sorted(made.glob("*.png"))
    names = [file.stem for file in pictures]
    assert names == ["bars", "latency", "speed", "speedup"]
    for file in pictures:
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 300_000
    assert {file.name for file in made.iterdir() if file not in pictures} == {
        "report.txt", "report.md", "gemm.csv", "quantize.csv", "linear.csv", "block.csv",
    }  # fmt: skip
    page = (made / "report.md").read_text()
    assert [f"]({file.name})" in page for file in pictures] == [True] * 4
    with (made / "gemm.csv").open() as file:
        us = [row["us"] for row in csv.DictReader(file)]
    assert us == ["100.25", "140.0", "30.0", "25.0", ""]


def test_the_text_has_every_case_and_names_failures(made: Path) -> None:
    text = (made / "report.txt").read_text()
    assert text.startswith("NVIDIA H100 80GB HBM3, driver 580.1, CUDA 13.0, torch 2.11.0\n")
    assert "1 wrong or failed:\n* LLaMA-7B o M 64 N 4096 K 4096: wrong: y[0] is 1" in text
    lines = [line.split() for line in text.splitlines()]
    real = "LLaMA-7B up (real data) 11008 x 4096 128x128x128 /4 64 25.0".split()
    assert any(line[: len(real)] == real for line in lines)
    assert ["LLaMA-7B", "decode", "16", "211.2", "1.62x"] in lines


def test_a_cpu_is_called_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([str(CPU), "--out", str(tmp_path / "new" / "out")]) == 0
    text = (tmp_path / "new" / "out" / "report.txt").read_text()
    assert text.startswith("CPU, no GPU: AMD EPYC, 1 thread") and "targets" not in text
    row = json.loads((CPU / "linear_cpu.json").read_text())["rows"][0]
    assert f"{row['int8_us']:,.1f}" in text and f"{row['vs_float32']:.2f}x" in text


def test_what_is_missing_or_broken_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "probe.json").write_text("{")
    assert report.main([str(tmp_path)]) == 2
    assert "gemm.json" in capsys.readouterr().out and not (tmp_path / "report").exists()
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "absent")])
    (tmp_path / "gemm.json").write_text('{"machine": {}, "rows"')
    write(tmp_path, "block.json", [{"model": "LLaMA-7B", "M": 16, "failed": "no memory"}])
    assert report.main([str(tmp_path)]) == 1
    text = (tmp_path / "report" / "report.txt").read_text()
    assert "gemm.json is no results file" in text
    assert "* LLaMA-7B M 16: failed: no memory" in text


def test_only_failures_and_no_baseline_still_make_a_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, "gemm.json", GEMM[-1:])
    write(tmp_path, "quantize.json", [{"producer": "quantize", "M": 1, "failed": "why"}])
    assert report.main([str(tmp_path)]) == 0
    alone = gemm_row(64, 3.0, None, vs_new=None)
    write(tmp_path, "gemm.json", [alone])
    assert report.main([str(tmp_path)]) == 0
    assert not (tmp_path / "report" / "speedup.png").exists()


def test_every_step_that_is_not_monotone_is_found() -> None:
    rows = [gemm_row(m, us, 1.0) for m, us in ((64, 8.0), (1, 5.0), (16, 9.0), (128, 8.0))]
    rows += [gemm_row(16, 1.0, 1.0, data="real"), gemm_row(32, 1.0, 1.0, layer="down")]
    assert plots.steps(rows) == [plots.Step("LLaMA-7B up", 16, 9.0, 64, 8.0)]
    assert "12.5 % more" in str(plots.steps(rows)[0])


def test_the_roofline_is_the_lower_of_both_bounds() -> None:
    gpu = GPUS["H100"]
    assert plots.roofline(gpu, 8192, 8192, 8192, 1) == gpu.tops
    # 2 * 4096 * 4096 operations per 2^24 bytes: 2 per byte
    assert plots.roofline(gpu, 1, 4096, 4096, 2**24) == pytest.approx(2 * gpu.gb_per_s / 1e3)
    floor_us, bound = floor(gpu, 64, 4096, 4096)
    assert bound == "memory"
    assert plots.roofline(gpu, 64, 4096, 4096) == pytest.approx(2e-6 * 64 * 4096**2 / floor_us)


@pytest.mark.parametrize(
    "changes",
    [{"device": "cpu (a rehearsal)"}, {"sms": 114}, {"memory_gib": 39.4}, {"device": "NVIDIA X1"}],
)
def test_only_the_very_gpu_of_a_data_sheet_has_a_roofline(changes: dict[str, Any]) -> None:
    assert plots.data_sheet(MACHINE) is GPUS["H100"]
    assert plots.data_sheet(MACHINE | changes) is None


def test_the_documented_pictures_are_small() -> None:
    sizes = [file.stat().st_size for file in (ROOT / "docs" / "images").glob("cpu_*.png")]
    assert len(sizes) == 4 and sum(sizes) < 250_000


def test_broken_kernels_and_the_probe_are_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.probe.planner, "available", lambda: False)  # no compiler
    rows = [
        row("stream 8x16", status="ok", phases=ALL_OK, why=""),
        row("64x64x256 swap", status="hung", phases={"graph": "ok", "dependent": "hung"}, why="in dependent"),
        row("quantize", "producer", status="ok", phases=ALL_OK, why=""),
    ]  # fmt: skip
    (tmp_path / "first_light.json").write_text(json.dumps({"machine": MACHINE, "rows": rows}))
    (tmp_path / "probe.json").write_text(json.dumps({"machine": MACHINE, "measured": MEASURED}))
    assert report.make(tmp_path, tmp_path / "report") == 0
    text = (tmp_path / "report" / "report.txt").read_text()
    assert "2 of 3 kernels passed every check." in text
    assert "The stages after that left out: 64x64x256-swap." in text
    (line,) = (line for line in text.splitlines() if line.startswith("64x64x256 swap"))
    assert line.split() == ["64x64x256", "swap", "hung", "ok", "hung", "in", "dependent"]
    assert "3015 GB/s   assumed -" in text
    page = (tmp_path / "report" / "report.md").read_text()
    assert "## Every kernel alone" in page and "## What the predictions assume" in page
