"""What the tuner leaves beside rules: a cache for SQK_TUNE_CACHE, and the candidates that are worth shipping.

A candidate is a tile that only a tuning build holds (SMOOTHQUANT_KERNELS_TUNING=1). A result is {"model", "layer", "M",
"N", "K", "dispatched": {"tile", "splits", "us"}, "times": [{"tile", "splits", "us", "rough", "p20", "p80"}, ...],
"not_timed": [{"tile", "splits", "what", "why"}, ...], "sm_mhz", ...}. A rough time was taken alone, has no percentiles,
and says only that others are better.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.cases import Choice, Table
from benchmarks.lib.runner import by_class, geomean, write_json
from smoothquant_kernels.backends.tuned_tiles import FORMAT

Result = dict[str, Any]
#: How much faster a candidate must be in a problem to count there, besides not overlapping with the tile that it beats:
#: half of that is what two measurements of the same kernel differ by.
CLEAR_GAIN = 1.02
#: What it must gain over a class of M, as a geometric mean, to be worth its time in every build.
LEAST_GAIN = 1.01
#: How many shipped tiles and candidates are timed side by side in a problem. A tile that a first, rough timing finds
#: TOO_SLOW times slower than the best is not: graphs hold their outputs, and memory is limited.
FINALISTS, CANDIDATE_FINALISTS, TOO_SLOW = 6, 3, 1.4


def timed(result: Result) -> list[dict[str, Any]]:
    """The times of a problem; empty if it failed."""
    return list(result.get("times", ()))


def candidate_tiles(table: Table) -> set[int]:
    return {int(tile["tile"]) for tile in table["tiles"] if tile.get("candidate")}


def shipped_only(table: Table, results: Sequence[Result]) -> list[Result]:
    """The results as a build without candidates would have them."""
    out = candidate_tiles(table)
    found = []
    for result in results:
        times = [time for time in timed(result) if time["tile"] not in out]
        if any(not time["rough"] for time in times):
            found.append(result | {"times": times})
    return found


def finalists(table: Table, rough: dict[Choice, float]) -> list[Choice]:
    """Which tiles to time side by side, by rough microseconds; always the fastest shipped tile, for comparison."""
    order = sorted(rough, key=lambda choice: rough[choice])
    near = [choice for choice in order if rough[choice] <= TOO_SLOW * rough[order[0]]]
    out = candidate_tiles(table)
    shipped = [choice for choice in order if choice[0] not in out]
    kept = [choice for choice in shipped if choice in near][:FINALISTS] or shipped[:1]
    return kept + [choice for choice in near if choice[0] in out][:CANDIDATE_FINALISTS]


def wrong_tiles(results: Sequence[Result]) -> set[int]:
    """Tiles whose result was wrong in any problem: no conclusion uses them."""
    return {t["tile"] for r in results for t in r.get("not_timed", ()) if t["what"] == "wrong"}


# --- the cache --------------------------------------------------------------------------------------------------------


def cache(data: dict[str, Any], with_candidates: bool = False) -> dict[str, Any]:
    """What SQK_TUNE_CACHE reads (`tuned_tiles.py` of the package): of one GPU, the best choice for each problem.

    If the dispatch is as good within the noise, its own choice is kept.
    """
    table, machine = data["table"], data["machine"]
    out = set() if with_candidates else candidate_tiles(table)
    out |= wrong_tiles(data["results"])
    choices = []
    for result in sorted(data["results"], key=lambda r: (r["N"], r["K"], r["M"])):
        times = [t for t in timed(result) if not t["rough"] and t["tile"] not in out]
        if not times:
            continue
        best = min(times, key=lambda t: t["us"])
        now = result["dispatched"]
        if now["tile"] >= 0 and now["tile"] not in out and now["us"] <= LEAST_GAIN * best["us"]:
            best = now
        name = table["tiles"][best["tile"]]["name"]
        choices.append(
            {"n": result["N"], "k": result["K"], "m": result["M"], "tile": name, "splits": best["splits"]}
        )  # fmt: skip
    facts = ("date", "driver", "cuda", "torch", "commit", "command")
    return {
        "format": FORMAT,
        "gpu": machine["device"],
        "sms": machine.get("sms", 0),
        "table": table["name"],
        "measured": {name: machine[name] for name in facts if machine.get(name)},
        "choices": choices,
    }


def write_cache(path: Path, data: dict[str, Any], with_candidates: bool = False) -> None:
    found = cache(data, with_candidates)
    write_json(path, found)
    print(f"{path}: {len(found['choices'])} choices for {found['gpu']}; use: SQK_TUNE_CACHE={path}")


# --- candidates worth shipping ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Win:
    """A candidate's problem: how many times as long the fastest shipped tile takes; 1 where that is not clear."""

    gain: float
    result: Result
    us: float
    other_us: float
    other: int

    def sentence(self, table: Table) -> str:
        r, name = self.result, table["tiles"][self.other]["name"]
        return f"M {r['M']} N {r['N']} K {r['K']}: {self.us:.2f} us, {name} {self.other_us:.2f} us"


def win(table: Table, result: Result, tile: int) -> Win | None:
    """None where nothing shipped was timed."""
    out = candidate_tiles(table)
    finals = [t for t in result["times"] if not t["rough"]]
    other = min((t for t in finals if t["tile"] not in out), key=lambda t: t["us"], default=None)
    mine = min((t for t in finals if t["tile"] == tile), key=lambda t: t["us"], default=None)
    if other is None:
        return None
    if mine is None:  # too slow for the finals, or it does not serve the problem
        return Win(1.0, result, math.inf, other["us"], other["tile"])
    apart = mine.get("p80", mine["us"]) < other.get("p20", other["us"])
    ratio = other["us"] / mine["us"]
    gain = ratio if apart and ratio >= CLEAR_GAIN else 1.0
    return Win(gain, result, mine["us"], other["us"], other["tile"])


def promotions(table: Table, machine: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """`promote this row: ...` for each candidate that gains enough in some class of M; empty without candidates."""
    lines = []
    for tile in sorted(candidate_tiles(table) - wrong_tiles(results)):
        wins = [w for w in (win(table, r, tile) for r in results if timed(r)) if w is not None]
        by_problem = {id(w.result): w for w in wins}
        reasons, said = [], []
        for name, group in by_class([w.result for w in wins]).items():
            here = [by_problem[id(result)] for result in group]
            gain = geomean(w.gain for w in here)
            if name == "all" or gain < LEAST_GAIN:
                continue
            clear = [w for w in here if w.gain > 1]
            best = max(clear, key=lambda w: w.gain)
            reasons.append(f"{100 * (gain - 1):.1f} % off in {len(here)} problems of {name}")
            said.append(
                f"//   {name}: geomean gain {100 * (gain - 1):.1f} % over {len(here)} problems, clear in {len(clear)}; "
                f"most {100 * (best.gain - 1):.1f} % at {best.sentence(table)}"
            )
        if said:
            row = table["tiles"][tile]
            lines += [f"// promote this row: {row['name']}", *said]
            lines += [f"    // {short(machine['device'])}: {', '.join(reasons)}.", cpp_row(row)]
    return lines


def short(device: str) -> str:
    return device.removeprefix("NVIDIA ")


def cpp_row(row: dict[str, Any]) -> str:
    """A tile as csrc/gemm/tiles/sm*.h have it."""
    m, n, k = (row[name] for name in "mnk")
    in_name = next((w for w in ("stages", "warps") if row["name"].endswith(f" {w}")), "")
    if row["kernel"] == "stream":
        calls = [f"stream({m}, {n})", f"warps({row['warps_n']})"]
    elif row["kernel"] == "mma":
        calls = [f"mma({m}, {n}, {k})", f"warps({row['warps_m']}, {row['warps_n']})"]
    else:
        cluster = "{}x{}".format(*row["cluster"])
        if row["name"].endswith(f" {cluster}"):
            in_name = "cluster"
        calls = [f"wgmma({m}, {n}, {k})", *["swap_ab()"] * row["swap_ab"]]
        calls += [row["schedule"].lower().replace("-", "_") + "()"]
        calls += [f"cluster({cluster.replace('x', ', ')})"] * (in_name != "" or cluster != "1x1")
    if row["kernel"] != "stream":
        calls += [f"stages({row['stages']})"]
        calls += [f"splits({row['most_splits']})"] * (row["most_splits"] > 1)
    calls += [f"rate({row['rate']})", *["gated()"] * row.get("gated", False)]
    w4 = "w4_only()" if row.get("w4_only") else "w4()"
    calls += [w4] * row.get("w4", False)
    calls += [f"{in_name}_in_name()"] * bool(in_name)
    return "    " + ".".join(calls) + ","


def literal(text: str, end: str, width: int = 100) -> list[str]:
    """A C++ string over as many lines as it takes."""
    room = width - 7 - len(end)  # indent, quotes
    parts = textwrap.wrap(text, room - 1)
    spaced = [part + " " for part in parts[:-1]] + parts[-1:]
    lines = ["     " + json.dumps(part, ensure_ascii=False) for part in spaced]
    return [*lines[:-1], lines[-1] + end]
