"""The benchmark of compressed-tensors checkpoints: its statistics and its table, and one process with a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compressed_tensors as benchmark
from tests.support import compressed_tensors as ct
from tools.build.plan import ROOT


def test_the_paired_difference() -> None:
    found = benchmark.paired([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert found["mean"] == 2.0 and found["stderr"] == pytest.approx(3**-0.5)


def test_the_table_shows_both_sides_and_the_ratios() -> None:
    def side(size: int) -> dict[str, Any]:
        memory = {
            when: {"tensors": size, "resident": 2 * size} for when in ("loaded", "first", "ten")
        }
        rates = {"decode_tokens_s": 20.0, "prefill_tokens_s": 200.0, "perplexity": 16.0}
        return {**memory, **rates, "facts": {"dtype": "bfloat16"}}

    row = {
        "folder": "model",
        benchmark.OURS: side(163_000_000),
        benchmark.THEIRS: side(269_000_000),
        "decode_ratio": 4.4,
        "prefill_ratio": 4.85,
        "memory_ratio": {"tensors": {"first": 0.61}, "resident": {"first": 0.43}},
        "more_nats": {"mean": -0.02, "stderr": 0.005},
    }
    lines = benchmark.table(row).splitlines()
    assert lines[0] == "model (bfloat16)" and "163 (326)" in lines[1] and "269 (538)" in lines[2]
    assert "decode 4.40x" in lines[3] and "0.61x (resident 0.43x)" in lines[3]
    assert "-0.0200 ± 0.0050" in lines[3]


@pytest.mark.slow
def test_a_process_answers_in_lines_of_json(tmp_path: Path) -> None:
    """Through this package, which needs no other one; a package that is not there has no version."""
    folder = ct.simple(tmp_path / "model")
    command = [sys.executable, "-m", "benchmarks.compressed_tensors", str(folder)]
    done = subprocess.run(
        [*command, "--serve", benchmark.OURS],
        input="decode\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    facts, (prefill, token) = map(json.loads, done.stdout.splitlines())
    assert facts["loaded"]["tensors"] == facts["ten"]["tensors"] > 0
    assert facts["facts"]["dtype"] == "float32" and "torch" in facts["facts"]
    assert prefill > 0 and token > 0
