"""The INT8 GEMM with its dequantization, on layers of large language models, against other kernels.

    python -m benchmarks.gemm --device cuda [--budget-seconds 100] [--tiles] [--json FILE] [--resume]

A line: microseconds of one call, TOPS, GB/s of the fewest bytes that can be moved, how many times as fast as each
baseline (lib/baselines.py; "-": it cannot run), and the tile that the dispatch took. A wrong result is not timed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.lib import baselines, cases, gpu, runner, timer
from benchmarks.lib.cases import Case, Expected, Operands
from benchmarks.lib.runner import Row, WrongResult, first_line, geomean, geomeans, ratios
from benchmarks.lib.shapes import distinct

BASELINES = baselines.USUAL
COLUMNS = (*(f"vs_{name}" for name in baselines.NAMES), "tops", "gb_per_s")
#: A larger M that is this much faster is worth a line.
CLIFF = 1.03
#: How many of the most telling cases are also measured with real data, right after random data.
TELLING = 12


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The most telling first. With both kinds of data the first ones come with either, before all others."""
    chosen = cases.cases_of(args.layers, args.tokens)
    real = [replace(case, data="real") for case in chosen]
    if args.data != "both":
        return real if args.data == "real" else chosen
    return chosen[:TELLING] + real[:TELLING] + chosen[TELLING:]


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    *,
    tiles: bool = False,
    sample: gpu.Sampler = dict,
    names: Sequence[str] = BASELINES,
) -> Row:
    """Checks, then times one case; `WrongResult` if the op is wrong."""
    table = cases.current_table(device)  # first: in the simulator it binds the ops
    generator = cases.generator_of(case, device)
    count = timer.input_sets(case.bytes, device)
    sets = [cases.make_operands(case, generator) for _ in range(count)]
    expected = Expected(case, sets[0], generator)

    def record(function: Callable[[Operands], torch.Tensor]) -> timer.Recorded:
        cases.poison(case, device)
        if wrong := expected.wrong(function(sets[0])):
            raise WrongResult(wrong)
        return cases.record_each(function, sets, device)

    ready = {"op": record(cases.dispatched)}
    reasons, wrong_tiles = {}, {}
    for name in names:
        try:
            ready[name] = record_baseline(baselines.BY_NAME[name], case, sets, expected, device)
        except Exception as error:  # a baseline that cannot run must not hide the op
            reasons[name] = first_line(error)
    for choice in cases.choices(table, case.m) if tiles and table else ():
        name = cases.tile_name(table, choice)
        try:
            ready[name] = record(lambda a, choice=choice: cases.forced(a, *choice))
        except WrongResult as error:
            wrong_tiles[name] = first_line(error)
        except RuntimeError as error:  # the tile cannot serve the shape
            reasons[name] = first_line(error)
    timings = timer.measure(ready, device=device, seconds=seconds)
    tile = cases.tile_name(table, cases.chosen(case, device))
    row = row_of(case, timings, reasons, tile, names)
    row |= {"tiles_wrong": wrong_tiles} if wrong_tiles else {}
    return row | cases.sample_under_load(ready["op"], row["us"], sample, device)


def record_baseline(
    baseline: baselines.Baseline,
    case: Case,
    sets: Sequence[Operands],
    expected: Expected,
    device: torch.device,
) -> timer.Recorded:
    """Ready to be timed; raises, with the reason, if the baseline cannot run or does not compute y."""
    if reason := baseline.refusal(case, device):
        raise RuntimeError(reason)
    calls = baseline.calls(sets)
    cases.poison(case, device)
    if wrong := baseline.wrong(expected, sets[0], calls[0]()):
        raise WrongResult(f"wrong: {wrong}")
    return timer.record(calls, device)


def key_of(case: Case) -> Row:
    names = ("model", "layer", "M", "N", "K", "data")
    values = (case.layer.model, case.layer.name, *case.key, case.data)
    return dict(zip(names, values, strict=True))


def row_of(
    case: Case,
    timings: dict[str, timer.Timing],
    reasons: dict[str, str] | None = None,
    tile: str = "-",
    names: Sequence[str] = BASELINES,
) -> Row:
    """A line of the results: ratios are those of the medians; TOPS and GB/s follow from us."""
    us, reasons = timings["op"].us, reasons or {}
    row: Row = {**key_of(case), "bytes": case.bytes, **runner.timing_columns(timings["op"])}
    row |= {"tops": case.operations / us / 1e6, "gb_per_s": case.bytes / us / 1e3, "tile": tile}
    row |= runner.ratio_columns(us, {name: timings.get(name) for name in names})
    row |= {f"{name}_missing": why for name, why in reasons.items() if name in names}
    others = {name: timing.us for name, timing in timings.items() if name not in ("op", *names)}
    refused = {name: reason for name, reason in reasons.items() if name not in names}
    return row | ({"tiles_us": others, "tiles_refused": refused} if others or refused else {})


def compared(row: Row) -> list[str]:
    """The baselines that a row has columns for, whether or not they ran."""
    return [name for name in baselines.NAMES if f"vs_{name}" in row]


def line(row: Row) -> str:
    """The case; below it every forced tile, the fastest first, and its time in multiples of the dispatch's."""
    data = "" if row["data"] == "random" else f" {row['data']}"
    lines = [
        f"{row['model'] + ' ' + row['layer']:18s} M {row['M']:4d} N {row['N']:5d} K {row['K']:5d}{data} | "
        f"{row['us']:8.2f} us | {row['tops']:7.1f} TOPS | {row['gb_per_s']:7.1f} GB/s | "
        f"{ratios(row, compared(row))} | tile {row['tile']}"
    ]
    found = sorted(row.get("tiles_us", {}).items(), key=lambda item: item[1])
    lines += [
        f"  {name:32s} | {us:8.2f} us | {us / row['us']:5.2f}x the time" for name, us in found
    ]
    for what in ("refused", "wrong"):
        others = row.get(f"tiles_{what}", {})
        lines += [f"  {name:32s} | {what}: {why}" for name, why in others.items()]
    return "\n".join(lines)


def cliffs(rows: Sequence[Row]) -> list[str]:
    """Where more tokens take less time: the dispatch has missed a better tile."""
    found = []
    for row in rows:
        same = [r for r in rows if all(r[n] == row[n] for n in ("N", "K", "data"))]
        least = min((r for r in same if r["M"] > row["M"]), key=lambda r: r["us"], default=row)
        if row["us"] > CLIFF * least["us"]:
            found.append(
                f"{row['model']} {row['layer']} takes {row['us']:.2f} us at M {row['M']} ({row['tile']}), "
                f"but {least['us']:.2f} us at M {least['M']} ({least['tile']})"
            )
    return found


def means(rows: Sequence[Row]) -> dict[str, Any]:
    """What stands before the rows in the file, by kind of data."""
    kinds = {"geomeans": "random", "geomeans_real": "real"}
    groups = {name: [r for r in rows if r["data"] == data] for name, data in kinds.items()}
    return {name: geomeans(group, COLUMNS) for name, group in groups.items()}


def real_against_random(rows: Sequence[Row]) -> list[float]:
    """How many times as fast the same case is with real data."""
    shape = ("M", "N", "K")
    random = {tuple(r[n] for n in shape): r["us"] for r in rows if r["data"] == "random"}
    real = [(tuple(r[n] for n in shape), r["us"]) for r in rows if r["data"] == "real"]
    return [random[key] / us for key, us in real if key in random]


def is_good(row: Row) -> bool:
    """Nothing was wrong or failed: neither the op nor a tile beside it."""
    return "us" in row and "tiles_wrong" not in row


def report(rows: Sequence[Row]) -> None:
    """The end of the printed table."""
    measured = [row for row in rows if "us" in row]
    names = [name for name in baselines.NAMES if any(name in compared(row) for row in measured)]
    for title, group in means(measured).items():
        suffix = title.removeprefix("geomeans").replace("_", " ")
        for name, values in group.items():
            print(
                f"geomean {name:9s}{suffix} {values['cases']:4.0f} cases | {values['tops']:7.1f} TOPS | "
                f"{values['gb_per_s']:7.1f} GB/s | {ratios(values, names)}"
            )
    if both := real_against_random(measured):
        times = f"{geomean(both):.3f}x as fast as random"
        print(f"real data is {times} in the {len(both)} cases that have both")
    for name in names:
        for reason, count in Counter(row.get(f"{name}_missing") for row in measured).items():
            if reason:
                print(f"no {name} in {count} cases: {reason}")
    for sentence in cliffs(measured):
        print(sentence)


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if something was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device)
    also = distinct(args.layers)
    one = partial(
        measure, device=device, seconds=args.seconds, tiles=args.tiles, sample=gpu.sampler(device),
        names=args.baselines,
    )  # fmt: skip
    rows = runner.run_cases(
        cases_of(args),
        lambda case: one(case) | {"also": also[case.layer]},
        key=key_of,
        line=line,
        args=args,
        facts=facts,
        summary=means,
        complete=lambda row: all(f"vs_{name}" in row for name in args.baselines),
    )
    report(rows)
    return runner.status(rows, is_good)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    parser.add_argument("--tiles", action="store_true", help="every tile of the GPU's table too")
    parser.add_argument(
        "--data", choices=["random", "real", "both"], default="both",
        help=f"int8 values: random, of a model, or random and the first {TELLING} cases of a model too",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", nargs="+", choices=baselines.NAMES, default=list(BASELINES), metavar="NAME",
        help="of " + "; ".join(f"{b.name}: {b.what}" for b in baselines.ALL),
    )  # fmt: skip
    runner.add_layer_options(parser)
    args = parser.parse_args(arguments)
    runner.check_options(parser, args)
    runner.fill_in_layers(args)
    return args


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(run(parse()))
