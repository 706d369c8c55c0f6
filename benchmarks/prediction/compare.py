"""Measured times over expected ones: of a run on a GPU (the GEMM benchmark's results), and by class of M."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lib.shapes import M_CLASSES, m_class

from .gpus import GPUS, gpu_of
from .planner import Prediction, predict

CLASS_HEADER = ["M", "cases", "geometric mean", "least", "most"]
RUN_HEADER = ["case", "tile that ran", "expected tile", "bound by", "MHz", "us", "expected us", "ratio"]  # fmt: skip


@dataclass(frozen=True)
class Compared:
    case: str  # without M
    m: int
    us: float
    expected: Prediction

    @property
    def ratio(self) -> float:
        """More than 1: slower than expected."""
        return self.us / self.expected.us


def by_class(rows: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """A line for each class of M that has cases, and one for all."""

    def cell(row: Compared) -> str:
        return f"{row.ratio:.2f} ({row.case} M {row.m})"

    groups = {name: [row for row in rows if m_class(row.m) == name] for _, name in M_CLASSES}
    groups["all"] = list(rows)
    body = []
    for name, group in groups.items():
        if group:
            mean = math.exp(sum(math.log(row.ratio) for row in group) / len(group))
            least, most = (pick(group, key=lambda row: row.ratio) for pick in (min, max))
            body.append([name, str(len(group)), f"{mean:.2f}", cell(least), cell(most)])
    return CLASS_HEADER, body


def _counts(row: Mapping[str, Any]) -> bool:
    """Not refused or wrong; uniform random data, because real data runs at other clocks."""
    return bool(row.get("us")) and row.get("data", "random") == "random"


def _clock(row: Mapping[str, Any]) -> float | None:
    """In GHz, as read during the run."""
    return row["sm_mhz"] / 1000 if row.get("sm_mhz") else None


def compare(results: Mapping[str, Any], gpu: str | None = None) -> list[Compared]:
    """Each row that counts at its own clock, with what the dispatch takes today."""
    of = GPUS[gpu or gpu_of(results["machine"])]
    found = []
    for row in filter(_counts, results["rows"]):
        case = f"{row.get('model', '')} {row.get('layer', '')}".strip()
        expected = predict(of, row["M"], row["N"], row["K"], _clock(row))
        found.append(Compared(case, row["M"], row["us"], expected))
    return found


def run_table(
    results: Mapping[str, Any], gpu: str | None = None
) -> tuple[list[str], list[list[str]]]:
    """A line for each row that counts."""
    body = []
    rows = filter(_counts, results["rows"])
    for row, one in zip(rows, compare(results, gpu), strict=True):
        words = [f"{one.case} M {one.m}", str(row.get("tile") or "-"), one.expected.name]
        words += [one.expected.bound_by, f"{row['sm_mhz']:.0f}" if row.get("sm_mhz") else "?"]
        body.append([*words, f"{one.us:.1f}", f"{one.expected.us:.1f}", f"{one.ratio:.2f}"])
    return RUN_HEADER, body
