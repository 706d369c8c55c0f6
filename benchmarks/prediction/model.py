"""A finer prediction of `gemm_s8` than the dispatch's own arithmetic: nothing here was measured on a GPU.

    python -m benchmarks.prediction.model --gpu H100 [--layers WORD ...] [--tokens 1 64 2048] [--tiles] [--json FILE]
    python -m benchmarks.prediction.model --compare benchmarks/results/<gpu>_<date>/gemm.json --gpu H100
    python -m benchmarks.prediction.model --counters          # reads the built library anew (kernel_costs.json)

For a tile, a shape and a GPU: what one turn of the main loop takes of each resource (tensor cores, issue slots, shared
memory, L2; counts of the compiled code), what a tile adds (first loads, last stores), waves, and what a launch costs.
Every figure of a GPU that is no data sheet's is an assumption with a range; a prediction carries the range.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.shapes import LLM_LAYERS
from benchmarks.on_gpu import probe
from benchmarks.prediction.model_costs import (
    CUBLAS,
    CUBLAS_TILES,
    MACHINES,
    Machine,
    Time,
    costs_of,
    dram_bytes,
    time_of,
    up,
)  # fmt: skip
from benchmarks.prediction.predict import GPUS, HEADER, LAYERS, Planner, floor

COSTS = Path(__file__).resolve().parent / "kernel_costs.json"
TOKENS = (1, 16, 64, 256, 2048, 8192)
TABLES = {90: "sm90", 89: "sm89", 80: "sm80"}
#: The dispatch loses when the model has a tile that is so much faster.
LOSES = 1.03
CASES = ("best", "likely", "worst")


@dataclass(frozen=True)
class Predicted:
    tile: str
    splits: int
    low: float
    us: float
    high: float
    likely: Time
    counted: bool

    @property
    def name(self) -> str:
        return self.tile + (f" /{self.splits}" if self.splits > 1 else "")


class Model:
    """All of it for one GPU."""

    def __init__(
        self,
        name: str,
        planner: Planner | None = None,
        costs: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> None:
        """measured: of probe.py, in place of what is assumed."""
        self.gpu = GPUS[name]
        self.machine: Machine = probe.assume(self.gpu, MACHINES[name], measured or {})
        self.planner = planner or Planner()
        self.table = TABLES[self.gpu.capability]
        self.tiles: list[dict[str, Any]] = self.planner.tables[self.table]["tiles"]
        self.by_name = {tile["name"]: tile for tile in self.tiles}
        known = json.loads(COSTS.read_text()) if costs is None else costs
        self.costs = {t["name"]: costs_of(known, self.table, self.tiles, t) for t in self.tiles}

    def predict(
        self, m: int, n: int, k: int, tile: str, splits: int = 1, ghz: float | None = None
    ) -> Predicted:
        found = [
            time_of(
                self.gpu, self.machine, self.by_name[tile], self.costs[tile], (m, n, k), splits,
                case, ghz,
            )
            for case in range(len(CASES))
        ]  # fmt: skip
        low, us, high = (time.us for time in found)
        return Predicted(tile, splits, low, us, high, found[1], self.costs[tile].counted)

    def chosen(self, m: int, n: int, k: int, ghz: float | None = None) -> Predicted:
        """Of the tile that the dispatch takes."""
        choice = self.planner.choose(self.gpu, m, n, k)
        tile = self.planner.tables[choice["table"]]["tiles"][choice["tile"]]["name"]
        return self.predict(m, n, k, tile, choice["splits"], ghz)

    def all(self, m: int, n: int, k: int) -> list[Predicted]:
        """Of every tile and number of splits that may serve, the fastest first."""
        found = [
            self.predict(m, n, k, tile["name"], splits)
            for tile in self.tiles
            if (tile["kernel"] != "stream" or m <= tile["m"])
            and tile["shared_bytes"] <= self.gpu.shared_bytes
            for splits in range(1, min(tile["most_splits"], up(k, tile["k"])) + 1)
        ]
        return sorted(found, key=lambda one: one.us)

    def fp16_us(self, m: int, n: int, k: int) -> float:
        """cuBLAS in float16: half the rate at CUBLAS of the peak in whole tiles, or twice the bytes."""
        bound = floor(self.gpu, m, n, k)[1]
        ghz = self.gpu.ghz if bound == "memory" else self.machine.loaded_ghz[1]
        rate = self.machine.macs / 2 * CUBLAS
        compute = min(
            up(up(m, a) * up(n, b) * splits, self.gpu.sms) * a * b * k / splits / rate
            for a, b in CUBLAS_TILES
            for splits in (1, 2, 4, 8)
        )
        memory = dram_bytes(m, n, k, 2) / (self.gpu.gb_per_s * self.machine.memory_share[1]) * ghz
        clocks = max(compute, memory) + self.machine.latency[1]
        return self.machine.launch_us[1] + clocks * 1e-3 / ghz

    def row(self, m: int, n: int, k: int, tiles: bool = False) -> dict[str, Any]:
        """Everything that is said of a shape, plain enough for JSON."""
        chosen, every = self.chosen(m, n, k), self.all(m, n, k)
        best, lowest = every[0], floor(self.gpu, m, n, k)
        row = {
            "M": m, "N": n, "K": k, "tile": chosen.name, "us": chosen.us, "low_us": chosen.low,
            "high_us": chosen.high, "binds": chosen.likely.binds, "tops": chosen.likely.tops,
            "vs_fp16": self.fp16_us(m, n, k) / chosen.us, "floor_us": lowest[0],
            "of_floor": lowest[0] / chosen.us, "best_tile": best.name, "best_us": best.us,
            "loses": chosen.us / best.us, "counted": chosen.counted and best.counted,
            "parts_us": {
                name: getattr(chosen.likely, name)
                for name in ("launch", "first_loads", "main_loop", "stores", "sharing", "memory")
            },
        }  # fmt: skip
        if tiles:
            row["tiles"] = {
                one.name: [one.low, one.us, one.high, one.likely.binds] for one in every
            }
        return row


def text_row(layer: object, row: Mapping[str, Any]) -> list[str]:
    """A line of the table that is printed and documented, under predict.HEADER."""
    prefers = f"{row['best_tile']} ({row['loses']:.2f}x)" if row["loses"] > LOSES else ""
    return [
        str(layer),
        f"{row['N']} x {row['K']}",
        row["tile"] + ("" if row["counted"] else " *"),
        prefers,
        row["binds"],
        str(row["M"]),
        f"{row['floor_us']:.1f}",
        f"{row['us']:.1f} ({row['low_us']:.1f} .. {row['high_us']:.1f})",
        f"{100 * row['of_floor']:.0f} %",
        f"{row['tops']:.0f}",
        f"{row['vs_fp16']:.2f}x",
    ]


def prediction_table(
    gpu: str, tokens: Sequence[int] = TOKENS, planner: Planner | None = None
) -> tuple[list[str], list[list[str]]]:
    """For the documentation: a few layers, and what the dispatch takes for them."""
    model = Model(gpu, planner)
    layers = [LLM_LAYERS[name] for name in LAYERS]
    rows = [text_row(layer, model.row(m, layer.n, layer.k)) for layer in layers for m in tokens]
    return list(HEADER), rows


def print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), help="H100, or the one that was measured")
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), help="words of their names")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--tiles", action="store_true", help="every tile, the fastest first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare", type=Path, metavar="gemm.json")
    parser.add_argument("--counters", action="store_true")
    parser.add_argument(
        "--assume", type=Path, metavar="probe.json", help="what probe.py has measured, as it is"
    )
    args = parser.parse_args()
    measured: Mapping[str, Any] = {}
    if args.assume:
        try:
            measured = probe.read_assumptions(args.assume)
        except ValueError as error:
            parser.error(str(error))
    if args.counters:
        from benchmarks.prediction import model_counters

        model_counters.write(Planner().tables, COSTS)
        return 0
    if args.compare:
        from benchmarks.prediction import model_compare

        model_compare.show(args.compare, args.gpu, measured)
        return 0
    args.gpu = args.gpu or "H100"
    model = Model(args.gpu, measured=measured)
    names = [name for name in LLM_LAYERS if any(word in name for word in args.layers)]
    rows = [
        {"layer": name} | model.row(m, LLM_LAYERS[name].n, LLM_LAYERS[name].k, args.tiles)
        for name in names
        for m in args.tokens
    ]
    print(f"{model.gpu.name}: arithmetic, not measured; *: scaled counts of a tile like it")
    print_table([list(HEADER), *(text_row(row["layer"], row) for row in rows)])
    for row in rows if args.tiles else []:
        print(f"\n{row['layer']} M {row['M']}")
        for name, (low, us, high, binds) in row["tiles"].items():
            print(f"  {name:26s} {us:9.1f}  ({low:.1f} .. {high:.1f})  {binds}")
    if args.json:
        args.json.write_text(json.dumps({"gpu": args.gpu, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
