"""The INT8 GEMM with its dequantisation, on layers of large language models, beside what else computes it.

    python benchmarks/bench_gemm.py --device cuda [--budget-seconds 100] [--tiles] [--json FILE] [--resume]

Each line: microseconds of one call, TOPS, GB/s of the fewest bytes that can be moved, then how many times as fast as
each of the baselines (benchmarks/baselines.py, --baselines), "-" where one cannot run, and the tile that the dispatch
took. More is better, everywhere but in the first column. A result that is not the specification's is not timed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import baselines
import gemm_cases
import gpu_state
import gpu_timer
import runner
import torch
from gemm_cases import Case, Expected, Operands
from report import (
    Row,
    WrongResult,
    first_line,
    geomean,
    geomeans,
    ratio_columns,
    ratios,
    timing_columns,
)
from shapes import GEMM_TOKENS, LLM_LAYERS, TOY_LAYERS, TOY_TOKENS, distinct

BASELINES = baselines.USUAL
COLUMNS = (*(f"vs_{name}" for name in baselines.NAMES), "tops", "gb_per_s")
#: A larger M that is this much faster is worth a line.
CLIFF = 1.03
#: So many of the most telling cases are measured with real data too, right after they were with random.
TELLING = 12


def cases(args: argparse.Namespace) -> list[Case]:
    """The most telling first. With both kinds of data the first ones come with either, before all others."""
    chosen = gemm_cases.cases(args.layers, args.tokens)
    if args.data == "random":
        return chosen
    real = [replace(case, data="real") for case in chosen]
    if args.data == "real":
        return real
    return chosen[:TELLING] + real[:TELLING] + chosen[TELLING:]


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    *,
    tiles: bool = False,
    sample: gpu_state.Sampler = dict,
    names: Sequence[str] = BASELINES,
) -> Row:
    """Checks, then times one case; `WrongResult` where the op is wrong."""
    table = gemm_cases.current_table(device)  # first: in the simulator it binds the ops
    generator = gemm_cases.generator(case, device)
    count = gpu_timer.input_sets(case.bytes, device)
    sets = [gemm_cases.make_operands(case, generator) for _ in range(count)]
    expected = Expected(case, sets[0], generator)

    def record(function: Callable[[Operands], torch.Tensor]) -> gpu_timer.Recorded:
        gemm_cases.poison(case, device)
        if wrong := expected.wrong(function(sets[0])):
            raise WrongResult(wrong)
        return gemm_cases.record_each(function, sets, device)

    ready = {"op": record(gemm_cases.dispatched)}
    reasons = {}
    for name in names:
        try:
            ready[name] = record_baseline(baselines.BY_NAME[name], case, sets, expected, device)
        except Exception as error:  # a baseline that cannot run must not hide the op
            reasons[name] = first_line(error)
    wrong_tiles = {}
    for choice in gemm_cases.choices(table, case.m) if tiles and table else ():
        name = gemm_cases.tile_name(table, choice)
        try:
            ready[name] = record(lambda a, choice=choice: gemm_cases.forced(a, *choice))
        except WrongResult as error:
            wrong_tiles[name] = first_line(error)
        except RuntimeError as error:  # the tile cannot serve the shape
            reasons[name] = first_line(error)
    timings = gpu_timer.measure(ready, device=device, seconds=seconds)
    tile = gemm_cases.tile_name(table, gemm_cases.chosen(case, device))
    row = row_of(case, timings, reasons, tile, names)
    row |= {"tiles_wrong": wrong_tiles} if wrong_tiles else {}
    return row | gemm_cases.sample_under_load(ready["op"], row["us"], sample, device)


def record_baseline(
    baseline: baselines.Baseline,
    case: Case,
    sets: Sequence[Operands],
    expected: Expected,
    device: torch.device,
) -> gpu_timer.Recorded:
    """Ready to be timed; raises, with the reason, where the baseline cannot run or does not compute y."""
    if reason := baseline.refusal(case, device):
        raise RuntimeError(reason)
    calls = baseline.calls(sets)
    gemm_cases.poison(case, device)
    if wrong := baseline.wrong(expected, sets[0], calls[0]()):
        raise WrongResult(f"wrong: {wrong}")
    return gpu_timer.record(calls, device)


def key_of(case: Case) -> Row:
    """The columns that say which case a row is."""
    names = ("model", "layer", "M", "N", "K", "data")
    values = (case.layer.model, case.layer.name, *case.key, case.data)
    return dict(zip(names, values, strict=True))


def row_of(
    case: Case,
    timings: dict[str, gpu_timer.Timing],
    reasons: dict[str, str] | None = None,
    tile: str = "-",
    names: Sequence[str] = BASELINES,
) -> Row:
    """A line of the results: ratios are those of the medians; TOPS and GB/s follow from us."""
    us = timings["op"].us
    row: Row = {
        **key_of(case),
        "bytes": case.bytes,
        **timing_columns(timings["op"]),
        "tops": case.operations / us / 1e6,
        "gb_per_s": case.bytes / us / 1e3,
        "tile": tile,
        **ratio_columns(us, {name: timings.get(name) for name in names}),
    }
    row |= {f"{name}_missing": why for name, why in (reasons or {}).items() if name in names}
    others = {name: timing.us for name, timing in timings.items() if name not in ("op", *names)}
    refused = {name: reason for name, reason in (reasons or {}).items() if name not in names}
    return row | ({"tiles_us": others, "tiles_refused": refused} if others or refused else {})


def compared(row: Row) -> list[str]:
    """The baselines that a row has columns for, whether or not they ran."""
    return [name for name in baselines.NAMES if f"vs_{name}" in row]


def line(case: Case, row: Row) -> str:
    return (
        f"{case} | {row['us']:8.2f} us | {row['tops']:7.1f} TOPS | {row['gb_per_s']:7.1f} GB/s | "
        f"{ratios(row, compared(row))} | tile {row['tile']}"
    )


def tile_lines(row: Row) -> list[str]:
    """Every forced tile, the fastest first, and its time in multiples of the dispatch's."""
    found = sorted(row.get("tiles_us", {}).items(), key=lambda item: item[1])
    lines = [f"  {name:32s} | {us:8.2f} us | {us / row['us']:5.2f}x the time" for name, us in found]
    for what in ("refused", "wrong"):
        others = row.get(f"tiles_{what}", {})
        lines += [f"  {name:32s} | {what}: {why}" for name, why in others.items()]
    return lines


def cliffs(rows: Sequence[Row]) -> list[str]:
    """Where more tokens take less time: the dispatch has missed a better tile."""
    found = []
    for row in rows:
        same = [r for r in rows if _same(r, row, "N", "K", "data") and r["M"] > row["M"]]
        least = min(same, key=lambda r: r["us"], default=row)
        if row["us"] > CLIFF * least["us"]:
            found.append(
                f"{row['model']} {row['layer']} takes {row['us']:.2f} us at M {row['M']} ({row['tile']}), "
                f"but {least['us']:.2f} us at M {least['M']} ({least['tile']})"
            )
    return found


def _same(one: Row, other: Row, *names: str) -> bool:
    return all(one.get(name) == other.get(name) for name in names)


def means(rows: Sequence[Row]) -> dict[str, Any]:
    """Geometric means, those of real data apart: they are of the most telling cases only."""
    by_data = {data: [row for row in rows if row["data"] == data] for data in ("random", "real")}
    return {
        "geomeans": geomeans(by_data["random"], COLUMNS),
        "geomeans_real": geomeans(by_data["real"], COLUMNS),
    }


def real_against_random(rows: Sequence[Row]) -> list[float]:
    """Of the cases that were measured with both data, random's time over real's."""
    return [
        other["us"] / row["us"]
        for row in rows
        for other in rows
        if (row["data"], other["data"]) == ("real", "random") and _same(row, other, "M", "N", "K")
    ]


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 where an op was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device)
    sample = gpu_state.sampler(device)
    chosen = cases(args)
    also = distinct(args.layers)
    by_key = {tuple(key_of(case).values()): case for case in chosen}
    row_measure = functools.partial(
        measure,
        device=device,
        seconds=args.seconds,
        tiles=args.tiles,
        sample=sample,
        names=args.baselines,
    )

    def lines(row: Row) -> str:
        case = by_key[tuple(row[name] for name in key_of(chosen[0]))]
        return "\n".join([line(case, row), *tile_lines(row)])

    rows = runner.run_cases(
        chosen,
        lambda case: row_measure(case) | {"also": also[case.layer]},
        key=key_of,
        line=lines,
        args=args,
        facts=facts,
        summary=means,
        complete=lambda row: all(f"vs_{name}" in row for name in args.baselines),
    )
    report(rows)
    return int(any(is_bad(row) for row in rows) or not rows)


def is_bad(row: Row) -> bool:
    """Something was wrong or failed, even if the op itself was timed."""
    return "us" not in row or "tiles_wrong" in row


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
        print(
            f"real data is {geomean(both):.3f}x as fast as random in the {len(both)} cases that have both"
        )
    for name in names:
        for reason, count in Counter(row.get(f"{name}_missing") for row in measured).items():
            if reason:
                print(f"no {name} in {count} cases: {reason}")
    for sentence in cliffs(measured):
        print(sentence)
    if bad := sum(map(is_bad, rows)):
        print(f"{bad} cases were wrong or failed: see above")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What all benchmarks of layers and GEMMs on a GPU take, beside `runner.add_options`."""
    parser.add_argument(
        "--layers", nargs="+", choices=list(LLM_LAYERS), metavar="NAME",
        help="the most important first: " + ", ".join(LLM_LAYERS),
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", help="M, the most important first")
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.3)")


def fill_in(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The defaults of the device."""
    gpu = args.device == "cuda"
    args.layers = [LLM_LAYERS[name] for name in args.layers or LLM_LAYERS]
    if not gpu:
        args.layers = list(TOY_LAYERS)
    args.tokens = args.tokens or (GEMM_TOKENS if gpu else TOY_TOKENS)
    args.seconds = args.seconds if args.seconds is not None else (0.3 if gpu else 0.02)
    if gpu and not torch.cuda.is_available():
        parser.error("no CUDA GPU is visible to torch; --device cpu rehearses the benchmark")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiles", action="store_true", help="every tile of the GPU's table too")
    # fmt: off
    parser.add_argument(
        "--data", choices=["random", "real", "both"], default="both",
        help=f"int8 values: random, of a model, or random and the first {TELLING} cases of a model too",
    )
    parser.add_argument(
        "--baselines", nargs="+", choices=baselines.NAMES, default=list(BASELINES), metavar="NAME",
        help="of " + "; ".join(f"{b.name}: {b.what}" for b in baselines.ALL),
    )
    # fmt: on
    add_common_options(parser)
    runner.add_options(parser)
    args: Any = parser.parse_args(arguments)
    runner.check_options(parser, args)
    fill_in(parser, args)
    return args


def main() -> int:
    with torch.inference_mode():
        return run(parse())


if __name__ == "__main__":
    sys.exit(main())
