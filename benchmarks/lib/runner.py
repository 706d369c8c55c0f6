"""The loop of every benchmark: cases within a budget, a results file after each; an earlier run is continued."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gpu_state
import torch
from report import Row, WrongResult, first_line, usable, write_csv, write_json

C = TypeVar("C")

FAILURES = ("wrong", "failed")
#: The exit status where a kernel has broken the CUDA context and cases are left: a new process may go on (--resume).
CONTEXT_LOST = 75
#: So many of the most telling cases are measured again where an earlier row lacks something.
AGAIN = 24


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark takes; `--seconds` and its default are the benchmark's own."""
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="no case starts later"
    )
    parser.add_argument("--json", type=Path, help="written after every case")
    parser.add_argument("--csv", type=Path, help="the same rows, without what is no single value")
    parser.add_argument("--resume", action="store_true", help="keep what is in --json already")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a sentence where the options do not go together, or the GPU that they name is not there."""
    if args.resume and not args.json:
        parser.error("--resume continues a file: name it with --json")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible to torch; --device cpu rehearses the benchmark")


def machine_facts(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """The machine and the command, printed: the first line of a benchmark. On a CPU `threads`, if given, are set."""
    facts = gpu_state.machine(device) | {"command": " ".join(["python", *sys.argv])}
    if threads is not None and device.type == "cpu":
        torch.set_num_threads(threads)
        facts["threads"] = threads
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    return facts


def earlier_rows(path: Path, facts: Mapping[str, Any]) -> list[Row]:
    """The rows of an interrupted run, those of failures too.

    Raises:
        SystemExit: the file is no results file, or was measured elsewhere or with other software.
    """
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
        there, rows = data["machine"], data["rows"]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is no results file of a benchmark: name another, or remove it")
    if found := gpu_state.differences(there, facts):
        sys.exit(f"{path} was measured elsewhere: {'; '.join(found)}: start a new file")
    return list(rows)


def run_cases(
    cases: Sequence[C],
    measure: Callable[[C], Row | list[Row]],
    *,
    key: Callable[[C], Row],
    line: Callable[[Row], str],
    args: argparse.Namespace,
    facts: Mapping[str, Any],
    summary: Callable[[list[Row]], Mapping[str, Any]] = lambda rows: {},
    complete: Callable[[Row], bool] = lambda row: True,
) -> list[Row]:
    """Measures what the budget allows, each case once, and writes the files after every one.

    Args:
        cases: the most telling first.
        measure: a case's row, or rows; raises `WrongResult` where the op is not the specification's.
        key: the columns that say which case a row is, all plain values; every row of the case has them.
        line: a row as it is printed.
        args: with the options of `add_options`, and `device`.
        facts: of `machine_facts`; in the file as "machine".
        summary: further entries of the file, from the rows that were measured.
        complete: whether an earlier row has all that is asked for now; of the others the first AGAIN come first.

    Returns:
        All rows, those of an earlier run first; a case that went wrong has its key and "wrong" or "failed".
    """
    begin = time.monotonic()
    earlier = earlier_rows(args.json, facts) if args.resume else []
    again, new, failed = [], [], []
    for place, case in enumerate(cases):
        found = [row for row in earlier if _is_row_of(row, key(case))]
        if not found:
            new.append(case)
        elif not all(map(is_good, found)):  # last: it may break the context again
            failed.append(case)
        elif place < AGAIN and not all(map(complete, found)):
            again.append(case)
    todo = again + new + failed
    rows = earlier
    if rows:
        print(f"{len(cases) - len(todo)} cases were measured before, {len(todo)} are left")
    for place, case in enumerate(todo):
        if time.monotonic() - begin > args.budget_seconds:
            left = len(todo) - place
            print(f"{left} of {len(cases)} cases were not started: the time is spent")
            break
        try:
            result = measure(case)
            measured = result if isinstance(result, list) else [result]
            print("\n".join(map(line, measured)), flush=True)
        except Exception as error:  # one broken kernel must not hide the others
            what = "wrong" if isinstance(error, WrongResult) else "failed"
            measured = [{**key(case), what: first_line(error)}]
            print(f"{case!s} | {what}: {first_line(error)}", flush=True)
        rows = [row for row in rows if not _is_row_of(row, key(case))] + measured
        if args.json:
            entries = summary([row for row in rows if is_good(row)])
            write_json(args.json, {"machine": facts, **entries, "rows": rows})
        if args.csv:
            write_csv(args.csv, rows)
        if not usable(torch.device(args.device)):
            print("the GPU does not answer any more: no further case is started")
            if args.json and place + 1 < len(todo) - len(failed):
                sys.exit(CONTEXT_LOST)
            break
    return rows


def is_good(row: Mapping[str, Any]) -> bool:
    return not any(name in row for name in FAILURES)


def status(rows: Sequence[Row]) -> int:
    """The exit status: 1 where something was wrong or failed, or nothing was measured; says so."""
    if bad := sum(not is_good(row) for row in rows):
        print(f"{bad} cases were wrong or failed: see above")
    return int(bool(bad) or not rows)


def _is_row_of(row: Row, key: Row) -> bool:
    return all(row.get(name) == value for name, value in key.items())
