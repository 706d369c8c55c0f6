"""The loop of the benchmarks: what is measured, kept, tried again and refused. No test looks at a time."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import runner
from benchmarks.lib.runner import Row, WrongResult

FACTS = {"device": "toy", "torch": "2", "commit": "abc"}


def run(
    cases: list[int],
    measure: Callable[[int], Row | list[Row]] = lambda case: {"case": case, "us": 1},
    complete: Callable[[Row], bool] = lambda row: True,
    **changes: Any,
) -> list[Row]:
    plain = {"budget_seconds": 1e9, "json": None, "csv": None, "resume": False, "device": "cpu"}
    return runner.run_cases(
        cases,
        measure,
        key=lambda case: {"case": case},
        line=lambda row: f"case {row['case']} took {row['us']}",
        args=argparse.Namespace(**{**plain, **changes}),
        facts=FACTS,
        summary=lambda rows: {"sum": sum(row["us"] for row in rows)},
        complete=complete,
    )


def test_a_case_that_fails_stops_no_other_and_is_in_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(case: int) -> Row | list[Row]:
        if case == 2:
            raise WrongResult("off by one\nand more")
        if case == 3:
            raise RuntimeError("no memory")
        if case == 1:
            return [{"case": case, "us": 5, "part": part} for part in ("a", "b")]
        return {"case": case, "us": 7}

    file, table = tmp_path / "r.json", tmp_path / "r.csv"
    rows = run([2, 0, 3, 1], measure, json=file, csv=table)
    assert rows == [
        {"case": 2, "wrong": "off by one"},
        {"case": 0, "us": 7},
        {"case": 3, "failed": "no memory"},
        {"case": 1, "us": 5, "part": "a"},
        {"case": 1, "us": 5, "part": "b"},
    ]
    assert json.loads(file.read_text()) == {"machine": FACTS, "sum": 17, "rows": rows}
    with table.open() as text:
        assert [row["us"] for row in csv.DictReader(text)] == ["", "7", "", "5", "5"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["2 | wrong: off by one", "case 0 took 7", "3 | failed: no memory"]
    assert runner.status(rows) == 1 and "2 cases were wrong or failed" in capsys.readouterr().out
    assert runner.status(rows[1:2]) == 0 and runner.status([]) == 1


def test_what_was_measured_is_kept_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    before = [{"case": 1, "us": 3}, {"case": 2, "us": 4}, {"case": 2, "failed": "no memory"}]
    file.write_text(json.dumps({"machine": FACTS, "rows": before}))
    seen: list[int] = []

    def measure(case: int) -> Row:
        seen.append(case)
        return {"case": case, "us": 10}

    rows = run([1, 2, 4], measure, json=file, resume=True)
    assert seen == [4, 2]  # what failed may fail again: it comes last
    assert rows == [{"case": 1, "us": 3}, {"case": 4, "us": 10}, {"case": 2, "us": 10}]
    assert json.loads(file.read_text())["sum"] == 23
    assert run([1, 2, 4], measure, json=file, resume=True) == rows and seen == [4, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no results file"),
        ("[]", "is no results file"),
        (json.dumps({"machine": {**FACTS, "commit": "def"}, "rows": []}), "commit was 'def', is 'abc'"),
        (json.dumps({"machine": {**FACTS, "device": "A"}, "rows": []}), "device was 'A', is 'toy'"),
    ],
)  # fmt: skip
def test_results_of_something_else_are_not_continued(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "r.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=said):
        run([1], json=file, resume=True)
    assert file.read_text() == text


def test_a_spent_budget_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([1, 2, 3], budget_seconds=-1) == []
    assert "3 of 3 cases were not started: the time is spent" in capsys.readouterr().out


def test_a_dead_gpu_leaves_the_other_cases_to_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 2 breaks the context each time it is measured: it is tried once, and again when all others are done."""
    seen: list[int] = []

    def measure(case: int) -> Row:
        seen.append(case)
        if case == 2:
            raise RuntimeError("CUDA error: an illegal memory access")
        return {"case": case, "us": 1}

    monkeypatch.setattr(runner, "usable", lambda device: seen[-1] != 2)
    assert [row["case"] for row in run([1, 2, 3], measure)] == [1, 2]  # no file, no new process
    seen.clear()
    file = tmp_path / "r.json"
    with pytest.raises(SystemExit) as left:
        run([1, 2, 3, 4], measure, json=file)
    assert left.value.code == runner.CONTEXT_LOST and seen == [1, 2]
    rows = run([1, 2, 3, 4], measure, json=file, resume=True)
    assert seen == [1, 2, 3, 4, 2]
    good = [row["case"] for row in rows if runner.is_good(row)]
    assert good == [1, 3, 4] and [row["case"] for row in rows] == [1, 3, 4, 2]
    assert json.loads(file.read_text())["rows"] == rows


def test_a_row_that_lacks_something_is_measured_again_first(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    cases = list(range(runner.AGAIN + 2))
    before = [{"case": case, "us": 3} for case in cases if case != 1]
    file.write_text(json.dumps({"machine": FACTS, "rows": before}))
    seen: list[int] = []

    def measure(case: int) -> Row:
        seen.append(case)
        return {"case": case, "us": 10, "more": 1}

    rows = run(cases, measure, json=file, resume=True, complete=lambda row: "more" in row)
    assert seen == [0, *range(2, runner.AGAIN), 1]
    assert {row["case"]: "more" in row for row in rows} == {c: c < runner.AGAIN for c in cases}


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        ("gemm", ["--device", "cpu", "--resume"], "name it with --json"),
        ("block", ["--device", "cpu", "--models", "GPT-9"], "there is no model 'GPT-9' here; the models are: SmolLM2"),
        ("block", ["--device", "cuda", "--quick"], "--quick is for --device cpu"),
        ("model", ["--device", "cuda", "--quick"], "--quick is for --device cpu"),
        ("model", ["--device", "cpu", "--quick", "--layers", "0"], "--layers 0: a model has at least one"),
        ("linear", ["--device", "cuda", "--rehearse"], "--rehearse is for --device cpu"),
        ("tuner.__main__", ["--with-candidates"], "name it with --cache"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(
    module: str, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = pytest.importorskip(f"benchmarks.{module}").parse
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2 and sentence in " ".join(capsys.readouterr().err.split())


def test_geometric_means_by_class_leave_out_what_is_missing() -> None:
    rows = [{"M": 1, "vs": 2.0}, {"M": 8, "vs": 8.0}, {"M": 64, "vs": None}, {"M": 4096, "vs": 1.0}]
    means = runner.geomeans(rows, ["vs"])
    assert means["M <= 8"] == pytest.approx({"cases": 2, "vs": 4.0})
    assert means["M 9-64"] == {"cases": 1} and "M 65-512" not in means
    assert means["all"] == pytest.approx({"cases": 4, "vs": 16 ** (1 / 3)})
