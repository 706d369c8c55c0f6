"""The loop of every benchmark: cases within a budget, a results file after each; an earlier run can be continued."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.lib import gpu
from benchmarks.lib.shapes import (
    GEMM_TOKENS,
    LLM_LAYERS,
    M_CLASSES,
    TOY_LAYERS,
    TOY_TOKENS,
    m_class,
)
from benchmarks.lib.timer import Timing

C = TypeVar("C")
Row = dict[str, Any]

FAILURES = ("wrong", "failed")
#: The exit status after a kernel broke the CUDA context while cases were left: a new process may go on (--resume).
CONTEXT_LOST = 75
#: How many of the most telling cases are measured again if an earlier row lacks something.
AGAIN = 24


class WrongResult(Exception):
    """The op's result is not the specification's."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def usable(device: torch.device) -> bool:
    """Frees what the next case, of other sizes, cannot use; False if a kernel has broken the CUDA context."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


# --- options ----------------------------------------------------------------------------------------------------------


def parser_of(doc: str | None, device: str | None = "cuda") -> argparse.ArgumentParser:
    """A parser with `--device` and the options of the loop; `device` None: only `--json`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="results file, written after every case")
    if device:
        parser.add_argument("--device", choices=["cuda", "cpu"], default=device)
        parser.add_argument(
            "--budget-seconds", type=float, default=math.inf, help="no case starts later"
        )
        parser.add_argument("--csv", type=Path, help="the same rows, single values only")
        parser.add_argument("--resume", action="store_true", help="continue the file of --json")
    return parser


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """What benchmarks of layers and GEMMs take."""
    parser.add_argument(
        "--layers", nargs="+", choices=list(LLM_LAYERS), metavar="NAME",
        help="the most important first: " + ", ".join(LLM_LAYERS),
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", help="M, the most important first")
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.3)")


def fill_in_layers(args: argparse.Namespace) -> None:
    """The defaults of `add_layer_options`: on a CPU, toy layers."""
    on_gpu = args.device == "cuda"
    named = [LLM_LAYERS[name] for name in args.layers or LLM_LAYERS]
    args.layers = named if on_gpu else list(TOY_LAYERS)
    args.tokens = args.tokens or (GEMM_TOKENS if on_gpu else TOY_TOKENS)
    args.seconds = args.seconds if args.seconds is not None else (0.3 if on_gpu else 0.02)


def check_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, toys: bool = False
) -> None:
    """Exits with a sentence if options exclude each other, or the GPU that they ask for is absent.

    toys: `--quick` was asked for, and it means toy shapes.
    """
    if args.resume and not args.json:
        parser.error("--resume continues a file: name it with --json")
    if args.device == "cuda" and toys:
        parser.error("--quick is for --device cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible to torch; --device cpu rehearses the benchmark")


def machine_facts(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """The machine and the command, printed first. On a CPU it sets `threads`, if given."""
    facts = gpu.machine(device) | {"command": " ".join(["python", *sys.orig_argv[1:]])}
    if threads is not None and device.type == "cpu":
        torch.set_num_threads(threads)
        facts["threads"] = threads
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    return facts


# --- the loop ---------------------------------------------------------------------------------------------------------


def earlier_rows(path: Path, facts: Mapping[str, Any], rows_name: str = "rows") -> list[Row]:
    """The rows of an interrupted run, failures included.

    Raises:
        SystemExit: the file is no results file, or was measured elsewhere or with other software.
    """
    if not path.exists():
        return []
    try:
        data = json.loads(path.read_text())
        there, rows = data["machine"], data[rows_name]
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is no results file of a benchmark: name another, or remove it")
    if found := gpu.differences(there, facts):
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
    rows_name: str = "rows",
) -> list[Row]:
    """Measures what the budget allows, each case once, and writes the files after every one.

    Args:
        cases: the most telling first.
        measure: a case's row, or rows; raises `WrongResult` if the op is not the specification's.
        key: the columns that identify a case, all plain values; every row of the case has them.
        line: a row as it is printed.
        facts: of `machine_facts`; in the file as "machine".
        summary: further entries of the file, from the good rows.
        complete: whether an earlier row has all that is asked for now; of the others the first AGAIN come first.

    Returns:
        All rows, those of an earlier run first; a case that went wrong has its key and "wrong" or "failed".
    """
    begin = time.monotonic()
    rows = earlier_rows(args.json, facts, rows_name) if args.resume else []
    again, new, failed = [], [], []
    for place, case in enumerate(cases):
        found = [row for row in rows if _is_row_of(row, key(case))]
        if not found:
            new.append(case)
        elif not all(map(is_good, found)):  # last: it may break the context again
            failed.append(case)
        elif place < AGAIN and not all(map(complete, found)):
            again.append(case)
    todo = again + new + failed
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
            write_json(args.json, {"machine": facts, **entries, rows_name: rows})
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


def status(rows: Sequence[Row], good: Callable[[Row], bool] = is_good) -> int:
    """The exit status: 1 if something was wrong or failed, or nothing was measured; says so."""
    if bad := sum(not good(row) for row in rows):
        print(f"{bad} cases were wrong or failed: see above")
    return int(bool(bad) or not rows)


def _is_row_of(row: Row, key: Row) -> bool:
    return all(row.get(name) == value for name, value in key.items())


# --- files ------------------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """At once or not at all: an interrupted run leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Nothing without a path."""
    if path is not None:
        write_text(path, json.dumps(data, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows of any columns; lists and dicts are left out."""
    plain = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in plain for name in row)))
        writer.writeheader()
        writer.writerows(plain)


# --- columns and means ------------------------------------------------------------------------------------------------


def timing_columns(timing: Timing) -> Row:
    spread = {"us_p20": timing.p20, "us_p80": timing.p80}
    return {"us": timing.us, **spread, "rounds": timing.rounds, "calls": timing.calls}


def ratio_columns(us: float, baselines: Mapping[str, Timing | None]) -> Row:
    """For each baseline its microseconds and how many times as long as `us` it takes; None if it did not run."""
    row: Row = {}
    for name, timing in baselines.items():
        row[f"{name}_us"] = timing.us if timing else None
        row[f"vs_{name}"] = timing.us / us if timing else None
    return row


def ratios(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """`1.21x fp16 | - int_mm`"""
    values = [(row.get(f"vs_{name}"), name) for name in names]
    return " | ".join(f"{value:.2f}x {name}" if value else f"- {name}" for value, name in values)


def baselines_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The NAMEs of all `vs_NAME`, in their order; also those that never ran."""
    names = (k.removeprefix("vs_") for row in rows for k in row if k.startswith("vs_"))
    return list(dict.fromkeys(names))


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def by_class(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each class of M, then all of them; classes without rows are left out."""
    groups = {name: [r for r in rows if m_class(r["M"]) == name] for _, name in M_CLASSES}
    return {name: group for name, group in (groups | {"all": list(rows)}).items() if group}


def grouped(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    return groups


def geomeans(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Geometric means by class of M and over all; a row counts where it has a value."""
    return group_means(by_class(rows), {column: column for column in columns})


def group_means(
    groups: Mapping[str, Sequence[Row]], columns: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """For each group its "cases", and by name the geometric mean of a column over the rows that have a value."""
    means: dict[str, dict[str, float]] = {}
    for group, rows in groups.items():
        if rows:
            means[group] = {"cases": len(rows)}
        for name, column in columns.items():
            if values := [row[column] for row in rows if row.get(column)]:
                means[group][name] = geomean(values)
    return means
