"""The benchmarks run on small shapes, their columns add up, and the documented tables are those of the results."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import baselines
import bench_gemm
import bench_linear
import gemm_cases
import linear_gpu
import pytest
import report
import tables
import torch
from gemm_cases import Case, Expected
from gpu_timer import Recorded, Timing
from shapes import GEMM_TOKENS, LLM_LAYERS, TOY_LAYERS, Layer
from timer import interleaved, median_ratio
from torch import Tensor

from smoothquant_kernels import ops

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
Ops = Callable[..., Tensor]


@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_linear_columns_add_up(scheme: str) -> None:
    row = bench_linear.measure(48, 40, 3, scheme, smooth=True, seconds=0.01)
    assert row["gops"] == pytest.approx(2 * 3 * 48 * 40 / (row["int8_us"] * 1e-6) / 1e9)
    assert row["rounds"] >= 5
    assert all(row[f"{name}_us"] > 0 for name in ("int8", "float32", "bfloat16"))


def test_variants_are_interleaved() -> None:
    calls: list[str] = []
    times = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=5
    )
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert len(times["a"]) == len(times["b"]) == 5


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that slows down tenfold half-way changes no ratio."""
    assert median_ratio([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]) == 2.0


def test_planted_outliers_keep_the_function() -> None:
    from planted import llama_readers, plant_outliers

    from tests.support.models import make_model, token_batches

    model = make_model("llama")
    ids = token_batches(1)[0]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        norm = model.get_submodule("model.layers.1.input_layernorm")
        weight = norm.weight.detach().clone()
        readers = llama_readers(model)
        assert len(readers) == 4 and all(len(names) in (2, 3) for names in readers.values())
        plant_outliers(model, readers)
        assert int((norm.weight.abs() > 10 * weight.abs()).sum()) == 6
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param("none", id="measured"),  # tables that need no compiler
        pytest.param("g++", id="predicted", marks=pytest.mark.compiler),
    ],
)
def test_documented_tables_are_up_to_date(compiler: str) -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"],
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_every_marked_table_is_known() -> None:
    marked = {
        m[2] for page in tables.PAGES for m in tables.MARKED.finditer((ROOT / page).read_text())
    }
    assert marked == set(tables.TABLES)


# --- the GEMM ---------------------------------------------------------------------------------------------------------


def timing(us: float) -> Timing:
    return Timing(us, us, us, 10, 2)


TIMES = {"op": 200.0, "fp16": 340.0, "bf16": 330.0, "fp8": 190.0, "triton": 273.21, "sgl": 1.0}


def test_the_gemm_line_adds_up() -> None:
    case = Case(LLM_LAYERS["LLaMA-7B up"], 2048)
    row = bench_gemm.row_of(
        case, {n: timing(us) for n, us in TIMES.items()}, {"int_mm": "why"}, "128x256x128"
    )
    moved = 2048 * 4096 + 11008 * 4096 + 4 * 2048 + 4 * 11008 + 2 * 2048 * 11008
    assert row["bytes"] == moved and row["int_mm_missing"] == "why" and row["data"] == "random"
    assert row["tops"] == pytest.approx(2 * 2048 * 11008 * 4096 / 200e-6 / 1e12)
    assert row["gb_per_s"] == pytest.approx(moved / 200e-6 / 1e9)
    assert row["fp8_us"] == 190.0 and row["vllm_us"] is None
    assert [part.strip() for part in bench_gemm.line(case, row).split("|")] == [
        "LLaMA-7B up        M 2048 N 11008 K  4096",
        "200.00 us",
        f"{row['tops']:.1f} TOPS",
        f"{row['gb_per_s']:.1f} GB/s",
        "1.70x fp16",
        "1.65x bf16",
        "- int_mm",
        "0.95x fp8",
        "1.37x triton",
        "- vllm",
        "0.01x sgl",
        "tile 128x256x128",
    ]


def columns_of(line: str) -> dict[str, float]:
    """The numbers of a printed line by their units; "-" is none."""
    parts = [part.split() for part in line.split("|")]
    pairs = [part for part in parts if len(part) == 2 and part[0] not in ("-", "tile")]
    return {unit: float(number.removesuffix("x")) for number, unit in pairs}


@pytest.mark.parametrize("us", [3.14, 57.337, 901.5])
def test_the_printed_columns_add_up(us: float) -> None:
    """What is printed, times the printed us, within half a unit of the last digits of both."""
    case = Case(LLM_LAYERS["LLaMA-7B down"], 64, "real")
    times = TIMES | {"op": us}
    row = bench_gemm.row_of(case, {n: timing(value) for n, value in times.items()}, {}, "a /4")
    found = columns_of(bench_gemm.line(case, row))
    shown = found.pop("us")
    wanted = {"TOPS": case.operations / 1e6, "GB/s": case.bytes / 1e3, **times}
    assert set(found) == set(wanted) - {"op"}
    for name, value in found.items():
        last = 0.05 if name in ("TOPS", "GB/s") else 0.005
        # (value +- last) * (shown +- 0.005), and a millionth for the binary fractions
        allowed = (last * shown + 0.005 * value + last * 0.005) * (1 + 1e-6)
        assert abs(value * shown - wanted[name]) <= allowed, name


def test_the_printed_means_are_those_of_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for m, data, us in ((64, "random", 20.0), (16, "random", 10.0), (64, "real", 16.0)):
        case = Case(LLM_LAYERS["LLaMA-7B o"], m, data)
        times = {"op": us, "fp16": 2 * us, "triton": 40.0}
        rows.append(bench_gemm.row_of(case, {n: timing(v) for n, v in times.items()}))
    bench_gemm.report(rows)
    lines = {line.split("|")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    means = columns_of(lines["geomean M 9-64       2 cases"])
    assert means["fp16"] == 2.0 and means["triton"] == pytest.approx(math.sqrt(8), abs=0.005)
    tops = math.sqrt(rows[0]["tops"] * rows[1]["tops"])
    assert means["TOPS"] == pytest.approx(tops, abs=0.05)
    assert columns_of(lines["geomean M 9-64    real    1 cases"])["triton"] == 2.5
    assert "real data is 1.250x as fast as random in the 1 cases that have both" in lines


def test_the_bytes_are_those_of_the_tensors() -> None:
    case = Case(Layer("toy", "odd", 40, 23), 5)
    a = gemm_cases.make_operands(case, gemm_cases.generator(case, CPU))
    tensors = [a.x_q, a.w_q, a.x_scale, a.w_scale, gemm_cases.dispatched(a)]
    assert sum(t.numel() * t.element_size() for t in tensors) == case.bytes
    assert bool(gemm_cases.dispatched(a).isfinite().all())


def test_geometric_means_by_class_leave_out_what_is_missing() -> None:
    rows = [{"M": 1, "vs": 2.0}, {"M": 8, "vs": 8.0}, {"M": 64, "vs": None}, {"M": 4096, "vs": 1.0}]
    means = report.geomeans(rows, ["vs"])
    assert means["M <= 8"] == pytest.approx({"cases": 2, "vs": 4.0})
    assert means["M 9-64"] == {"cases": 1} and "M 65-512" not in means
    assert means["all"] == pytest.approx({"cases": 4, "vs": 16 ** (1 / 3)})


def test_where_int_mm_cannot_run_the_reason_is_given() -> None:
    assert "M > 16" in gemm_cases.int_mm_refusal(Case(TOY_LAYERS[0], 16))
    assert "multiples of 8" in gemm_cases.int_mm_refusal(Case(TOY_LAYERS[2], 17))
    assert gemm_cases.int_mm_refusal(Case(TOY_LAYERS[0], 17)) == ""


def test_more_tokens_in_less_time_are_noted() -> None:
    row = {"model": "LLaMA-7B", "layer": "up", "N": 8, "K": 8, "tile": "a", "data": "random"}
    rows = [row | {"M": m, "us": us} for m, us in ((16, 5.0), (64, 9.0), (128, 7.0), (256, 6.9))]
    (sentence,) = bench_gemm.cliffs(rows)
    assert sentence == "LLaMA-7B up takes 9.00 us at M 64 (a), but 6.90 us at M 256 (a)"


def off_by_one_step(function: Ops) -> Ops:
    """`function` whose last element is one float16 step off."""

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        y = function(*args, **kwargs)
        y.view(-1).view(torch.int16)[-1] ^= 1
        return y

    return wrong


def run_gemm(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = bench_gemm.run(bench_gemm.parse(["--device", "cpu", "--seconds", "0", *options]))
    return status, capsys.readouterr().out


def test_a_wrong_gemm_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "gemm.json", tmp_path / "gemm.csv"
    options = ["--tokens", "32", "--data", "random", "--json", str(file), "--csv", str(table)]
    assert run_gemm(capsys, *options)[0] == 0
    data = json.loads(file.read_text())
    assert all(row["us"] > 0 and row["tile"] == "64x64x64" for row in data["rows"])
    assert data["geomeans"]["M 9-64"]["cases"] == len(table.read_text().splitlines()) - 1 == 3
    monkeypatch.setattr(ops, "gemm_s8", off_by_one_step(ops.gemm_s8))
    status, text = run_gemm(capsys, *options)
    assert status == 1
    assert (
        "wrong: 1 of 3072 elements differ, first y[31, 95]" in text and "3 cases were wrong" in text
    )
    assert all("us" not in row and "wrong" in row for row in json.loads(file.read_text())["rows"])


def test_every_tile_is_timed_and_a_wrong_one_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gemm_cases, "forced", off_by_one_step_tile(gemm_cases.forced, 2))
    status, text = run_gemm(capsys, "--tokens", "8", "--tiles", "--data", "random")
    assert status == 1
    names = {line.split("|")[0].strip() for line in text.splitlines() if "the time" in line}
    assert names >= {"stream 8x16", "16x32x64", "16x32x64 /2", "16x32x64 /4"}
    assert "64x64x64" not in names and text.count("| wrong: 1 of") == 3
    assert "3 cases were wrong" in text


def test_random_and_real_data_are_measured_and_a_run_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "gemm.json", tmp_path / "gemm.csv"
    options = ["--tokens", "32", "--json", str(file), "--csv", str(table)]
    assert run_gemm(capsys, *options)[0] == 0
    data = json.loads(file.read_text())
    assert [row["data"] for row in data["rows"]] == ["random"] * 3 + ["real"] * 3
    assert data["geomeans"]["all"]["cases"] == data["geomeans_real"]["all"]["cases"] == 3
    with table.open() as text:
        written = list(csv.DictReader(text))
    for row, plain in zip(data["rows"], written, strict=True):
        assert row["also"] == [] and {f"vs_{name}" for name in baselines.USUAL} <= set(plain)
        for name in baselines.USUAL:  # a number, or a reason
            assert (row[f"vs_{name}"] is None) == bool(row.get(f"{name}_missing"))
        assert row["vs_fp16"] * row["us"] == pytest.approx(row["fp16_us"])
    del data["rows"][1]
    file.write_text(json.dumps(data))
    status, text_again = run_gemm(capsys, *options, "--resume")
    assert status == 0 and "5 cases were measured before, 1 are left" in text_again
    assert len(json.loads(file.read_text())["rows"]) == 6


def test_the_most_telling_cases_come_with_real_data_early() -> None:
    args = bench_gemm.parse(["--device", "cpu"])
    args.layers, args.tokens = list(LLM_LAYERS.values()), GEMM_TOKENS
    found, n = bench_gemm.cases(args), bench_gemm.TELLING
    assert [case.data for case in found[: 2 * n + 1]] == ["random"] * n + ["real"] * n + ["random"]
    assert [case.key for case in found[:n]] == [case.key for case in found[n : 2 * n]]
    assert len({(case.key, case.data) for case in found}) == len(found)


def test_a_baseline_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gemm_cases, "int_mm", off_by_one_step(gemm_cases.int_mm))
    options = ["--tokens", "32", "--data", "real", "--baselines", "fp16", "int_mm"]
    status, text = run_gemm(capsys, *options)
    assert status == 0 and text.count("x fp16 | - int_mm | tile") == 3 and "bf16" not in text
    assert "no int_mm in 1 cases: wrong: 1 of 3072 elements differ" in text


def off_by_one_step_tile(function: Ops, bad: int) -> Ops:
    def wrong(operands: gemm_cases.Operands, tile: int, splits: int) -> Tensor:
        y = function(operands, tile, splits)
        if tile == bad:
            y[0, 0] += 1
        return y

    return wrong


def test_a_sample_of_a_large_result_sees_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Layer("toy", "wide", 200, 16), 130)
    generator = gemm_cases.generator(case, CPU)
    operands = gemm_cases.make_operands(case, generator)
    y = gemm_cases.dispatched(operands)
    monkeypatch.setattr(gemm_cases, "FULL_CHECK", 0)
    monkeypatch.setattr(gemm_cases, "CHECK_BYTES", 64 << 10)  # several pieces
    expected = Expected(case, operands, generator)
    (rows, _, _), (_, columns, _) = expected.parts
    assert [int(i) // 64 for i in rows] == [0, 1, 2] and [int(j) // 64 for j in columns] == [
        0,
        1,
        2,
        3,
    ]
    assert expected.wrong(y) == ""
    for i in range(0, 128, 64):
        for j in range(0, 192, 64):
            spoilt = y.clone()
            spoilt[i : i + 64, j : j + 64] = math.nan  # what no kernel has written
            assert "elements differ" in expected.wrong(spoilt)
    assert "not torch.float16 (130, 200)" in expected.wrong(y[:1])


def test_clocks_are_read_while_the_gpu_works(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    variant = Recorded(lambda: log.append("replay"), calls=2)

    def sample() -> dict[str, float]:
        log.append("sample")
        return {"sm_mhz": 1000.0}

    pretended: Any = SimpleNamespace(type="cuda")
    found = gemm_cases.sample_under_load(variant, 10_000.0, sample, pretended)
    assert found == {"sm_mhz": 1000.0} and log == [*["replay"] * 3, "sample", "wait"]


def test_a_spent_budget_starts_no_gemm(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run_gemm(capsys, "--budget-seconds", "-1")
    assert status == 1 and "12 of 12 cases were not started: the time is spent" in text


# --- whole layers, the GPU's form -------------------------------------------------------------------------------------


def test_layers_of_every_kind_are_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "linear.json"
    options = ["--rehearse", "--tokens", "3", "--seconds", "0", "--json", str(file)]
    assert linear_gpu.run(bench_linear.parse(options)) == 0
    rows = json.loads(file.read_text())["rows"]
    kinds = {(row["scheme"], row["smooth"]) for row in rows}
    assert len(kinds) == 6 and len(rows) == 6 * len(TOY_LAYERS)
    for row in rows:
        operations = 2 * row["M"] * row["N"] * row["K"]
        assert row["gops"] * 1e9 * row["int8_us"] * 1e-6 == pytest.approx(operations)
        assert row["vs_float16"] * row["int8_us"] == pytest.approx(row["float16_us"])
        assert row["host_us"] > 0 and row["float16_host_us"] > 0
    capsys.readouterr()
    for name in ("linear_s8", "gemm_s8"):  # whichever the layer uses
        monkeypatch.setattr(ops, name, off_by_one_step(getattr(ops, name)))
    assert linear_gpu.run(bench_linear.parse([*options, "--scheme", "static", "--smooth"])) == 1
    text = capsys.readouterr().out
    assert text.count("static+smooth     | wrong: 1 of") == 3 and "3 cases were wrong" in text
