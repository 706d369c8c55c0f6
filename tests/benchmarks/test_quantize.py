"""The producers of int8 activations, on toys: bytes, what is refused, columns and order. No test looks at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import quantize as bench
from benchmarks.lib import producers
from benchmarks.lib.producers import PRODUCERS, SCHEMES, Case
from benchmarks.lib.timer import Timing
from smoothquant_kernels import ops

CPU = torch.device("cpu")


def case(producer: str = "quantize", **changes: Any) -> Case:
    facts = {"smooth": False, "scheme": "per_token", "dtype": torch.float16, "m": 4, "k": 8}
    return Case(producer, **{**facts, **changes})


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PRODUCERS)
def test_the_bytes_are_those_of_the_tensors(name: str, scheme: str) -> None:
    this = case(name, scheme=scheme, smooth=True, m=5, k=7)
    inputs = producers.make_inputs(this, torch.Generator().manual_seed(0))
    scale = producers.static_scale(this, inputs)
    tensors = [*inputs.values(), *producers.run_op(this, inputs, scale)]
    if scale is not None:
        tensors.append(scale)
    assert sum(t.numel() * t.element_size() for t in tensors) == producers.bytes_moved(this)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PRODUCERS)
def test_every_producer_is_measured_beside_its_baselines(
    name: str, scheme: str, dtype: torch.dtype
) -> None:
    this = case(name, scheme=scheme, dtype=dtype, smooth=True, m=16, k=515)
    row = bench.measure(this, CPU, 0.0, bench.Compiler("none", 1))
    assert row["us_p20"] <= row["us"] <= row["us_p80"]
    assert "eager_missing" not in row and row["vs_eager"] > 0
    assert "--compile none" in row["compiled_missing"] and row["vs_compiled"] is None


def _one_element_off(function: Any, share: float) -> Any:
    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        x_q, *others = function(*args, **kwargs)
        flat = x_q.view(-1)
        count = max(1, int(share * flat.numel()))
        flat[:count] += torch.where(flat[:count] > 0, -1, 1).to(torch.int8)
        return (x_q, *others)

    return wrong


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    small = ["--device", "cpu", "--tokens", "16", "--widths", "256", "--dtypes", "fp16"]
    small += ["--rotation", "0", "--seconds", "0"]
    status = bench.run(bench.parse([*small, *options]))
    return status, capsys.readouterr().out


def test_a_wrong_op_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops, "quantize", _one_element_off(ops.quantize, 0))
    file = tmp_path / "q.json"
    some = ["--quick", "--producers", "quantize", "act_quantize:relu", "--json", str(file)]
    status, text = run(capsys, *some)
    rows = json.loads(file.read_text())["rows"]
    assert status == 1 and len(rows) == 4
    for row in rows:
        assert ("wrong" in row) == (row["producer"] == "quantize")
        assert ("us" in row) == (row["producer"] != "quantize")
    assert "wrong: 1 of 4096 elements of x_q differ, by up to 1" in text
    assert "geomean quantize" not in text and "2 cases were wrong" in text


def test_one_step_in_a_hundred_is_allowed_where_float32_rounds_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this = case("rms_norm_quantize", m=16, k=256)
    right = ops.rms_norm_quantize
    monkeypatch.setattr(ops, "rms_norm_quantize", _one_element_off(right, 0.009))
    bench.measure(this, CPU, 0.0, bench.Compiler("none", 1))
    monkeypatch.setattr(ops, "rms_norm_quantize", _one_element_off(right, 0.02))
    with pytest.raises(bench.WrongResult, match="81 of 4096"):
        bench.measure(this, CPU, 0.0, bench.Compiler("none", 1))


def test_a_wrong_scale_or_sum_is_seen() -> None:
    this = case("rms_norm_quantize+residual", m=3, k=64)
    inputs = producers.make_inputs(this, torch.Generator().manual_seed(0))
    right = producers.run_reference(this, inputs, None)
    assert producers.wrong_op(this, right, right) == ""
    x_q, x_scale, total = right
    nan = x_scale.clone()
    nan[1] = torch.nan
    assert "x_scale" in producers.wrong_op(this, (x_q, nan, total), right)
    assert "x_scale" in producers.wrong_op(this, (x_q, x_scale * 1.001, total), right)
    assert "residual" in producers.wrong_op(this, (x_q, x_scale, total + 1), right)
    assert "2 results, not 3" in producers.wrong_op(this, (x_q, x_scale), right)
    assert "not torch.int8" in producers.wrong_op(this, (x_q[:2], x_scale, total), right)


def test_a_compiler_that_fails_leaves_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    file = tmp_path / "q.json"
    options = ["--producers", "act_quantize:relu", "--compile", "default", "--json", str(file)]
    status, text = run(capsys, *options)
    rows = json.loads(file.read_text())["rows"]
    assert status == 0 and len(rows) == 6
    assert {row["compiled_missing"] for row in rows} == {"no compiler here"}
    assert "- compiled" in text and "not compiled in 6 cases: no compiler here" in text


def test_a_rotation_is_compared_with_none_on_a_cpu() -> None:
    rotated = bench.measure(case("quantize", m=4, k=64, rotation=16), CPU, 0.0, bench.Compiler("none", 1))  # fmt: skip
    assert rotated["vs_unrotated"] == pytest.approx(rotated["unrotated_us"] / rotated["us"])
    assert "x unrotated" in bench.line(rotated) and "unrotated" in bench.geomeans([rotated])["all"]
    plain = bench.measure(case("quantize", m=4, k=64), CPU, 0.0, bench.Compiler("none", 1))
    assert "vs_unrotated" not in plain


def test_a_cpu_measures_its_own_shapes_and_rehearses_toys() -> None:
    real, toys = (bench.parse(["--device", "cpu", *more]) for more in ([], ["--quick"]))
    assert real.dtypes == [torch.float32] and 4096 in real.hidden and real.rotation[0] == 256
    assert max(toys.hidden) < 1000 and torch.float32 not in toys.dtypes


def test_the_columns_add_up() -> None:
    this = case(m=2048, k=4096)
    moved, times = producers.bytes_moved(this), {"op": 12.5, "copy": 13.0, "eager": 40.0}
    timings = {name: Timing(us, us, us, 10, 2) for name, us in times.items()}
    row = bench.row_of(this, moved, timings)
    assert (row["vs_copy"], row["vs_eager"], row["vs_compiled"]) == (1.04, 3.2, None)
    assert row["gb_per_s"] == pytest.approx(moved / 12.5e-6 / 1e9)


def test_rotations_have_lines_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "q.json"
    some = ["--producers", "quantize", "--json", str(file), "--rotation", "0", "64", "512"]
    status, text = run(capsys, *some)
    rows = json.loads(file.read_text())["rows"]
    assert status == 0 and len(rows) == 3 * 2 * 2, "512 does not divide 256"
    assert [row["rotation"] for row in rows].count(64) == 6
    assert all(row["vs_eager"] > 0 and "eager_missing" not in row for row in rows)
    assert "quantize+smooth+rotate64 fp16 M 16 K 256 per_token" in text
    plain, rotated = (
        next(r for r in rows if r["rotation"] == group and not r["smooth"]) for group in (0, 64)
    )
    assert plain["bytes"] == rotated["bytes"]


def test_a_rotation_that_no_op_takes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--rotation", "0", "48"])
    assert "0 or a power of two from 2 to 512, not 48" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRODUCERS)
def test_the_eager_chain_rotates(name: str) -> None:
    this = case(name, m=16, k=512, rotation=128, smooth=True)
    inputs = producers.make_inputs(this, torch.Generator().manual_seed(0))
    expected = producers.run_reference(this, inputs, None)
    assert producers.wrong_baseline(producers.run_eager(this, inputs, None), expected) == ""
    plain = producers.run_reference(replace(this, rotation=0), inputs, None)
    assert producers.wrong_baseline(plain, expected) != ""


def test_the_most_telling_cases_come_first() -> None:
    names = list(PRODUCERS)
    found = bench.cases_of(names, (2048, 1, 64), (4096, 5120), (14336, 11008))
    assert len(found) == len(set(found)) == len(names) * 3 * 2 * 3 * 2 * 2
    first = found[: len(names)]
    assert [c.producer for c in first] == names
    assert {(c.m, c.scheme, c.dtype, c.smooth) for c in first} == {
        (2048, "per_token", torch.float16, False)
    }
    assert {c.k for c in first} == {4096, 14336}
    second = found[len(names) : 2 * len(names)]
    assert [c.producer for c in second] == names and {c.m for c in second} == {1}
