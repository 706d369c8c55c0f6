"""The benchmark of the int8 cache, on toys: bytes, what is refused, columns and order. No test looks at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention as bench
from benchmarks.lib import caches
from benchmarks.lib.caches import APPEND, ATTENTION, PAGE, Case, Heads
from benchmarks.lib.timer import Timing
from benchmarks.on_gpu import cache_checks, kernel_checks
from benchmarks.pages import result_tables
from benchmarks.prediction import caches as prediction
from smoothquant_kernels import ops
from tests.benchmarks.programs import simulated
from tests.support import simulator

CPU = torch.device("cpu")
TOY = Heads("toy", 4, 2, 32)


def case(op: str = ATTENTION, **changes: Any) -> Case:
    facts = {"heads": TOY, "batch": 2, "tokens": 1, "context": 70, "page": 0}
    return Case(op, **{**facts, **changes})


def inputs_of(this: Case) -> dict[str, Any]:
    return caches.make_inputs(this, torch.Generator().manual_seed(0))


def size_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_bytes_are_those_of_the_tensors() -> None:
    this = case()
    given = inputs_of(this)
    kept = [given[n] for n in ("k_cache", "v_cache", "k_scale", "v_scale")]
    assert size_of(kept) == this.kept
    assert size_of([*kept, given["q"], caches.run_op(this, given)]) == this.bytes
    this = case(APPEND, tokens=5)
    given = inputs_of(this)
    read = [given[n] for n in ("k", "v", "cos", "sin")]
    written = [given[n][:, :, :5] for n in ("k_cache", "v_cache", "k_scale", "v_scale")]
    assert size_of(read) + size_of(written) == this.bytes


@pytest.mark.parametrize("page", [0, PAGE])
@pytest.mark.parametrize("op", [ATTENTION, APPEND])
def test_every_op_is_measured_beside_its_baselines(op: str, page: int) -> None:
    row = bench.measure(case(op, page=page), CPU, 0.0)
    assert row["us_p20"] <= row["us"] <= row["us_p80"]
    assert row["vs_copy"] > 0 and row["vs_float16"] > 0
    if op == ATTENTION:
        assert row["vs_sdpa"] > 0 and row["vs_folded"] > 0 and "sdpa_missing" not in row
        names = ("sdpa", "flash", "folded", "cudnn")
        times = [row[f"{name}_us"] for name in names if row[f"{name}_us"]]
        assert row["float16_us"] == min(times)
        assert row["vs_cudnn"] is None and row["cudnn_missing"]
    assert bench.line(row).count("|") >= 4


@pytest.mark.parametrize("page", [0, PAGE])
def test_the_float16_cache_holds_the_same(page: int) -> None:
    """Attention to it in float64 is that to the int8 cache, but for its rounding to float16."""
    this = case(page=page)
    given = inputs_of(this)
    k, v = caches.float_cache(this, given)
    assert k.shape == v.shape == (2, 2, 70, 32) and k.dtype == torch.float16
    scores = (given["q"].double().view(2, 2, 2, 32) @ k.double().mT) * given["scale"]
    y = (scores.softmax(-1) @ v.double()).view(2, 4, 1, 32)
    every = [(b, head) for b in range(2) for head in range(2)]
    assert caches.wrong_attention(this, given, y, every, caches.BASELINE_ALLOWED) == ""
    wrong = caches.wrong_attention(this, given, y + 1, every, caches.BASELINE_ALLOWED)
    assert wrong.startswith("sequence 0, kv head 0: off by")
    for name, attention in caches.attention_baselines(this).items():
        if name in ("sdpa", "folded"):
            found = attention(given["q"], k, v)
            assert caches.wrong_attention(this, given, found, every, caches.BASELINE_ALLOWED) == ""


def _off(function: Any) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        y = function(*args, **kwargs)
        if y is None:
            kwargs["v_scale"].view(-1)[0] += 1
            return None
        return y + y.abs().amax() * 0.05

    return wrong


@pytest.mark.parametrize("op", [ATTENTION, APPEND])
def test_a_wrong_op_is_not_timed(
    op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, op, _off(getattr(ops, op)))
    file = tmp_path / "a.json"
    options = ["--device", "cpu", "--seconds", "0", "--contexts", "7", "--batches", "1"]
    status = bench.run(bench.parse([*options, "--json", str(file)]))
    rows = json.loads(file.read_text())["rows"]
    assert status == 1
    for row in rows:
        assert ("wrong" in row) == (row["op"] == op) != ("us" in row)
    assert f"geomean {op}" not in capsys.readouterr().out
    (name,) = {"kv_append": [APPEND], ATTENTION: [ATTENTION]}[op]
    this = cache_checks.CacheRow(CPU, name)
    assert this.shapes() != ""


def test_what_works_passes_the_checks() -> None:
    for name in kernel_checks.CACHE_OPS:
        row = kernel_checks.row_of(name, CPU)
        assert isinstance(row, cache_checks.CacheRow)
        assert row.shapes() == ""
        for phase in (row.graph, row.dependent, row.repeats):
            with pytest.raises(kernel_checks.NotHere):
                phase()
        for toy in row.cases():
            assert cache_checks.chain(CPU, toy) == ""


def test_the_most_telling_cases_come_first() -> None:
    sizes = (caches.HEADS, caches.CONTEXTS, caches.BATCHES, caches.NEW)
    found = caches.cases_of((ATTENTION, APPEND), *sizes)
    assert len(found) == len(set(found)) == 4 * 3 * 3 * 2 + 4 * 6 * 2
    assert (found[0].op, found[0].context, found[0].batch) == (ATTENTION, 8192, 8)
    assert (found[1].op, found[1].batch, found[1].tokens) == (APPEND, 64, 1)
    assert {c.context for c in found if c.op == ATTENTION} == {1024, 8192, 32768}
    assert {c.op for c in caches.cases_of((APPEND,), *sizes)} == {APPEND}


def test_the_columns_add_up() -> None:
    times = {"op": 10.0, "copy": 9.0, "sdpa": 20.0, "folded": 16.0}
    timings = {name: Timing(us, us, us, 10, 2) for name, us in times.items()}
    row = bench.row_of(case(), timings, ("sdpa", "flash", "folded"), {"flash": "why"})
    assert (row["vs_copy"], row["vs_sdpa"], row["vs_flash"]) == (0.9, 2.0, None)
    assert (row["vs_float16"], row["flash_missing"]) == (1.6, "why")
    table = result_tables.attention({"rows": [row]})
    assert table.rows[0][:6] == [ATTENTION, "toy", "2", "1", "70", "10.0"]
    long = row | {"context": 8192}
    found = {
        line[0]: line[1] for line in result_tables.targets({"attention": {"rows": [long]}}).rows
    }
    assert found["attention to 8k and more int8 tokens, vs FP16"] == "yes"
    assert found["the same, speed of a copy"] == "yes"
    assert found["writer of prompts, speed of a copy"] == "not measured"


def test_the_prediction_is_that_of_the_bytes() -> None:
    header, rows = prediction.table(("H100",))
    best = max(float(row[header.index("vs float16")].rstrip("x")) for row in rows)
    assert 1.9 < best <= round(2 * 128 / (128 + 4), 2), "2 D bytes against D + 4"
    assert all(float(row[header.index("int8 us")]) >= prediction.LEAST for row in rows)


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_benchmark_runs_the_kernels_in_the_simulator(arch: str, tmp_path: Path) -> None:
    simulator.require()
    file = tmp_path / "attention.json"
    options = ["-m", "benchmarks.attention", "--device", "cpu", "--seconds", "0"]
    options += ["--contexts", "130", "--batches", "2", "--json", str(file)]
    done = simulated(arch, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 4 + 8 and all("us" in row for row in rows)
