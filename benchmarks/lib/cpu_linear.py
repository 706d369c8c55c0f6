"""One layer on a CPU, by this package and by others, in turns: for `python -m benchmarks.linear --device cpu`.

Each variant of cpu_peers.py has a process (cpu_worker.py). What cannot run is named with the reason, and the rest runs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.lib import cpu_isa, cpu_peers, cpu_worker, runner, timer
from benchmarks.lib.cpu_peers import PEERS, VARIANTS, Setup
from benchmarks.lib.cpu_worker import PeerFailed, Worker
from benchmarks.lib.runner import Row, WrongResult

Case = tuple[str, int, int, int]
KEYS = ("layer", "N", "K", "M")
#: Weights of a small layer.
SMALL = 2**21


def key_of(case: Case) -> Row:
    return dict(zip(KEYS, case, strict=True))


def class_of(row: Row) -> str:
    """A small layer fits a processor's L2 cache in int8, a large one streams from memory."""
    size = "small" if row["N"] * row["K"] <= SMALL else "large"
    return f"{size}, M {'= 1' if row['M'] == 1 else '>= 16' if row['M'] >= 16 else '2-15'}"


def means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Geometric means of every ratio, by size of the layer and class of M."""
    columns = {name: f"vs_{name}" for name in runner.baselines_of(rows)}
    return runner.group_means(
        runner.grouped(rows, class_of) | ({"all": list(rows)} if rows else {}), columns
    )


def start_workers(
    args: argparse.Namespace, stack: ExitStack, facts: dict[str, Any]
) -> list[Worker]:
    """A process for each variant that can run here; `facts` gets their versions, and why others cannot run."""
    pythons = dict(item.split("=", 1) for item in args.python)
    clock = cpu_isa.build_chain()
    if clock is not None:
        stack.callback(shutil.rmtree, clock.parent)
    setup = Setup(args.threads, args.isa, args.scheme, args.smooth)
    started, missing = [], {}
    for name in args.variants:
        if args.isa not in VARIANTS[name].isas:
            missing[name] = f"no switch keeps it to {args.isa}"
            continue
        ours = name == "int8"
        environment = cpu_isa.environment(args.isa, ours and cpu_peers.native_kernels())
        python = pythons.get(name, sys.executable)
        try:
            worker = Worker(name, python, setup, environment, clock if ours else None)
        except OSError as error:
            missing[name] = f"{python}: {error.strerror}"
            continue
        started.append(stack.enter_context(worker))
    found, versions, levels = [], {}, {}
    for worker in started:  # all load their libraries at once
        try:
            answer = worker.receive()
        except PeerFailed as error:
            answer = {"missing": str(error)}
        if "missing" in answer:
            missing[worker.name] = answer["missing"]
            continue
        found.append(worker)
        versions[worker.name] = ", ".join(f"{k} {v}" for k, v in answer["versions"].items())
        if answer["level"]:
            levels[worker.name] = answer["level"]
    facts |= {"int8_mode": levels.get("int8"), "levels": levels, "peers": versions, "missing": missing}  # fmt: skip
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    if "int8" in missing:
        sys.exit("nothing to compare: W8A8Linear cannot run here")
    return found


def loaded(workers: Sequence[Worker], row: Row) -> list[Worker]:
    """Those whose layers of this shape are right; `row` says why others are missing, and how far all are off."""
    size = {"n": row["N"], "k": row["K"], "m": row["M"], "copies": row["copies"]}
    for worker in workers:
        worker.send(**size)
    right = []
    for worker in workers:
        try:
            answer = worker.receive()
        except PeerFailed as error:
            answer = {"failed": str(error)}
        if "error" in answer:
            row[f"{worker.name}_error"] = answer["error"]
            right.append(worker)
            continue
        reason = answer.get("wrong") or answer["failed"]
        if worker.name == "int8":
            raise WrongResult(reason) if "wrong" in answer else RuntimeError(reason)
        row[f"{worker.name}_missing"] = reason
        print(f"without {worker.name}: {reason}", flush=True)
    return right


def measure(case: Case, workers: Sequence[Worker], level: str, seconds: float) -> Row:
    """Every variant gets float32 but bfloat16's, which get bfloat16."""
    row: Row = key_of(case)
    row["copies"] = cpu_worker.copies_of(row["N"], row["K"], cpu_isa.l2_bytes())
    turns = cpu_worker.interleaved(loaded(workers, row), seconds)
    us = {name: [turn["us"] for turn in found] for name, found in turns.items()}
    row["rounds"] = len(us["int8"])
    row |= {f"{name}_us": statistics.median(values) for name, values in us.items()}
    row |= {f"{name}_us_p20": timer.summary(values, 1).p20 for name, values in us.items()}
    multiplied = row["M"] * row["N"] * row["K"]
    row["gops"] = 2 * multiplied / row["int8_us"] / 1e3
    if "ghz" in turns["int8"][0]:
        row["ghz"] = statistics.median(turn["ghz"] for turn in turns["int8"])
        row["macs_per_clock"] = multiplied / row["int8_us"] / 1e3 / row["ghz"]
        if peak := cpu_isa.PEAK_PER_CLOCK.get(level):
            row["peak_share"] = row["macs_per_clock"] / peak
    others = {name: values for name, values in us.items() if name != "int8"}
    row |= {f"vs_{name}": timer.median_ratio(values, us["int8"]) for name, values in others.items()}
    if peers := [name for name in others if name in PEERS]:
        best = min(peers, key=lambda name: row[f"{name}_us"])
        row |= {"best_peer": best, "best_peer_us": row[f"{best}_us"], "vs_best_peer": row[f"vs_{best}"]}  # fmt: skip
    return row


def line(row: Row) -> str:
    speed = f"{row['gops']:7.1f} GOPS"
    if "ghz" in row:
        speed += f" at {row['ghz']:.2f} GHz"
    if "peak_share" in row:
        speed += f", {100 * row['peak_share']:.0f} % of the peak"
    names = [name for name in runner.baselines_of([row]) if name != "best_peer"]
    return (
        f"{row['layer']:18s} N {row['N']:5d} K {row['K']:5d} M {row['M']:5d} | {row['int8_us']:9.1f} us | {speed} | "
        f"{runner.ratios(row, names)}"
    )
