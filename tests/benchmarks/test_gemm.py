"""The GEMM and whole layers, on toys: what is wrong is not timed, the columns add up, a run is continued."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gemm, linear
from benchmarks.lib import baselines, cases, planted
from benchmarks.lib.cases import Case, Expected
from benchmarks.lib.shapes import GEMM_TOKENS, LLM_LAYERS, TOY_LAYERS, Layer
from benchmarks.lib.timer import Recorded, Timing
from smoothquant_kernels import ops

CPU = torch.device("cpu")
TIMES = {"op": 200.0, "fp16": 340.0, "bf16": 330.0, "fp8": 190.0, "triton": 273.21, "sgl": 1.0}


def row_of(case: Case, times: dict[str, float], *more: Any) -> dict[str, Any]:
    return gemm.row_of(case, {n: Timing(us, us, us, 10, 2) for n, us in times.items()}, *more)


def test_the_columns_add_up() -> None:
    case = Case(LLM_LAYERS["LLaMA-7B up"], 2048)
    row = row_of(case, TIMES, {"int_mm": "why"}, "128x256x128")
    moved = 2048 * 4096 + 11008 * 4096 + 4 * 2048 + 4 * 11008 + 2 * 2048 * 11008
    assert row["bytes"] == moved and row["int_mm_missing"] == "why" and row["data"] == "random"
    assert row["tops"] == pytest.approx(2 * 2048 * 11008 * 4096 / 200e-6 / 1e12)
    assert row["gb_per_s"] == pytest.approx(moved / 200e-6 / 1e9)
    assert row["fp8_us"] == 190.0 and row["vllm_us"] is None


def test_means_are_by_class_of_m_and_kind_of_data() -> None:
    rows = []
    for m, data, us in ((64, "random", 20.0), (16, "random", 10.0), (64, "real", 16.0)):
        case = Case(LLM_LAYERS["LLaMA-7B o"], m, data)
        rows.append(row_of(case, {"op": us, "fp16": 2 * us, "triton": 40.0}))
    random, real = (gemm.means(rows)[name]["M 9-64"] for name in ("geomeans", "geomeans_real"))
    assert (random["cases"], real["cases"]) == (2, 1)
    assert random["vs_fp16"] == pytest.approx(2) and real["vs_triton"] == pytest.approx(2.5)
    assert random["vs_triton"] == pytest.approx(math.sqrt(8))
    assert random["tops"] == pytest.approx(math.sqrt(rows[0]["tops"] * rows[1]["tops"]))
    assert gemm.real_against_random(rows) == [1.25]


def test_the_bytes_are_those_of_the_tensors() -> None:
    case = Case(Layer("toy", "odd", 40, 23), 5)
    a = cases.make_operands(case, cases.generator_of(case, CPU))
    tensors = [a.x_q, a.w_q, a.x_scale, a.w_scale, cases.dispatched(a)]
    assert sum(t.nbytes for t in tensors) == case.bytes
    assert bool(cases.dispatched(a).isfinite().all())


def test_more_tokens_in_less_time_are_noted() -> None:
    row = {"model": "LLaMA-7B", "layer": "up", "N": 8, "K": 8, "tile": "a", "data": "random"}
    rows = [row | {"M": m, "us": us} for m, us in ((16, 5.0), (64, 9.0), (128, 7.0), (256, 6.9))]
    (sentence,) = gemm.cliffs(rows)
    assert sentence == "LLaMA-7B up takes 9.00 us at M 64 (a), but 6.90 us at M 256 (a)"


def off_by_one_step(function: Callable[..., Tensor], tile: int | None = None) -> Any:
    """`function` whose last element is one float16 step off; if `tile` is given, only with that tile."""

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        y = function(*args, **kwargs)
        if tile is None or tile in args[1:2]:
            y.view(-1).view(torch.int16)[-1] ^= 1
        return y

    return wrong


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = gemm.run(gemm.parse(["--device", "cpu", "--seconds", "0", *options]))
    return status, capsys.readouterr().out


def test_a_wrong_gemm_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gemm.json"
    options = ["--tokens", "32", "--data", "random", "--json", str(file)]
    monkeypatch.setattr(ops, "gemm_s8", off_by_one_step(ops.gemm_s8))
    status, text = run(capsys, *options)
    assert status == 1 and "3 cases were wrong" in text
    assert "wrong: 1 of 3072 elements differ, first y[31, 95]" in text
    assert all("us" not in row and "wrong" in row for row in json.loads(file.read_text())["rows"])


def test_every_tile_is_timed_and_a_wrong_one_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "forced", off_by_one_step(cases.forced, 2))
    status, text = run(capsys, "--tokens", "8", "--tiles", "--data", "random")
    assert status == 1
    names = {line.split("|")[0].strip() for line in text.splitlines() if "the time" in line}
    assert names >= {"stream 8x16", "16x32x64", "16x32x64 /2", "16x32x64 /4"}
    assert "64x64x64" not in names and text.count("| wrong: 1 of") == 3
    assert "3 cases were wrong" in text


def test_a_wrong_baseline_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "int_mm", off_by_one_step(cases.int_mm))
    options = ["--tokens", "32", "--data", "real", "--baselines", "fp16", "int_mm"]
    status, text = run(capsys, *options)
    assert status == 0 and text.count("x fp16 | - int_mm | tile") == 3 and "bf16" not in text
    assert "no int_mm in 1 cases: wrong: 1 of 3072 elements differ" in text


def test_random_and_real_data_are_measured_and_a_run_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "gemm.json", tmp_path / "gemm.csv"
    options = ["--tokens", "32", "--json", str(file), "--csv", str(table)]
    assert run(capsys, *options)[0] == 0
    data = json.loads(file.read_text())
    assert [row["data"] for row in data["rows"]] == ["random"] * 3 + ["real"] * 3
    assert data["geomeans"]["all"]["cases"] == data["geomeans_real"]["all"]["cases"] == 3
    with table.open() as text:
        written = list(csv.DictReader(text))
    for row, plain in zip(data["rows"], written, strict=True):
        assert row["tile"] == "64x64x64" and row["also"] == []
        assert {f"vs_{name}" for name in baselines.USUAL} <= set(plain)
        for name in baselines.USUAL:  # a number, or a reason
            assert (row[f"vs_{name}"] is None) == bool(row.get(f"{name}_missing"))
        assert row["vs_fp16"] * row["us"] == pytest.approx(row["fp16_us"])
    del data["rows"][1]
    file.write_text(json.dumps(data))
    status, text_again = run(capsys, *options, "--resume")
    assert status == 0 and "5 cases were measured before, 1 are left" in text_again
    assert len(json.loads(file.read_text())["rows"]) == 6


def test_the_most_telling_cases_come_with_real_data_early() -> None:
    args = gemm.parse(["--device", "cpu"])
    args.layers, args.tokens = list(LLM_LAYERS.values()), GEMM_TOKENS
    found, n = gemm.cases_of(args), gemm.TELLING
    assert [case.data for case in found[: 2 * n + 1]] == ["random"] * n + ["real"] * n + ["random"]
    assert [case.key for case in found[:n]] == [case.key for case in found[n : 2 * n]]
    assert len({(case.key, case.data) for case in found}) == len(found)


def test_a_sample_of_a_large_result_sees_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Layer("toy", "wide", 200, 16), 130)
    generator = cases.generator_of(case, CPU)
    operands = cases.make_operands(case, generator)
    y = cases.dispatched(operands)
    monkeypatch.setattr(cases, "FULL_CHECK", 0)
    monkeypatch.setattr(cases, "CHECK_BYTES", 64 << 10)  # several pieces
    expected = Expected(case, operands, generator)
    (rows, _, _), (_, columns, _) = expected.parts
    assert [[int(i) // 64 for i in part] for part in (rows, columns)] == [[0, 1, 2], [0, 1, 2, 3]]
    assert expected.wrong(y) == ""
    for i in range(0, 128, 64):
        for j in range(0, 192, 64):
            spoiled = y.clone()
            spoiled[i : i + 64, j : j + 64] = math.nan  # what no kernel has written
            assert "elements differ" in expected.wrong(spoiled)
    assert "not torch.float16 (130, 200)" in expected.wrong(y[:1])


def test_clocks_are_read_while_the_gpu_works(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    variant = Recorded(lambda: log.append("replay"), calls=2)

    def sample() -> dict[str, float]:
        log.append("sample")
        return {"sm_mhz": 1000.0}

    pretended: Any = SimpleNamespace(type="cuda")
    found = cases.sample_under_load(variant, 10_000.0, sample, pretended)
    assert found == {"sm_mhz": 1000.0} and log == [*["replay"] * 3, "sample", "wait"]


def test_planted_outliers_keep_the_function() -> None:
    from tests.support.models import make_model, token_batches

    model = make_model("llama")
    ids = token_batches(1)[0]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        norm = model.get_submodule("model.layers.1.input_layernorm")
        weight = norm.weight.detach().clone()
        readers = planted.llama_readers(model)
        assert len(readers) == 4 and all(len(names) in (2, 3) for names in readers.values())
        planted.plant_outliers(model, readers)
        assert int((norm.weight.abs() > 10 * weight.abs()).sum()) == 6
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_layers_of_every_kind_are_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "linear.json"
    options = ["--rehearse", "--tokens", "3", "--seconds", "0", "--json", str(file)]
    assert linear.run(linear.parse(options)) == 0
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
    assert linear.run(linear.parse([*options, "--scheme", "static", "--smooth"])) == 1
    text = capsys.readouterr().out
    assert text.count("static+smooth     | wrong: 1 of") == 3 and "3 cases were wrong" in text
