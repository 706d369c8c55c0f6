"""The tuner: what it concludes from measurements, that it continues its own file, and that it times nothing wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib import cases
from benchmarks.lib.cases import TOY_TABLE
from benchmarks.tuner import __main__ as tuner
from benchmarks.tuner import choices
from benchmarks.tuner import rules as tuner_rules
from benchmarks.tuner.rules import ANY_M, Rule, rules
from tests.support import c_gemm, described
from tools.build.plan import ROOT

#: A row of C++: {most_m, {"a tile", ...}, "why"},
ROW = re.compile(r'^\s*\{(\w+),\s+\{("[^{}]+")\},\s+"([^"]+)"\},$')
MACHINE = {"device": "NVIDIA H100 80GB HBM3", "sms": 132, "date": "2026-01-31"}
TILES = ROOT / "csrc" / "gemm" / "tiles"
#: The toy table as a tuning build has it: tile 3 is no shipped one.
TUNING_TABLE = TOY_TABLE | {
    "tiles": [
        *TOY_TABLE["tiles"],
        {
            "tile": 3, "name": "32x32x64", "kernel": "wgmma", "m": 32, "n": 32, "k": 64, "warps_m": 0, "warps_n": 0,
            "stages": 5, "schedule": "stream-K", "swap_ab": True, "cluster": [2, 1], "most_splits": 1, "rate": 80,
            "why": "for this test", "candidate": True,
        },
    ]
}  # fmt: skip


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


def parsed(lines: list[str]) -> list[tuple[int, tuple[str, ...], str]]:
    assert all(len(line) <= 100 for line in lines)
    text = re.sub(r'"\n\s+"', "", "\n".join(lines))  # adjacent strings are one
    rows = re.split(r"\n(?!     )", text)
    assert re.fullmatch(r"constexpr RuleRow k(Toy|Sm90)Rules\[\] = \{", rows[0])
    assert rows[-1] == "};"
    found = []
    for row in rows[1:-1]:
        match = ROW.match(row)
        assert match, row
        most = ANY_M if match[1] == "kAnyM" else int(match[1])
        found.append((most, tuple(re.findall(r'"([^"]+)"', match[2])), match[3]))
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
    gpu = "H100 80GB HBM3"
    found = parsed(tuner_rules.cpp_rules(TOY_TABLE, MACHINE, results))
    one_each = [(8, ("stream 8x16",)), (64, ("16x32x64",)), (256, ("64x64x64",))]
    assert [row[:2] for row in found] == [*one_each, (ANY_M, ("16x32x64", "64x64x64"))]
    off = "0.0 % off the best tiles"
    assert [why for *_, why in found] == [
        f"{gpu}, M 1 .. 8: 10.00 us, 12.00 us with 16x32x64 instead; {off}, 8 problems",
        # the square roots of 11 * 20 and 20 * 20.05
        f"{gpu}, M 16 .. 64: 14.83 us, 20.02 us with 64x64x64 instead; {off}, 2 problems",
        f"{gpu}, M 256: 40.00 us, 60.00 us with 16x32x64 instead; {off}, 1 problems",
        f"{gpu}, M 1024: 150.00 us, no other tile serves them all; {off}, 2 problems",
    ]


def test_a_streaming_kernel_is_never_for_more_tokens_than_its_tile_has() -> None:
    results = [result(8, {0: 1.0, 1: 9.0}), result(9, {1: 9.0, 2: 9.0}, now=1)]
    (first, last) = rules(TOY_TABLE, results)
    assert (first.most_m, first.tiles) == (8, (0,)) and last.most_m == ANY_M and 0 not in last.tiles
    # only M 8 was measured: what is beyond stays as the table has it
    lines = tuner_rules.cpp_rules(TOY_TABLE, MACHINE, [result(8, {0: 1.0, 1: 9.0})])
    assert parsed(lines)[-1] == (ANY_M, ("64x64x64", "16x32x64"), "not measured")


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


def test_a_long_row_is_broken_between_names() -> None:
    names = {3: "32x32x64", **{i: f"{i}x128x256 swap stream-K" for i in range(10, 16)}}
    assert Rule(ANY_M, (3,), 1.0, 5, "short").row(names) == ['    {kAnyM, {"32x32x64"}, "short"},']
    words = " ".join(f"word{i}" for i in range(60))
    long = Rule(ANY_M, (10, 11, 12, 13), 1.25, 123456, words).row(names)
    (found,) = parsed(["constexpr RuleRow kSm90Rules[] = {", *long, "};"])
    assert found == (ANY_M, tuple(names[i] for i in range(10, 14)), words)


def spread(found: dict[str, Any], part: float) -> dict[str, Any]:
    """The result with percentiles that far below and above each time."""
    for time in found["times"]:
        time.update(p20=(1 - part) * time["us"], p80=(1 + part) * time["us"])
    return found


def test_rules_name_no_candidate_and_are_compared_with_shipped_tiles() -> None:
    results = [result(64, {1: 20.0, 2: 30.0, 3: 10.0}, now=1)]
    ((_, tiles, why),) = parsed(tuner_rules.cpp_rules(TUNING_TABLE, MACHINE, results))
    assert tiles == ("16x32x64",)
    assert "20.00 us, 30.00 us with 64x64x64" in why and "0.0 % off" in why
    only_rough = [result(64, {2: 30.0, 3: 10.0}, now=2)]
    only_rough[0]["times"][0]["rough"] = True
    assert tuner_rules.cpp_rules(TUNING_TABLE, MACHINE, only_rough) == []


def test_a_candidate_that_clearly_wins_is_to_be_promoted() -> None:
    results = [
        spread(result(256, {1: 22.0, 2: 20.0, 3: 16.0}, now=2), 0.01),
        spread(result(512, {2: 20.0, 3: 21.0}, now=2), 0.01),
        spread(result(4096, {2: 200.0, 3: 199.0}, now=2), 0.001),  # 0.5 %: may be noise
        spread(result(8192, {2: 210.0, 3: 200.0}, now=2), 0.1),  # 5 %, and the rounds overlap
    ]
    lines = choices.promotions(TUNING_TABLE, MACHINE, results)
    gain = 100 * (1.25**0.5 - 1)
    assert lines[:2] == [
        "// promote this row: 32x32x64",
        f"//   M 65-512: geomean gain {gain:.1f} % over 2 problems, clear in 1; "
        "most 25.0 % at M 256 N 64 K 64: 16.00 us, 64x64x64 20.00 us",
    ]
    assert lines[2:] == [
        f"    // H100 80GB HBM3: {gain:.1f} % off in 2 problems of M 65-512.",
        "    wgmma(32, 32, 64).swap_ab().stream_k().cluster(2, 1).stages(5).rate(80),",
    ]
    wrong = {"tile": 3, "splits": 1, "what": "wrong", "why": "1 of 64 elements differ"}
    results[3]["not_timed"] = [wrong]
    assert choices.promotions(TUNING_TABLE, MACHINE, results) == []
    assert choices.promotions(TOY_TABLE, MACHINE, [result(64, {1: 2.0}, now=1)]) == []


def test_a_candidate_never_drives_the_best_shipped_tile_out_of_the_finals() -> None:
    copies = [TUNING_TABLE["tiles"][3] | {"tile": 3 + i} for i in range(6)]
    many = TUNING_TABLE | {"tiles": [*TOY_TABLE["tiles"], *copies]}
    rough = {(3 + i, 1): 1.0 + i / 100 for i in range(6)} | {(1, 1): 5.0, (2, 1): 6.0}
    assert choices.finalists(many, rough) == [(1, 1), (3, 1), (4, 1), (5, 1)]
    near = {(1, s): 10.0 + s for s in (1, 2, 4)} | {(2, 1): 15.5}
    assert choices.finalists(many, near) == [(1, 1), (1, 2), (1, 4)]  # 1.4 x 11 < 15.5


@pytest.mark.compiler
def test_rows_of_the_library_are_printed_as_they_are_written(tmp_path: Path) -> None:
    """Every tile of every table, candidates too, and nothing else."""
    library = described.copied(tmp_path, "-DSQK_TUNING=1")
    for name, table in c_gemm.tables(library).items():
        assert any(tile["candidate"] for tile in table["tiles"])
        text = re.sub(r"\n {6,}", "", (TILES / f"{name}.h").read_text())
        written = re.findall(r"^    (?:stream|mma|wgmma)\(.*\),$", text, re.MULTILINE)
        assert [choices.cpp_row(tile) for tile in table["tiles"]] == written


def test_rates_count_what_a_tile_multiplies() -> None:
    table = TOY_TABLE | {"name": "sm90"}
    at = result(60, {1: 10.0, 2: 5.0}, now=1, n=100, sm_mhz=1000.0)
    peak = 2 * 4096 * 132 * 1e9
    found = tuner_rules.rates(table, [at, result(60, {1: 20.0}, now=1, n=100, sm_mhz=1000.0)], 132)
    assert found[1][0] == pytest.approx(100 * 2 * 64 * 128 * 64 / 10e-6 / peak)
    assert found[2][0] == pytest.approx(100 * 2 * 64 * 128 * 64 / 5e-6 / peak)
    (line,) = tuner_rules.rate_lines(table, [result(60, {1: 1.0}, now=1)], 132)
    assert "no clock was read" in line


def test_what_the_dispatch_loses() -> None:
    results = [result(8, {0: 12.0, 1: 10.0}), result(64, {1: 10.0, 2: 30.0}, now=1)]
    assert tuner_rules.loss_means(results) == pytest.approx(
        {"M <= 8": 1.2, "M 9-64": 1.0, "all": 1.2**0.5}
    )
    line = tuner_rules.loss_line(TOY_TABLE, results[0])
    assert "12.00 us stream 8x16" in line and "best    10.00 us 16x32x64" in line
    assert line.endswith("loses 20.0 %")
    rough = {"tile": 2, "splits": 1, "us": 1.0, "rough": True}  # a rough time is never the best
    assert tuner_rules.loss(results[0] | {"times": [*results[0]["times"], rough]}) == 1.2


def run(*options: str) -> int:
    return tuner.run(tuner.parse(["--device", "cpu", "--seconds", "0", *options]))


def test_the_tuner_continues_its_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune.json"
    assert run("--tokens", "8", "--json", str(file)) == 0
    first = json.loads(file.read_text())
    # 3 tiles, one of them split in 1, 2, 4
    assert [len(r["times"]) for r in first["results"]] == [5, 5, 5]
    assert "3 cases were measured before" not in capsys.readouterr().out
    assert run("--tokens", "8", "32", "--json", str(file), "--resume") == 0
    both = json.loads(file.read_text())
    assert both["results"][:3] == first["results"]
    assert [r["M"] for r in both["results"]] == [8] * 3 + [32] * 3
    # 32 tokens are too many for tile 0
    assert {t["tile"] for t in both["results"][3]["times"]} == {1, 2}
    text = capsys.readouterr().out
    assert "3 cases were measured before, 3 are left" in text
    tuner.report(both, tuner.parse(["--device", "cpu"]))
    assert capsys.readouterr().out in text
    lines = [line for line in text.splitlines() if not line.startswith("//")]
    assert parsed(lines[lines.index("constexpr RuleRow kToyRules[] = {") :])[-1][0] == ANY_M


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data["machine"].update(device="NVIDIA A100"), "device was 'NVIDIA A100'"),
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
    right = cases.forced

    def forced(operands: cases.Operands, tile: int, splits: int) -> torch.Tensor:
        if splits == 4:
            raise RuntimeError("no 4 splits here\nand much more")
        y = right(operands, tile, splits)
        return y + 1 if tile == 2 else y

    monkeypatch.setattr(cases, "forced", forced)
    file = tmp_path / "tune.json"
    assert run("--tokens", "32", "--json", str(file)) == 1
    for found in json.loads(file.read_text())["results"]:
        assert {(t["tile"], t["splits"]) for t in found["times"]} == {(1, 1), (1, 2)}
        refused = {(t["tile"], t["splits"], t["what"]) for t in found["not_timed"]}
        assert refused == {(1, 4, "refused"), (2, 1, "wrong")}
    text = capsys.readouterr().out
    assert "refused: tile 16x32x64 /4 in 3 problems: no 4 splits here\n" in text
    assert '     {"16x32x64"},\n' in text
