"""Whether every kernel works, each in a process of its own, so that one broken kernel costs nothing but itself.

    python benchmarks/first_light.py [--device cuda] [--json first_light.json] [--resume] [--seconds 40] [--jobs 12]
    python benchmarks/first_light.py --without first_light.json      # for SQK_WITHOUT_TILES; no GPU needed
    python benchmarks/first_light.py --producers first_light.json    # those that work

A row is a tile of the GPU's GEMM table or a producer of int8 activations; first_light_row.py makes its checks, under
CUDA_LAUNCH_BLOCKING=1 and a limit of its own. Each row ends as one of
    ok        every check passed
    refused   only the CUDA graph was refused; whatever ran was right
    wrong     a result is not the specification's
    crashed   the process ended early, as after a CUDA error
    hung      it was killed, with all that it had started, at its limit
    not run   the time was spent
The exit status is 1 unless every row is ok. This file imports torch only to copy
itself (--fork), and never starts CUDA: no kernel can break it.
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

import children

ROW_PROGRAM = Path(__file__).resolve().parent / "first_light_row.py"
BUILD_INFO = ROW_PROGRAM.parent.parent / "smoothquant_kernels" / "_build_info.json"
PHASES = ("graph", "shapes", "dependent", "repeats")
#: What a row's process writes in front of a line for this one.
MARK = "@first-light "
#: A row with one of these is left out by the stages that follow.
BROKEN = ("wrong", "crashed", "hung")
WITHOUT = "SQK_WITHOUT_TILES"
SEPARATOR = ","
#: No row starts with less than this left of the time.
LEAST_SECONDS = 3.0

#: {"name", "id": as SQK_WITHOUT_TILES has it, "kind": "tile" or "producer", "candidate"}, and when it has run
#: "status", "phases", "why" and "seconds".
Row = dict[str, Any]

# --- one row ----------------------------------------------------------------------------------------------------------


def outcome(end: children.Ended) -> Row:
    """Status, phases and reason, by what a row's process has said and how it ended."""
    phases: dict[str, str] = {}
    begun, done = "", False
    for line in end.out.splitlines():
        if not line.startswith(MARK):
            continue
        try:
            message = json.loads(line.removeprefix(MARK))
        except ValueError:  # cut off in the middle
            continue
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
    why = where if end.code is None else f"{where}: {children.last_words(end.code, end.err)}"
    return result | {"status": status, "why": why}


# --- all rows ---------------------------------------------------------------------------------------------------------


def run_rows(
    rows: Sequence[Row],
    start: Callable[[Row], children.Start],
    *,
    jobs: int,
    limit: float,
    seconds: float,
    report: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """All rows, in their order; `jobs` at a time, each at most `limit` seconds, together at most `seconds`."""
    begin = time.monotonic()
    found: dict[int, Row] = {}

    def ended(place: int, end: children.Ended) -> None:
        row = {**rows[place], **outcome(end), "seconds": round(end.seconds, 1)}
        if row["status"] == "hung" and end.seconds < limit and time.monotonic() > begin + seconds:
            row |= {"status": "not run", "why": f"the time was spent {row['why']}"}
        found[place] = row
        report(row)

    starts = [start(row) for row in rows]
    left = children.run_all(
        starts, limit, at_a_time=jobs, seconds=seconds, on_end=ended, least=min(LEAST_SECONDS, limit)
    )  # fmt: skip
    for place in left:
        not_run = {"status": "not run", "phases": {}, "why": "the time was spent", "seconds": 0.0}
        found[place] = {**rows[place], **not_run}
        report(found[place])
    return [found[place] for place in range(len(rows))]


def listed(start: children.Start, limit: float) -> tuple[dict[str, Any], str]:
    """What a process says there is: {"machine", "rows"}; or why it said nothing."""
    ends: list[children.Ended] = []
    children.run_all(
        [start], limit, at_a_time=1, seconds=limit + 1, on_end=lambda _, end: ends.append(end)
    )
    for line in ends[0].out.splitlines():
        if line.startswith(MARK):
            return dict(json.loads(line.removeprefix(MARK))), ""
    if ends[0].code is None:
        return {}, f"no answer within {limit:.0f} s"
    return {}, children.last_words(ends[0].code, ends[0].err)


def ways(device: str, fork: bool) -> list[Callable[[list[str]], children.Start]]:
    """How a row's process may be started, the quickest first: all of them would import the same for seconds."""
    # Every row is asked for by name, also one that an earlier run has ruled out.
    environment = {"CUDA_LAUNCH_BLOCKING": "1", WITHOUT: ""}

    def spawn(options: list[str]) -> children.Start:
        command = [sys.executable, str(ROW_PROGRAM), "--device", device, *options]
        return children.spawned(command, environment)

    def copy(options: list[str]) -> children.Start:
        import first_light_row

        return children.forked(
            lambda: first_light_row.main(["--device", device, *options]), environment
        )

    return [copy, spawn] if fork else [spawn]


# --- what follows from it ---------------------------------------------------------------------------------------------


def broken_tiles(rows: Sequence[Row]) -> list[str]:
    """The tiles to be left out. A candidate must have proved itself: one that has not run is left out too.

    Where no shipped tile works, the cause is not theirs, and none is left out.
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
        return row["status"] not in BROKEN or (
            row["status"] == "wrong" and not any(said.startswith("wrong") for said in others)
        )

    return [row["name"] for row in rows if row["kind"] == "producer" and works(row)]


def read(path: Path) -> dict[str, Any]:
    """An earlier run's file; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found["rows"], list) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def line(row: Row) -> str:
    cells = (row["phases"].get(name, "").split(":")[0] or "." for name in PHASES)
    star = "*" if row["candidate"] else " "
    columns = " ".join(f"{cell:9s}" for cell in cells)
    return f"{row['name']:28s}{star} {row['status']:8s} {columns} {row['seconds']:5.1f} s  {row['why']}".rstrip()


def heading() -> str:
    return f"{'(* a candidate)':29s} {'':8s} " + " ".join(f"{name:9s}" for name in PHASES)


def run(args: argparse.Namespace) -> int:
    begin = time.monotonic()
    found: dict[str, Any] = {}
    for way in ways(args.device, args.fork):
        found, reason = listed(way(["--list"]), min(args.limit, args.seconds))
        if found:
            break
        print(f"no kernel could be listed: {reason}")
    if not found:
        return 1
    rows = [row for row in found["rows"] if not args.rows or row["name"] in args.rows]
    earlier = read(args.json) if args.resume and args.json else {}
    same = earlier.get("machine", {}).get("device") == found["machine"].get("device")
    kept = {row["name"]: row for row in earlier.get("rows", []) if same and row["status"] == "ok"}
    results = {row["name"]: row for row in earlier.get("rows", []) if same}
    todo = [row for row in rows if row["name"] not in kept]
    if kept:
        print(f"{len(rows) - len(todo)} rows were ok before, {len(todo)} are left")
    print(heading())

    def report(row: Row) -> None:
        results[row["name"]] = row
        print(line(row), flush=True)
        if args.json:
            data = {"machine": found["machine"], "rows": list(results.values())}
            temporary = args.json.with_suffix(".tmp")
            temporary.write_text(json.dumps(data, indent=1) + "\n")
            temporary.replace(args.json)

    def start(row: Row) -> children.Start:
        return way(["--row", row["name"]])

    left = args.seconds - (time.monotonic() - begin)
    run_rows(todo, start, jobs=args.jobs, limit=args.limit, seconds=left, report=report)
    chosen = [results[row["name"]] for row in rows]
    counts = {s: sum(row["status"] == s for row in chosen) for s in ("ok", "refused", *BROKEN, "not run")}  # fmt: skip
    print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    print(f"left out from here on: {SEPARATOR.join(broken_tiles(chosen)) or 'no tile'}")
    return int(counts["ok"] != len(chosen))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="written after every row")
    parser.add_argument("--resume", action="store_true", help="rows that are ok in --json are kept")
    parser.add_argument("--seconds", type=float, default=40.0, help="for all")
    parser.add_argument("--limit", type=float, default=20.0, help="of a row, in seconds")
    parser.add_argument("--jobs", type=int, default=12, help="rows at a time")
    parser.add_argument("--fork", action="store_true", help="copies of one process: quicker")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="some only")
    parser.add_argument("--without", type=Path, metavar="FILE", help="print the broken tiles")
    parser.add_argument(
        "--producers", type=Path, metavar="FILE", help="print those that work, one a line"
    )
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    if args.without:
        rows = [row for row in read(args.without).get("rows", []) if is_built(row)]
        print(SEPARATOR.join(broken_tiles(rows)))
        return 0
    if args.producers:
        print("\n".join(working_producers(read(args.producers).get("rows", []))))
        return 0

    signal.signal(signal.SIGTERM, children.stop_with_children)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
