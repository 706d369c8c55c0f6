"""The loop of the benchmarks: what is measured, kept, tried again and refused. No test looks at a time."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runner
from report import Row, WrongResult

FACTS = {"device": "toy", "torch": "2", "commit": "abc"}


def options(**changes: Any) -> argparse.Namespace:
    plain = {"budget_seconds": 1e9, "json": None, "csv": None, "resume": False, "device": "cpu"}
    return argparse.Namespace(**{**plain, **changes})


def run(
    cases: list[int],
    measure: Callable[[int], Row | list[Row]],
    complete: Callable[[Row], bool] = lambda row: True,
    **changes: Any,
) -> list[Row]:
    return runner.run_cases(
        cases,
        measure,
        key=lambda case: {"case": case},
        line=lambda row: f"case {row['case']} took {row['us']}",
        args=options(**changes),
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
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "2 | wrong: off by one",
        "case 0 took 7",
        "3 | failed: no memory",
        "case 1 took 5",
        "case 1 took 5",
    ]
    assert runner.status(rows) == 1 and "2 cases were wrong or failed" in capsys.readouterr().out
    assert runner.status(rows[1:2]) == 0 and runner.status([]) == 1


def test_what_was_measured_is_kept_and_what_failed_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert "1 cases were measured before, 2 are left" in capsys.readouterr().out
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
        run([1], lambda case: {"case": case, "us": 1}, json=file, resume=True)
    assert file.read_text() == text


def test_a_spent_budget_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([1, 2, 3], lambda case: {"case": case, "us": 1}, budget_seconds=-1) == []
    assert "3 of 3 cases were not started: the time is spent" in capsys.readouterr().out


def test_a_dead_gpu_ends_the_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "usable", lambda device: False)
    assert run([1, 2], lambda case: {"case": case, "us": 1}) == [{"case": 1, "us": 1}]
    assert "does not answer any more" in capsys.readouterr().out


def test_a_dead_gpu_leaves_the_other_cases_to_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 2 breaks the context each time it is measured: it is tried once, and again when all others are done."""
    seen: list[int] = []

    def measure(case: int) -> Row:
        seen.append(case)
        if case == 2:
            raise RuntimeError("CUDA error: an illegal memory access")
        return {"case": case, "us": 1}

    monkeypatch.setattr(runner, "usable", lambda device: seen[-1] != 2)
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


def test_resuming_needs_a_file() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    runner.add_options(parser)
    with pytest.raises(SystemExit):
        runner.check_options(parser, parser.parse_args(["--resume"]))
    runner.check_options(parser, parser.parse_args(["--resume", "--json", "x.json"]))
