"""What the benchmarks share beside their cases: refused cases, results files, ratios, means by classes of M."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timer import Timing
from shapes import M_CLASSES, m_class

Row = dict[str, Any]


class WrongResult(Exception):
    """The op's result is not the specification's."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def usable(device: torch.device) -> bool:
    """Frees what the next case, of other sizes, cannot use; False when a kernel has broken the CUDA context."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """At once or not at all: an interrupted run leaves what it had written before."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Rows of any columns; what is no single value stays out."""
    plain = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in plain for name in row)))
        writer.writeheader()
        writer.writerows(plain)


def timing_columns(timing: Timing) -> Row:
    return {
        "us": timing.us,
        "us_p20": timing.p20,
        "us_p80": timing.p80,
        "rounds": timing.rounds,
        "calls": timing.calls,
    }


def ratio_columns(us: float, baselines: Mapping[str, Timing | None]) -> Row:
    """For each baseline its microseconds and how many times as long as `us` it takes; None where it did not run."""
    row: Row = {}
    for name, timing in baselines.items():
        row[f"{name}_us"] = timing.us if timing else None
        row[f"vs_{name}"] = timing.us / us if timing else None
    return row


def ratios(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """`1.21x fp16 | - int_mm`"""
    return " | ".join(
        f"{row[f'vs_{name}']:.2f}x {name}" if row.get(f"vs_{name}") else f"- {name}"
        for name in names
    )


def geomean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def geomeans(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Geometric means by class of M and over all; a row counts where it has a value."""
    groups = {name: [r for r in rows if m_class(r["M"]) == name] for _, name in M_CLASSES}
    groups["all"] = list(rows)
    return group_means(groups, {column: column for column in columns})


def group_means(
    groups: Mapping[str, Sequence[Row]], columns: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Of each group that has rows: its "cases", and by name the geometric mean of a column where rows have a value."""
    means: dict[str, dict[str, float]] = {}
    for group, rows in groups.items():
        if rows:
            means[group] = {"cases": len(rows)}
        for name, column in columns.items():
            values = [row[column] for row in rows if row.get(column)]
            if values:
                means[group][name] = geomean(values)
    return means


def baselines_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The NAMEs of all `vs_NAME`, in their order; also those that never ran."""
    return list(
        dict.fromkeys(k.removeprefix("vs_") for row in rows for k in row if k.startswith("vs_"))
    )
