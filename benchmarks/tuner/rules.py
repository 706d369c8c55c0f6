"""What the tuner concludes from its results (choices.py): rules in the C++ of csrc/gemm/tiles, rates, what is lost."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lib.cases import Table, serves, tile_name
from benchmarks.lib.runner import by_class, geomean, grouped
from benchmarks.tuner.choices import (
    Result,
    candidate_tiles,
    literal,
    shipped_only,
    short,
    timed,
    wrong_tiles,
)

ANY_M = 1 << 40  # kAnyM in csrc/gemm/tiles/tile.h
MOST_CANDIDATES = 6  # kMostCandidates
#: A further candidate, or a rule of its own, must gain as much: less is noise, and choosing has its errors too.
LEAST_GAIN = 1.01


@dataclass(frozen=True)
class Rule:
    most_m: int
    tiles: tuple[int, ...]
    cost: float  # geometric mean of the best candidate's time over the best tile's
    results: int
    reason: str = "not measured"

    def row(self, names: Mapping[int, str]) -> list[str]:
        """As a table has it: a RuleRow of csrc/gemm/tiles/builder.h."""
        most = "kAnyM" if self.most_m == ANY_M else str(self.most_m)
        quoted = [json.dumps(names[tile]) for tile in self.tiles]
        one_line = f"    {{{most}, {{{', '.join(quoted)}}}, {json.dumps(self.reason)}}},"
        if len(one_line) <= 100:
            return [one_line]
        # A name is never broken: its blanks are others while the text is wrapped.
        text = "{" + ", ".join(name.replace(" ", "\0") for name in quoted) + "},"
        wrapped = textwrap.wrap(text, 100, initial_indent=" " * 5, subsequent_indent=" " * 6)
        lines = [line.replace("\0", " ") for line in wrapped]
        return [f"    {{{most},", *lines, *literal(self.reason, "},")]


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):.1f} %"


# --- rules ------------------------------------------------------------------------------------------------------------


def best_times(result: Result) -> dict[int, float]:
    """Microseconds by tile, with the splits that suit it best."""
    found: dict[int, float] = {}
    for time in timed(result):
        found[time["tile"]] = min(time["us"], found.get(time["tile"], math.inf))
    return found


def least_us(result: Result) -> float:
    """The best tile's time."""
    return min(time["us"] for time in result["times"] if not time["rough"])


def cost(results: Sequence[Result], tiles: Iterable[int]) -> float:
    """How far the best of some tiles is from the best of all, as a geometric mean; infinite where none serves."""
    chosen = tuple(tiles)
    ratios = []
    for result in results:
        times = best_times(result)
        us = min((times.get(tile, math.inf) for tile in chosen), default=math.inf)
        ratios.append(max(1.0, us / least_us(result)))
    return math.inf if math.inf in ratios else geomean(ratios)


def candidates(table: Table, results: Sequence[Result], most_m: int) -> tuple[int, ...]:
    """The tiles for all M up to most_m: greedily, as long as one more gains enough, at most MOST_CANDIDATES."""
    timed = {tile for result in results for tile in best_times(result)}
    possible = [t["tile"] for t in table["tiles"] if serves(t, most_m)]
    possible = [tile for tile in possible if tile in timed]
    found: tuple[int, ...] = ()
    while len(found) < MOST_CANDIDATES:
        others = [t for t in possible if t not in found]
        costs = {t: cost(results, (*found, t)) for t in others}
        best = min(costs, key=lambda t: costs[t], default=None)
        if best is None or cost(results, found) < LEAST_GAIN * costs[best]:
            break
        if math.isinf(costs[best]):
            # None serves all alone: the one that serves most, so that the next can complete it.
            best = max(others, key=lambda t: sum(t in best_times(r) for r in results))
        found = (*found, best)
    return found


def rules(table: Table, results: Sequence[Result]) -> list[Rule]:
    """A rule for every measured M, neighbors merged where that costs nothing; the last one is for any M. A tile that
    was wrong anywhere is in none.

    An M between two measured ones gets the larger one's rule. If the last rule needs a streaming kernel, which cannot
    serve every M, the table's own last rule follows it.
    """
    wrong = wrong_tiles(results)
    table = table | {"tiles": [t for t in table["tiles"] if t["tile"] not in wrong]}
    in_order = sorted((r for r in results if timed(r)), key=lambda r: r["M"])
    groups: list[tuple[int, list[Result]]] = list(grouped(in_order, lambda r: r["M"]).items())
    if not groups:
        return []
    last, group = groups[-1]
    if candidates(table, group, ANY_M) == candidates(table, group, last):
        groups[-1] = (ANY_M, group)
    found: list[tuple[Rule, list[Result]]] = []
    for most_m, group in groups:
        rule = make_rule(table, group, most_m)
        if not rule.tiles:
            continue  # the next rule serves these tokens too
        if found:
            before, earlier = found[-1]
            pooled = make_rule(table, [*earlier, *group], most_m)
            apart = geomean([before.cost] * len(earlier) + [rule.cost] * len(group))
            # More candidates than either needs would leave more for the dispatch's arithmetic to get wrong.
            as_few = len(pooled.tiles) <= min(len(before.tiles), len(rule.tiles))
            if as_few and pooled.cost <= LEAST_GAIN * apart:
                found[-1] = (pooled, [*earlier, *group])
                continue
        found.append((rule, group))
    made = [rule for rule, _ in found]
    if made and made[-1].most_m < ANY_M:
        made.append(Rule(ANY_M, tuple(table["rules"][-1]["tiles"]), math.nan, 0))
    return made


def make_rule(table: Table, results: Sequence[Result], most_m: int) -> Rule:
    tiles = candidates(table, results, most_m)
    off = cost(results, tiles)
    return Rule(most_m, tiles, off, len(results), reason(table, results, tiles, off))


def reason(table: Table, results: Sequence[Result], tiles: Sequence[int], off: float) -> str:
    """A rule's `why`: microseconds as geometric means, with its tiles and with the best other one in their place."""
    if not tiles or math.isinf(off):
        return "measured: nothing serves all problems"
    low, high = (end(result["M"] for result in results) for end in (min, max))
    span = f"M {low}" if low == high else f"M {low} .. {high}"

    def mean(some: Sequence[int]) -> float:
        return geomean(min(us for t, us in best_times(r).items() if t in some) for r in results)

    names = {int(tile["tile"]): tile["name"] for tile in table["tiles"]}
    others = [t for t in names if t not in tiles and all(t in best_times(r) for r in results)]
    second = min(others, key=lambda tile: mean([tile]), default=None)
    instead = "no other tile serves them all"
    if second is not None:
        instead = f"{mean([second]):.2f} us with {names[second]} instead"
    gpu = f"{short(table['gpu'])}, " if table.get("gpu") else ""
    return f"{gpu}{span}: {mean(tiles):.2f} us, {instead}; {percent(off)} off the best tiles, {len(results)} problems"


def cpp_rules(table: Table, machine: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """Rules of shipped rows: a table's rules cannot name its candidates."""
    name = table["name"].capitalize()
    kept = candidate_tiles(table)
    shipped = table | {
        "gpu": machine["device"],
        "tiles": [tile for tile in table["tiles"] if tile["tile"] not in kept],
    }
    found = rules(shipped, shipped_only(table, results))
    names = {int(tile["tile"]): str(tile["name"]) for tile in table["tiles"]}
    rows = [line for rule in found for line in rule.row(names)]
    return [f"constexpr RuleRow k{name}Rules[] = {{", *rows, "};"] if rows else []


# --- rates ------------------------------------------------------------------------------------------------------------


def rates(
    table: Table, results: Sequence[Result], sms: int | None
) -> dict[int, tuple[float, Result]]:
    """The highest percentage of the tensor cores' peak, at the clock measured, by tile; and where it was reached.

    What a tile multiplies beyond M and N counts: the rate is that of the instructions. First loads, last stores and an
    unfilled last wave are in the time, so the main loop itself is somewhat faster; the largest problems say most.
    """
    found: dict[int, tuple[float, Result]] = {}
    for result in results:
        mhz = result.get("sm_mhz")
        if not mhz or not sms:
            continue
        peak = 2 * table["machine"]["macs"] * sms * mhz * 1e6
        for tile, us in best_times(result).items():
            row = table["tiles"][tile]
            m = math.ceil(result["M"] / row["m"]) * row["m"]
            n = math.ceil(result["N"] / row["n"]) * row["n"]
            rate = 100 * 2 * m * n * result["K"] / (us * 1e-6) / peak
            if rate > found.get(tile, (0.0, result))[0]:
                found[tile] = (rate, result)
    return found


def rate_lines(table: Table, results: Sequence[Result], sms: int | None) -> list[str]:
    found = rates(table, results, sms)
    if not found:
        return ["// rates: unknown, no clock was read"]
    lines = ["// rate: percent of the peak at the clock measured; the table's own in brackets"]
    for tile, (rate, at) in sorted(found.items()):
        row = table["tiles"][tile]
        lines.append(
            f"//   {tile:2d} {row['name']:26s} {rate:5.1f} [{row['rate']}] at M {at['M']} N {at['N']} K {at['K']}, "
            f"{at['sm_mhz']:.0f} MHz"
        )
    return lines


# --- what the dispatch loses ------------------------------------------------------------------------------------------


def loss(result: Result) -> float:
    """The dispatch's time over the best tile's, at least 1: the dispatch takes one of them, give or take the noise."""
    return max(1.0, result["dispatched"]["us"] / least_us(result))


def named(table: Table, time: dict[str, Any]) -> str:
    return tile_name(table, (time["tile"], time["splits"]) if time["tile"] >= 0 else None)


def loss_line(table: Table, result: Result) -> str:
    best = min((t for t in result["times"] if not t["rough"]), key=lambda t: t["us"])
    now = result["dispatched"]
    return (
        f"{result['model'] + ' ' + result['layer']:18s} M {result['M']:4d} N {result['N']:5d} K {result['K']:5d} | "
        f"{now['us']:8.2f} us {named(table, now):26s} | best {best['us']:8.2f} us {named(table, best):26s} | "
        f"loses {percent(loss(result))}"
    )


def loss_means(results: Sequence[Result]) -> dict[str, float]:
    """Geometric means of `loss` by class of M and over all."""
    classes = by_class([r for r in results if timed(r)])
    return {name: geomean(map(loss, group)) for name, group in classes.items()}
