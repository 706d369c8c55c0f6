"""The INT8 GEMM with its dequantisation, on layers of large language models: as fast as FP16 cuBLAS allows to hope?

    python benchmarks/bench_gemm.py --device cuda [--budget-seconds 100] [--tiles] [--json FILE] [--csv FILE]

Each line: microseconds of one call, TOPS, GB/s of the fewest bytes that can be moved, then how many times as fast as
F.linear in float16 and bfloat16 (cuBLAS) and as torch._int_mm dequantised in PyTorch, and the tile that the dispatch
took. More is better, everywhere but in the first column. A result that is not the specification's is not timed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gemm_cases
import gpu_state
import gpu_timer
import torch
import torch.nn.functional as F
from gemm_cases import Case, Expected, Operands
from report import (
    Row,
    WrongResult,
    first_line,
    geomeans,
    ratio_columns,
    ratios,
    timing_columns,
    usable,
    write_csv,
    write_json,
)
from shapes import GEMM_TOKENS, LLM_LAYERS, TOY_LAYERS, TOY_TOKENS, distinct

BASELINES = ("fp16", "bf16", "int_mm")
COLUMNS = ("vs_fp16", "vs_bf16", "vs_int_mm", "tops", "gb_per_s")
#: A larger M that is this much faster is worth a line.
CLIFF = 1.03


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    *,
    tiles: bool = False,
    sample: gpu_state.Sampler = dict,
) -> Row:
    """Checks, then times one case; `WrongResult` where the op is wrong."""
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
    for name in BASELINES:
        try:
            if name != "int_mm":
                ready[name] = record_float(case, name, count, generator)
            elif refusal := gemm_cases.int_mm_refusal(case):
                reasons[name] = refusal
            else:
                ready[name] = record(gemm_cases.int_mm)
        except Exception as error:  # a baseline that cannot run must not hide the op
            reasons[name] = first_line(error)
    table = gemm_cases.current_table(device)
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
    row = row_of(
        case, timings, reasons, gemm_cases.tile_name(table, gemm_cases.chosen(case, device))
    )
    row |= {"tiles_wrong": wrong_tiles} if wrong_tiles else {}
    return row | gemm_cases.sample_under_load(ready["op"], row["us"], sample, device)


def record_float(
    case: Case, name: str, count: int, generator: torch.Generator
) -> gpu_timer.Recorded:
    """`F.linear`, cuBLAS on a GPU, in the named type."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    pairs = [gemm_cases.make_floats(case, dtype, generator) for _ in range(count)]
    return gpu_timer.record([lambda p=p: F.linear(*p) for p in pairs], generator.device)


def row_of(
    case: Case,
    timings: dict[str, gpu_timer.Timing],
    reasons: dict[str, str] | None = None,
    tile: str = "-",
) -> Row:
    """A line of the results: ratios are those of the medians; TOPS and GB/s follow from us."""
    us = timings["op"].us
    row: Row = {
        "model": case.layer.model,
        "layer": case.layer.name,
        "M": case.m,
        "N": case.n,
        "K": case.k,
        "bytes": case.bytes,
        **timing_columns(timings["op"]),
        "tops": case.operations / us / 1e6,
        "gb_per_s": case.bytes / us / 1e3,
        "tile": tile,
        **ratio_columns(us, {name: timings.get(name) for name in BASELINES}),
    }
    row |= {
        f"{name}_missing": reason for name, reason in (reasons or {}).items() if name in BASELINES
    }
    others = {name: timing.us for name, timing in timings.items() if name not in ("op", *BASELINES)}
    refused = {name: reason for name, reason in (reasons or {}).items() if name not in BASELINES}
    return row | ({"tiles_us": others, "tiles_refused": refused} if others or refused else {})


def line(case: Case, row: Row) -> str:
    return (
        f"{case} | {row['us']:8.2f} us | {row['tops']:7.1f} TOPS | {row['gb_per_s']:7.1f} GB/s | "
        f"{ratios(row, BASELINES)} | tile {row['tile']}"
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
        same = [r for r in rows if (r["N"], r["K"]) == (row["N"], row["K"]) and r["M"] > row["M"]]
        least = min(same, key=lambda r: r["us"], default=row)
        if row["us"] > CLIFF * least["us"]:
            found.append(
                f"{row['model']} {row['layer']} takes {row['us']:.2f} us at M {row['M']} ({row['tile']}), "
                f"but {least['us']:.2f} us at M {least['M']} ({least['tile']})"
            )
    return found


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 where an op was wrong or failed, or nothing was measured."""
    begin = time.monotonic()
    device = torch.device(args.device)
    facts = gpu_state.machine(device) | {"command": " ".join(["python", *sys.argv])}
    sample = gpu_state.sampler(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    chosen = gemm_cases.cases(args.layers, args.tokens)
    also = distinct(args.layers)
    rows: list[Row] = []
    for done, case in enumerate(chosen):
        if time.monotonic() - begin > args.budget_seconds:
            print(
                f"{len(chosen) - done} of {len(chosen)} cases were not started: the time is spent"
            )
            break
        try:
            row = measure(case, device, args.seconds, tiles=args.tiles, sample=sample)
            row["also"] = also[case.layer]
            print("\n".join([line(case, row), *tile_lines(row)]), flush=True)
        except Exception as error:  # one broken kernel must not hide the others
            what = "wrong" if isinstance(error, WrongResult) else "failed"
            names = ("model", "layer", "M", "N", "K")
            row = dict(zip(names, (case.layer.model, case.layer.name, *case.key), strict=True))
            row[what] = first_line(error)
            print(f"{case} | {what}: {row[what]}", flush=True)
        rows.append(row)
        measured = [r for r in rows if "us" in r]
        if args.json:
            means = geomeans(measured, COLUMNS)
            write_json(args.json, {"machine": facts, "geomeans": means, "rows": rows})
        if args.csv:
            write_csv(args.csv, rows)
        if not usable(device):
            print("the GPU does not answer any more: no further case is started")
            break
    report(rows)
    return int(any(is_bad(row) for row in rows) or not rows)


def is_bad(row: Row) -> bool:
    """Something was wrong or failed, even if the op itself was timed."""
    return "us" not in row or "tiles_wrong" in row


def report(rows: Sequence[Row]) -> None:
    """The end of the printed table."""
    measured = [row for row in rows if "us" in row]
    for name, means in geomeans(measured, COLUMNS).items():
        print(
            f"geomean {name:9s} {means['cases']:4.0f} cases | {means['tops']:7.1f} TOPS | "
            f"{means['gb_per_s']:7.1f} GB/s | {ratios(means, BASELINES)}"
        )
    for name in BASELINES:
        for reason, count in Counter(row.get(f"{name}_missing") for row in measured).items():
            if reason:
                print(f"no {name} in {count} cases: {reason}")
    for sentence in cliffs(measured):
        print(sentence)
    if bad := sum(map(is_bad, rows)):
        print(f"{bad} cases were wrong or failed: see above")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What all benchmarks of layers and GEMMs on a GPU take."""
    parser.add_argument(
        "--layers", nargs="+", choices=list(LLM_LAYERS), metavar="NAME",
        help="the most important first: " + ", ".join(LLM_LAYERS),
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", help="M, the most important first")
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.3)")
    parser.add_argument(
        "--budget-seconds", type=float, default=math.inf, help="no case starts later"
    )
    parser.add_argument("--json", type=Path)


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
    add_common_options(parser)
    parser.add_argument("--csv", type=Path)
    args: Any = parser.parse_args(arguments)
    fill_in(parser, args)
    return args


def main() -> int:
    with torch.inference_mode():
        return run(parse())


if __name__ == "__main__":
    sys.exit(main())
