"""Whether every kernel works, each in a process of its own, so that a broken kernel harms no other.

    python -m benchmarks.on_gpu.first_light [--device cuda] [--json first_light.json] [--resume] [--seconds 40]
    python -m benchmarks.on_gpu.first_light --without first_light.json      # for SQK_WITHOUT_TILES; no GPU needed
    python -m benchmarks.on_gpu.first_light --producers first_light.json    # those that work

A row is a tile of the GPU's GEMM table, a producer of int8 activations or an op with an int8 cache. kernel_checks.py
and cache_checks.py make its checks, under CUDA_LAUNCH_BLOCKING=1 and a limit of its own. Each row ends as one of
    ok        every check passed
    refused   only the CUDA graph was refused; whatever ran was right
    wrong     a result is not the specification's
    crashed   the process ended early, as after a CUDA error
    hung      it was killed, with its children, at its limit
    not run   the time was spent
The exit status is 1 unless every row is ok. This process only copies itself and never starts CUDA.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import runner
from benchmarks.on_gpu import processes
from tools.build.plan import ROOT

BUILD_INFO = ROOT / "smoothquant_kernels" / "_build_info.json"
PHASES = ("graph", "shapes", "dependent", "repeats")
#: The prefix of what a row's process says to this one.
MARK = "@first-light "
#: The stages that follow leave out a row with one of these.
BROKEN = ("wrong", "crashed", "hung")
WITHOUT = "SQK_WITHOUT_TILES"
SEPARATOR = ","
#: No row starts with less than this left of the time.
LEAST_SECONDS = 3.0

#: {"name", "id": as SQK_WITHOUT_TILES has it, "kind": "tile", "producer" or "cache", "candidate"}, and after its run
#: also "status", "phases", "why" and "seconds".
Row = dict[str, Any]


def outcome(end: processes.Ended) -> Row:
    """Status, phases and reason, by what a row's process has said and how it ended."""
    phases: dict[str, str] = {}
    begun, done = "", False
    for message in messages(end.out):
        begun = message.get("begin", begun)
        phases |= message.get("phases", {})
        done = done or bool(message.get("done"))
    result: Row = {"phases": phases, "why": ""}
    if end.code == 0 and done:
        for status in ("wrong", "refused"):
            for name, said in phases.items():
                if said.startswith(status):
                    return result | {"status": status, "why": f"{name}: {said}"}
        return result | {"status": "ok"}
    status = "hung" if end.code is None else "crashed"
    if begun and begun not in phases:
        phases[begun] = status
    where = f"in {begun}" if begun else "before the first check"
    why = where if end.code is None else f"{where}: {processes.last_words(end.code, end.err)}"
    return result | {"status": status, "why": why}


def messages(out: str) -> list[dict[str, Any]]:
    """The messages of a process, without MARK; a line that was cut off is left out."""
    found = []
    for line in out.splitlines():
        if line.startswith(MARK):
            try:
                found.append(json.loads(line.removeprefix(MARK)))
            except ValueError:
                continue
    return found


def run_rows(
    rows: Sequence[Row],
    work: Callable[[Row], processes.Work],
    *,
    jobs: int,
    limit: float,
    seconds: float,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """All rows, in their order; `jobs` at a time, each at most `limit` seconds, together at most `seconds`."""
    begin = time.monotonic()
    found: dict[int, Row] = {}

    def ended(place: int, end: processes.Ended) -> None:
        row = {**rows[place], **outcome(end), "seconds": round(end.seconds, 1)}
        if row["status"] == "hung" and end.seconds < limit and time.monotonic() > begin + seconds:
            row |= {"status": "not run", "why": f"the time was spent {row['why']}"}
        found[place] = row
        report(row)

    # Every row is asked for by name, even if an earlier run has ruled it out.
    environment = {"CUDA_LAUNCH_BLOCKING": "1", WITHOUT: ""}
    left = processes.run_all(
        [work(row) for row in rows], limit, at_a_time=jobs, seconds=seconds, on_end=ended,
        least=min(LEAST_SECONDS, limit), environment=environment,
    )  # fmt: skip
    for place in left:
        not_run = {"status": "not run", "phases": {}, "why": "the time was spent", "seconds": 0.0}
        found[place] = {**rows[place], **not_run}
        report(found[place])
    return [found[place] for place in range(len(rows))]


def broken_tiles(rows: Sequence[Row]) -> list[str]:
    """The tiles to be left out. A candidate must have proved itself: one that has not run is left out too.

    If no shipped tile works, the cause is elsewhere, and none is left out.
    """
    tiles = [row for row in rows if row["kind"] == "tile"]
    shipped = [row for row in tiles if not row["candidate"]]
    if shipped and all(row["status"] in BROKEN for row in shipped):
        return []
    return [
        row["id"]
        for row in tiles
        if row["status"] in BROKEN or (row["candidate"] and row["status"] == "not run")
    ]


def is_built(row: Row, build_info: Path = BUILD_INFO) -> bool:
    """Whether the library holds the row: a name that it does not know would make every GEMM fail."""
    if not row["candidate"]:
        return True
    try:
        return bool(json.loads(build_info.read_text())["tuning"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def working_producers(rows: Sequence[Row]) -> list[str]:
    """Those that are not broken by themselves: a wrong GEMM after one of them does not count."""

    def works(row: Row) -> bool:
        others = [said for name, said in row["phases"].items() if name != "dependent"]
        own = any(said.startswith("wrong") for said in others)
        return row["status"] not in BROKEN or (row["status"] == "wrong" and not own)

    return [row["name"] for row in rows if row["kind"] == "producer" and works(row)]


def read(path: Path | None) -> dict[str, Any]:
    """An earlier run's file; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text()) if path else {}
        return found if isinstance(found["rows"], list) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def line(row: Row) -> str:
    cells = (row["phases"].get(name, "").split(":")[0] or "." for name in PHASES)
    star = "*" if row["candidate"] else " "
    columns = " ".join(f"{cell:9s}" for cell in cells)
    return f"{row['name']:28s}{star} {row['status']:8s} {columns} {row['seconds']:5.1f} s  {row['why']}".rstrip()


def run(args: argparse.Namespace) -> int:
    from benchmarks.on_gpu import kernel_checks

    begin = time.monotonic()
    ends: list[processes.Ended] = []
    processes.run_all(
        [lambda: kernel_checks.listing(args.device)], min(args.limit, args.seconds), at_a_time=1,
        seconds=args.seconds, on_end=lambda _, end: ends.append(end),
    )  # fmt: skip
    found = messages(ends[0].out)[-1:]
    if not found:
        code, limit = ends[0].code, min(args.limit, args.seconds)
        late = f"no answer within {limit:.0f} s"
        why = late if code is None else processes.last_words(code, ends[0].err)
        print(f"no kernel could be listed: {why}")
        return 1
    machine, rows = found[0]["machine"], found[0]["rows"]
    if missing := found[0].get("without_tiles", ""):
        print(f"no tile is checked: {missing}")
    rows = [row for row in rows if not args.rows or row["name"] in args.rows]
    earlier = read(args.json) if args.resume else {}
    same = earlier.get("machine", {}).get("device") == machine.get("device")
    results = {row["name"]: row for row in earlier.get("rows", []) if same}
    ok = {name for name, row in results.items() if row["status"] == "ok"}
    todo = [row for row in rows if row["name"] not in ok]
    if ok:
        print(f"{len(rows) - len(todo)} rows were ok before, {len(todo)} are left")
    print(f"{'(* a candidate)':29s} {'':8s} " + " ".join(f"{name:9s}" for name in PHASES))

    def report(row: Row) -> None:
        results[row["name"]] = row
        print(line(row), flush=True)
        runner.write_json(args.json, {"machine": machine, "rows": list(results.values())})

    left = args.seconds - (time.monotonic() - begin)
    run_rows(
        todo, lambda row: lambda: kernel_checks.check_row(row["name"], args.device),
        jobs=args.jobs, limit=args.limit, seconds=left, report=report,
    )  # fmt: skip
    chosen = [results[row["name"]] for row in rows]
    statuses = ("ok", "refused", *BROKEN, "not run")
    counts = {s: sum(row["status"] == s for row in chosen) for s in statuses}
    print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    print(f"left out from here on: {SEPARATOR.join(broken_tiles(chosen)) or 'no tile'}")
    return int(bool(missing) or counts["ok"] != len(chosen))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --json that are ok")
    parser.add_argument("--seconds", type=float, default=40.0, help="for all")
    parser.add_argument("--limit", type=float, default=20.0, help="of a row, in seconds")
    parser.add_argument("--jobs", type=int, default=12, help="rows at a time")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="some only")
    parser.add_argument("--without", type=Path, metavar="FILE", help="print the broken tiles")
    parser.add_argument(
        "--producers", type=Path, metavar="FILE", help="print those that work, one a line"
    )
    args = parser.parse_args(arguments)
    if args.without:
        rows = [row for row in read(args.without).get("rows", []) if is_built(row)]
        print(SEPARATOR.join(broken_tiles(rows)))
        return 0
    if args.producers:
        print("\n".join(working_producers(read(args.producers).get("rows", []))))
        return 0
    signal.signal(signal.SIGTERM, processes.stop_with_children)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
