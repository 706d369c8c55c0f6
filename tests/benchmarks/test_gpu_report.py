"""What the report says of kernels and of the GPU, before and beside what was timed."""

from __future__ import annotations

import json
from pathlib import Path

import make_report
import pytest

from tests.benchmarks.test_gpu_first_light import ALL_OK, row
from tests.benchmarks.test_gpu_probe import MEASURED

MACHINE = {"device": "NVIDIA H100 80GB HBM3", "cuda": "13.0", "driver": "580", "torch": "2.11.0"}


def written(folder: Path) -> str:
    """The report of a folder, as text; as a page it has the same tables."""
    assert make_report.make(folder, folder / "report") == 0
    return (folder / "report" / "report.txt").read_text()


@pytest.mark.compiler
def test_broken_kernels_and_the_probe_are_in_the_report(tmp_path: Path) -> None:
    rows = [
        row("stream 8x16", status="ok", phases=ALL_OK, why=""),
        row("64x64x256 swap", status="hung", phases={"graph": "ok", "dependent": "hung"}, why="in dependent"),
        row("quantize", "producer", status="ok", phases=ALL_OK, why=""),
    ]  # fmt: skip
    (tmp_path / "first_light.json").write_text(json.dumps({"machine": MACHINE, "rows": rows}))
    (tmp_path / "probe.json").write_text(json.dumps({"machine": MACHINE, "measured": MEASURED}))
    text = written(tmp_path)
    assert "2 of 3 kernels passed every check." in text
    assert "Left out by what was measured after that: 64x64x256-swap." in text
    (line,) = (line for line in text.splitlines() if line.startswith("64x64x256 swap"))
    assert line.split() == ["64x64x256", "swap", "hung", "ok", "hung", "in", "dependent"]
    assert "3015 GB/s   assumed 3020" in text
    page = (tmp_path / "report" / "report.md").read_text()
    assert "## Every kernel alone" in page and "## What the predictions assume" in page


def test_a_run_without_them_has_no_such_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "probe.json").write_text("{")
    assert make_report.make(tmp_path, tmp_path / "report") == 2
    assert "has no results" in capsys.readouterr().out
