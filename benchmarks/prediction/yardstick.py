"""Other people's measured times (yardstick.csv) beside the expected ones.

An expectation that is slower than what someone measured is refuted; one that is faster is not.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .compare import Compared
from .gpus import GPUS
from .planner import predict

FILE = Path(__file__).with_name("yardstick.csv")
HEADER = ["GPU", "what", "N x K", "tile", "bound by", "M"]
HEADER += ["their us", "TOPS", "expected us", "ratio", "their bf16 us"]
BF16 = "bf16 of the same table"


@dataclass(frozen=True)
class Measured:
    gpu: str
    what: str
    n: int
    k: int
    m: int
    us: float
    bf16_us: float | None  # of the same table


@cache
def measured() -> tuple[Measured, ...]:
    """The 8-bit rows, each with the bfloat16 row of its table; that table's bfloat16 rows come after its 8-bit rows."""
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    eight_bit, bf16 = [], {}
    for row in csv.DictReader(lines):
        if row["what"] != BF16:
            what = row["what"]
            eight_bit.append(row)
        else:
            bf16[row["gpu"], what, row["n"], row["k"], row["m"]] = float(row["us"])
    return tuple(
        Measured(
            row["gpu"], row["what"], int(row["n"]), int(row["k"]), int(row["m"]), float(row["us"]),
            bf16.get((row["gpu"], row["what"], row["n"], row["k"], row["m"])),
        )
        for row in eight_bit
    )  # fmt: skip


def rows() -> list[tuple[Measured, Compared]]:
    """With what is expected of ours at the boost clock."""
    return [(one, _compared(one)) for one in measured()]


def _compared(one: Measured) -> Compared:
    expected = predict(GPUS[one.gpu], one.m, one.n, one.k)
    return Compared(f"{one.gpu} {one.n} x {one.k}", one.m, one.us, expected)


def table(pairs: Sequence[tuple[Measured, Compared]]) -> tuple[list[str], list[list[str]]]:
    body = []
    for one, ours in pairs:
        tops = 2e-6 * one.m * one.n * one.k / one.us
        words = [one.gpu, one.what, f"{one.n} x {one.k}", ours.expected.name]
        words += [ours.expected.bound_by, str(one.m), f"{one.us:g}", f"{tops:.0f}"]
        bf16 = f"{one.bf16_us:g}" if one.bf16_us else ""
        body.append([*words, f"{ours.expected.us:.1f}", f"{ours.ratio:.2f}", bf16])
    return HEADER, body
