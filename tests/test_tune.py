"""The tuner: what it concludes from measurements, that it continues its own file, and that it times nothing wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gemm_cases
import pytest
import torch
import tune
import tune_rules
from gemm_cases import TOY_TABLE
from tune_rules import ANY_M, Rule, rules

#: A row of C++: {most_m, {four tiles}, "when", "why"},
ROW = re.compile(r'^\s*\{(\w+), \{(-?\d+(?:, -?\d+){5})\}, "([^"]+)",\s+"([^"]+)"\},$')


def result(
    m: int, times: dict[int, float], *, n: int = 64, now: int = 0, **more: Any
) -> dict[str, Any]:
    """As `tune.measure` returns it: microseconds by tile, the dispatch takes tile `now`."""
    return {
        "model": "toy", "layer": "up", "M": m, "N": n, "K": 64,
        "dispatched": {"tile": now, "splits": 1, "us": times[now]},
        "times": [{"tile": t, "splits": 1, "us": us, "rough": False} for t, us in times.items()],
        "not_timed": [],
        **more,
    }  # fmt: skip


def parsed(lines: list[str]) -> list[tuple[int, tuple[int, ...], str, str]]:
    assert (
        re.fullmatch(r"constexpr GemmRule k(Toy|Sm90)Rules\[\] = \{", lines[0])
        and lines[-1] == "};"
    )
    found = []
    for line in lines[1:-1]:
        match = ROW.match(line.replace("\n", " "))
        assert match, line
        assert all(len(part) <= 100 for part in line.split("\n"))
        most = ANY_M if match[1] == "kAnyM" else int(match[1])
        found.append((most, tuple(map(int, match[2].split(", "))), match[3], match[4]))
    return found


def test_rules_are_rows_that_cover_all_m() -> None:
    results = [
        result(m, {0: 10.0, 1: 12.0, 2: 20.0}, n=n) for m in (1, 2, 4, 8) for n in (64, 96)
    ] + [
        result(16, {1: 11.0, 2: 20.0}, now=1),
        result(64, {1: 20.0, 2: 20.05}, now=1),
        result(256, {1: 60.0, 2: 40.0}, now=1),
        result(1024, {1: 200.0, 2: 150.0}, now=1),
        result(1024, {1: 150.0, 2: 200.0}, now=1, n=96),
    ]
    lines = tune_rules.cpp_rules(TOY_TABLE, results)
    assert parsed(lines) == [
        (
            8,
            (0, -1, -1, -1, -1, -1),
            "M <= 8",
            "measured: 0.0 % off the best of all tiles, 8 problems",
        ),
        (
            64,
            (1, -1, -1, -1, -1, -1),
            "M <= 64",
            "measured: 0.0 % off the best of all tiles, 2 problems",
        ),
        (
            256,
            (2, -1, -1, -1, -1, -1),
            "M <= 256",
            "measured: 0.0 % off the best of all tiles, 1 problems",
        ),
        (
            ANY_M,
            (1, 2, -1, -1, -1, -1),
            "M > 256",
            "measured: 0.0 % off the best of all tiles, 2 problems",
        ),
    ]


def test_a_streaming_kernel_is_never_for_more_tokens_than_its_tile_has() -> None:
    (first, last) = rules(
        TOY_TABLE, [result(8, {0: 1.0, 1: 9.0}), result(9, {1: 9.0, 2: 9.0}, now=1)]
    )
    assert (first.most_m, first.tiles) == (8, (0,)) and last.most_m == ANY_M and 0 not in last.tiles
    # only M 8 was measured: what is beyond stays as the table has it
    lines = tune_rules.cpp_rules(TOY_TABLE, [result(8, {0: 1.0, 1: 9.0})])
    assert parsed(lines)[-1] == (ANY_M, (2, 1, -1, -1, -1, -1), "M > 8", "not measured")


def test_a_tile_that_was_wrong_once_is_no_candidate() -> None:
    wrong = {"tile": 2, "splits": 1, "what": "wrong", "why": "1 of 64 elements differ"}
    results = [
        result(64, {1: 20.0, 2: 10.0}, now=1),
        result(128, {1: 20.0}, now=1, not_timed=[wrong]),
    ]
    (rule,) = rules(TOY_TABLE, results)
    assert rule.tiles == (1,) and rule.cost == pytest.approx(2**0.5)
    # nothing sound was timed for 8 tokens: the rule for more serves them, and with no other there is none
    alone = result(8, {2: 10.0}, now=2, not_timed=[wrong])
    (rule,) = rules(TOY_TABLE, [alone, *results])
    assert rule.tiles == (1,) and rules(TOY_TABLE, [alone]) == []


def test_a_candidate_that_is_refused_is_completed_by_one_that_is_not() -> None:
    results = [result(64, {1: 20.0, 2: 10.0}, now=1), result(64, {1: 20.0}, now=1, n=96)]
    (rule,) = rules(TOY_TABLE, results)
    assert set(rule.tiles) == {1, 2} and rule.cost == 1.0


def test_a_rule_of_one_row_says_any_m_and_a_long_row_is_broken() -> None:
    assert '"any M"' in Rule(ANY_M, (3,), 1.0, 5).row(0)
    long = Rule(ANY_M, (10, 11, 12, 13), 1.25, 123456).row(4096)
    assert "\n     " in long and parsed(["constexpr GemmRule kSm90Rules[] = {", long, "};"])


def test_rates_count_what_a_tile_multiplies() -> None:
    table = TOY_TABLE | {"name": "sm90"}
    at = result(60, {1: 10.0, 2: 5.0}, now=1, n=100, sm_mhz=1000.0)
    peak = 2 * 4096 * 132 * 1e9
    found = tune_rules.rates(table, [at, result(60, {1: 20.0}, now=1, n=100, sm_mhz=1000.0)], 132)
    assert found[1][0] == pytest.approx(100 * 2 * 64 * 128 * 64 / 10e-6 / peak)
    assert found[2][0] == pytest.approx(100 * 2 * 64 * 128 * 64 / 5e-6 / peak)
    assert (
        "no clock was read" in tune_rules.rate_lines(table, [result(60, {1: 1.0}, now=1)], 132)[0]
    )


def test_what_the_dispatch_loses() -> None:
    results = [result(8, {0: 12.0, 1: 10.0}), result(64, {1: 10.0, 2: 30.0}, now=1)]
    assert tune_rules.loss_means(results) == pytest.approx(
        {"M <= 8": 1.2, "M 9-64": 1.0, "all": 1.2**0.5}
    )
    line = tune_rules.loss_line(TOY_TABLE, results[0])
    assert "12.00 us stream 8x16" in line and "best    10.00 us 16x32x64" in line
    assert line.endswith("loses 20.0 %")
    rough = {"tile": 2, "splits": 1, "us": 1.0, "rough": True}  # a rough time is never the best
    assert tune_rules.loss(results[0] | {"times": [*results[0]["times"], rough]}) == 1.2


# --- measuring --------------------------------------------------------------------------------------------------------


def run(*options: str) -> int:
    return tune.run(tune.parse(["--device", "cpu", "--seconds", "0", *options]))


def test_the_tuner_continues_its_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.json"
    assert run("--tokens", "8", "--json", str(file)) == 0
    first = json.loads(file.read_text())
    assert [len(r["times"]) for r in first["results"]] == [
        5,
        5,
        5,
    ]  # 3 tiles, one of them split in 1, 2, 4
    assert "3 problems were measured before" not in capsys.readouterr().out
    assert run("--tokens", "8", "32", "--json", str(file), "--resume") == 0
    both = json.loads(file.read_text())
    assert both["results"][:3] == first["results"]
    assert [r["M"] for r in both["results"]] == [8] * 3 + [32] * 3
    assert {t["tile"] for t in both["results"][3]["times"]} == {
        1,
        2,
    }  # 32 tokens are too many for tile 0
    text = capsys.readouterr().out
    assert "3 problems were measured before, 3 are left" in text
    tune.report(both)
    assert capsys.readouterr().out in text
    lines = [line for line in text.splitlines() if not line.startswith("//")]
    table = lines[lines.index("constexpr GemmRule kToyRules[] = {") :]
    # A long row has two lines.
    table = re.split(r"\n(?!     )", "\n".join(table))
    assert parsed(table)[-1][0] == ANY_M


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["machine"].update(device="NVIDIA A100"), "was measured on NVIDIA A100"),
        (lambda data: data["table"]["tiles"][1].update(n=48), "with other tiles"),
    ],
)
def test_measurements_of_something_else_are_not_continued(
    tmp_path: Path, change: Any, said: str
) -> None:
    file = tmp_path / "tune.json"
    run("--tokens", "8", "--json", str(file), "--budget-seconds", "-1")
    machine = {"device": "cpu (a rehearsal: no GPU was measured)"}
    data = {"machine": machine, "table": json.loads(json.dumps(TOY_TABLE)), "results": []}
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(SystemExit, match=said):
        run("--json", str(file), "--resume")


def test_a_wrong_tile_is_not_timed_and_a_refused_one_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gemm_cases.forced

    def forced(operands: gemm_cases.Operands, tile: int, splits: int) -> torch.Tensor:
        if splits == 4:
            raise RuntimeError("no 4 splits here\nand much more")
        y = right(operands, tile, splits)
        return y + 1 if tile == 2 else y

    monkeypatch.setattr(gemm_cases, "forced", forced)
    file = tmp_path / "tune.json"
    assert run("--tokens", "32", "--json", str(file)) == 1
    for found in json.loads(file.read_text())["results"]:
        assert {(t["tile"], t["splits"]) for t in found["times"]} == {(1, 1), (1, 2)}
        assert {(t["tile"], t["splits"], t["what"]) for t in found["not_timed"]} == {
            (1, 4, "refused"),
            (2, 1, "wrong"),
        }
    text = capsys.readouterr().out
    assert "refused: tile 16x32x64 /4 in 3 problems: no 4 splits here\n" in text
    assert "{kAnyM, {1, -1, -1, -1, -1, -1}" in text
