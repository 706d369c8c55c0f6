"""The first stage after the build: what becomes of a kernel that is wrong, crashes or hangs. Processes are fakes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu import first_light, kernel_checks, processes
from benchmarks.on_gpu.first_light import MARK, PHASES
from tests.benchmarks.programs import Done, python, simulated
from tests.support import simulator

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the kit runs on Linux")

ALL_OK = dict.fromkeys(PHASES, "ok")
#: What a row's process does.
SAY = f"import json, os, sys, time; say = lambda **m: print({MARK!r} + json.dumps(m), flush=True)\n"
ACTS = {
    "fine": f"say(phases={ALL_OK}); say(done=True)",
    "off": f"say(phases={ALL_OK | {'shapes': 'wrong: 3 of 9 elements differ'}}); say(done=True)",
    "no graph": f"say(phases={ALL_OK | {'graph': 'refused: not while capturing'}}); say(done=True)",
    "error": "say(phases={'graph': 'ok'}, begin='shapes'); raise RuntimeError('CUDA error: an illegal address')",
    "signal": "say(begin='repeats'); os.kill(os.getpid(), 31)",
    "early": "sys.exit(0)",
    "silent": "sys.stderr.write('no such tile'); sys.exit(3)",
    "hang": "say(begin='dependent'); time.sleep(600)",
}


def row(name: str, kind: str = "tile", **more: Any) -> first_light.Row:
    return {"name": name, "id": name.replace(" ", "-"), "kind": kind, "candidate": False, **more}


def acted(name: str) -> processes.Work:
    return lambda: exec(SAY + ACTS[name], {})


def test_every_way_to_end_has_its_word() -> None:
    rows = [row(name) for name in ACTS]
    seen: list[str] = []
    found = first_light.run_rows(
        rows, lambda r: acted(r["name"]), jobs=8, limit=4, seconds=60,
        report=lambda r: seen.append(r["name"]),
    )  # fmt: skip
    assert {r["name"]: r["status"] for r in found} == {
        "fine": "ok", "off": "wrong", "no graph": "refused", "error": "crashed", "signal": "crashed",
        "early": "crashed", "silent": "crashed", "hang": "hung",
    }  # fmt: skip
    assert sorted(seen) == sorted(ACTS)
    why = {r["name"]: r["why"] for r in found}
    assert why["off"] == "shapes: wrong: 3 of 9 elements differ"
    assert why["error"] == "in shapes: RuntimeError: CUDA error: an illegal address"
    assert why["signal"] == "in repeats: SIGSYS"
    assert why["early"] == "before the first check: exit status 0"
    assert why["silent"] == "before the first check: no such tile"
    assert why["hang"] == "in dependent"
    phases = {r["name"]: r["phases"] for r in found}
    assert phases["error"] == {"graph": "ok", "shapes": "crashed"}
    assert phases["hang"] == {"dependent": "hung"}
    # What follows goes without the broken ones, and only without those.
    assert first_light.broken_tiles(found) == ["off", "error", "signal", "early", "silent", "hang"]
    printed = first_light.line(next(r for r in found if r["name"] == "hang"))
    assert printed.split()[:6] == ["hang", "hung", ".", ".", "hung", "."]


def alive(pid: int) -> bool:
    """A zombie whose parent has not asked for it is dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_hangs_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    """Its children hold the pipe of the output open; nobody waits for them."""
    note = tmp_path / "pids"

    def hang() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note.write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)

    ends: list[processes.Ended] = []
    processes.run_all([hang], 3, at_a_time=1, seconds=60, on_end=lambda _, end: ends.append(end))
    assert [end.code for end in ends] == [None]
    pids = [int(word) for word in note.read_text().split()]
    assert len(pids) == 2
    for _ in range(100):
        if not any(map(alive, pids)):
            break
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_copy_of_this_process_says_how_it_ended() -> None:
    def fine() -> None:
        print("words", os.environ["SQK_TOLD"])

    def broken() -> None:
        raise ValueError("broken")

    works = [fine, broken, lambda: sys.exit("no GPU"), lambda: 7]
    ends: dict[int, processes.Ended] = {}
    processes.run_all(
        works, 30, at_a_time=4, seconds=60, on_end=ends.__setitem__, environment={"SQK_TOLD": "so"}
    )
    assert [ends[i].code for i in range(4)] == [0, 1, 1, 7]
    assert ends[0].out == "words so\n" and "SQK_TOLD" not in os.environ
    assert processes.last_words(1, ends[1].err) == "ValueError: broken" and ends[2].err == "no GPU"


def test_no_more_run_at_a_time_than_asked(tmp_path: Path) -> None:
    def count() -> None:
        name = tmp_path / str(os.getpid())
        name.touch()
        print(len(list(tmp_path.iterdir())))
        time.sleep(0.2)
        name.unlink()

    most: list[int] = []
    processes.run_all(
        [count] * 5, 30, at_a_time=2, seconds=60, on_end=lambda _, end: most.append(int(end.out))
    )
    assert len(most) == 5 and max(most) <= 2


def test_rows_that_find_no_time_are_not_run_and_a_candidate_among_them_is_left_out() -> None:
    rows = [row("shipped"), row("new", candidate=True), row("quantize", "producer")]
    found = first_light.run_rows(rows, lambda r: acted("fine"), jobs=2, limit=9, seconds=0)
    assert [r["status"] for r in found] == ["not run"] * 3
    assert first_light.broken_tiles(found) == ["new"]
    assert first_light.working_producers(found) == ["quantize"]


def test_a_row_that_the_end_of_the_time_stops_is_not_called_hung() -> None:
    limits = {"limit": 60, "seconds": 4}
    (found,) = first_light.run_rows([row("slow")], lambda r: acted("hang"), jobs=1, **limits)
    assert found["status"] == "not run" and found["why"] == "the time was spent in dependent"


def test_where_no_tile_works_none_is_to_blame() -> None:
    rows = [row("a", status="crashed", phases={}), row("b", status="hung", phases={})]
    assert first_light.broken_tiles(rows) == []
    assert first_light.broken_tiles([*rows, row("c", status="ok", phases={})]) == ["a", "b"]


def test_tiles_that_nothing_describes_are_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def listing(device: str) -> None:
        kernel_checks.say(machine={}, rows=[], without_tiles="no module _kernels")

    monkeypatch.setattr(kernel_checks, "listing", listing)
    limits = {"limit": 60, "seconds": 60, "jobs": 1}
    args = argparse.Namespace(device="cpu", rows=None, json=None, resume=False, **limits)
    assert first_light.run(args) == 1
    assert "no tile is checked: no module _kernels" in capsys.readouterr().out


def test_a_candidate_is_named_to_a_library_that_holds_it_only(tmp_path: Path) -> None:
    """An unknown name would make every GEMM of the library fail."""
    info = tmp_path / "_build_info.json"
    for text, expected in (('{"tuning": true}', True), ('{"tuning": false}', False), ("", False)):
        info.write_text(text)
        assert first_light.is_built(row("new", candidate=True), info) == expected
        assert first_light.is_built(row("shipped"), info)


def test_a_wrong_gemm_after_a_producer_is_not_the_producers() -> None:
    rows = [
        row("fine", "producer", status="ok", phases=ALL_OK),
        row("gemm", "producer", status="wrong", phases=ALL_OK | {"dependent": "wrong: 1"}),
        row("own", "producer", status="wrong", phases=ALL_OK | {"shapes": "wrong: 1"}),
        row("dead", "producer", status="crashed", phases={"shapes": "crashed"}),
    ]
    assert first_light.working_producers(rows) == ["fine", "gemm"]


def started(*options: str) -> Done:
    return python("-m", "benchmarks.on_gpu.first_light", *options)


def test_the_file_names_what_to_leave_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(option: str, file: Path) -> str:
        assert first_light.main([option, str(file)]) == 0
        return capsys.readouterr().out

    file = tmp_path / "first_light.json"
    rows = [
        row("128x128x128", status="hung", phases={}),
        row("stream 8x16", status="ok", phases={}),
        row("64x64x256 swap", status="wrong", phases={}),
        row("quantize", "producer", status="ok", phases={}),
    ]
    file.write_text(json.dumps({"machine": {}, "rows": rows}))
    without = first_light.SEPARATOR.join(["128x128x128", "64x64x256-swap"])
    assert printed("--without", file) == without + "\n"
    assert printed("--producers", file) == "quantize\n"
    for text in ("", "{}", "[]", '{"rows": 3}'):
        file.write_text(text)
        assert printed("--without", file) == "\n"
    assert printed("--without", tmp_path / "none.json") == "\n"


@pytest.mark.slow
def test_it_runs_the_real_rows_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    """A rehearsal on a CPU: toy tiles through the dispatch, and every producer; graphs do not exist there."""
    file = tmp_path / "first_light.json"
    options = ["--device", "cpu", "--json", str(file), "--limit", "200", "--seconds", "400"]
    some = ["--rows", "16x32x64", "quantize", "act_quantize:silu_mul"]
    done = started(*options, *some)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    assert {r["name"] for r in data["rows"]} == set(some[1:])
    for found in data["rows"]:
        assert found["status"] == "ok" and found["phases"]["shapes"] == "ok"
        assert found["phases"]["graph"] == "-"
    assert "rehearsal" in data["machine"]["device"]
    assert "left out from here on: no tile" in done.stdout
    again = started(*options, "--resume", "--rows", "quantize", "act_quantize:relu")
    assert again.returncode == 0 and "1 rows were ok before, 1 are left" in again.stdout
    assert len(json.loads(file.read_text())["rows"]) == 4


@pytest.mark.simulator
@pytest.mark.slow
def test_the_rows_of_the_real_kernels_in_the_simulator(tmp_path: Path) -> None:
    """Real tiles and producers, dependent launches too, with the kernels' PTX."""
    simulator.require()
    file = tmp_path / "first_light.json"
    rows = ["stream 8x16", "16x64x128", "quantize", "act_quantize:silu_mul"]
    rows += ["rms_norm_quantize+residual", *kernel_checks.CACHE_OPS]
    options = ["-m", "benchmarks.on_gpu.first_light", "--device", "cpu", "--json", str(file)]
    options += ["--limit", "300", "--seconds", "900", "--jobs", "2", "--rows", *rows]
    done = simulated("sm_80", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {r["name"]: r for r in json.loads(file.read_text())["rows"]}
    assert set(found) == set(rows)
    for name in rows:
        assert found[name]["phases"]["shapes"] == found[name]["phases"]["repeats"] == "ok"
