"""The benchmark of attention to an int8 cache on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu_attention
from benchmarks.lib.runner import WrongResult
from benchmarks.pages import cpu_tables

TOY = ["--contexts", "130", "7", "--seconds", "0.01"]


def test_a_run_checks_and_times_every_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "attention_cpu.json"
    before = torch.get_num_threads()
    try:
        assert cpu_attention.run(cpu_attention.parse([*TOY, "--json", str(file)])) == 0
    finally:
        torch.set_num_threads(before)
    data = json.loads(file.read_text())
    assert [row["context"] for row in data["rows"]] == [130, 130, 7, 7]
    for row in data["rows"]:
        assert row["us"] > 0
        assert all(row[f"vs_{name}"] > 0 for name in cpu_attention.BASELINES)
    assert "x float32" in capsys.readouterr().out
    table = cpu_tables.attention(data).markdown()
    assert table.count("SmolLM2-135M") == 2 and "| 130 |" in table


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(**inputs: Any) -> torch.Tensor:
        return torch.zeros_like(inputs["q"])

    monkeypatch.setattr(cpu_attention.ops, "decode_attention_s8", halved)
    case = cpu_attention.Case("decode_attention_s8", cpu_attention.HEADS[0], 1, 1, 40)
    with pytest.raises(WrongResult, match="off by"):
        cpu_attention.measure(case, 0.01)


def test_a_gpu_is_refused() -> None:
    with pytest.raises(SystemExit):
        cpu_attention.parse(["--device", "cuda"])
