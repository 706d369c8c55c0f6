"""The benchmark of mixtures of experts, on toys: what is refused, columns and order. No test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import experts as bench
from benchmarks.lib.runner import WrongResult
from smoothquant_kernels import ops

CPU = torch.device("cpu")


def test_a_rehearsal_measures_every_case(tmp_path: Path) -> None:
    file = tmp_path / "experts.json"
    args = bench.parse(["--device", "cpu", "--seconds", "0", "--json", str(file)])
    assert bench.run(args) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["M"] for row in rows] == [1, 1, 13, 13]
    for row in rows:
        assert row["us"] > 0 and row["vs_loop"] > 0
        # A CPU's torch may have no grouped GEMM for bfloat16; then the row says why.
        assert (row["vs_bf16"] is None) == ("bf16_missing" in row)
        assert bench.line(row).count("|") == 5
    assert rows[0]["busy"] == 2 and rows[2]["busy"] <= 4
    args = bench.parse(["--device", "cpu", "--seconds", "0", "--json", str(file), "--resume"])
    assert bench.run(args) == 0
    assert json.loads(file.read_text())["rows"] == rows


def test_the_inputs_of_the_baselines_are_the_same() -> None:
    """The float GEMM of each expert is near the op's result; another expert's weights are not."""
    a = bench.make_inputs(bench.Case(bench.TOY_LAYERS[0], 30), torch.Generator().manual_seed(0))
    right = bench.grouped(a).float()
    spans = [slice(a.bounds[e], a.bounds[e + 1]) for e in range(4)]
    y = torch.cat([a.x_float[s].float() @ a.w_float[e].float() for e, s in enumerate(spans)])
    assert float((y - right).abs().max() / right.abs().max()) < bench.ALLOWED
    turned = a.w_float.roll(1, 0).float()
    y = torch.cat([a.x_float[s].float() @ turned[e] for e, s in enumerate(spans)])
    assert float((y - right).abs().max() / right.abs().max()) > 10 * bench.ALLOWED


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*operands: torch.Tensor, **options: object) -> torch.Tensor:
        y = right(*operands, **options)
        y[-1, -1] += 1
        return y

    right = ops.grouped_gemm_s8
    monkeypatch.setattr(bench.ops, "grouped_gemm_s8", wrong)
    with pytest.raises(WrongResult, match="1 of 96 elements differ"):
        bench.measure(bench.Case(bench.TOY_LAYERS[0], 1), CPU, 0.0)


def test_the_first_cases_are_the_most_telling() -> None:
    chosen = bench.cases_of(bench.LAYERS, bench.TOKENS)
    assert len(chosen) == len(bench.LAYERS) * len(bench.TOKENS)
    assert (chosen[0].layer, chosen[0].tokens, chosen[0].m) == (bench.LAYERS[0], 1, 8)
    assert chosen[len(bench.LAYERS)].tokens == 1024
