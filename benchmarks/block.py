"""A decoder block in W8A8, its quantization included, against the same block in float types, in one run.

    python -m benchmarks.block [--device cuda] [--json FILE] [--budget-seconds 30]
    python -m benchmarks.block --device cpu [--quick]

Prefill (one prompt) and decode (a token for each of a batch, after 1,024 others). `us` is of the block that
`optimize_for_inference` makes (a norm or an activation function together with the quantization, the residual in the
GEMM); `unfused` is the block as `quantize_model` leaves it. On a CPU float32 takes the place of float16.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import blocks, gpu, runner, timer
from benchmarks.lib.blocks import Block, Parts, Shape, Situation
from benchmarks.lib.cases import sample_under_load
from benchmarks.lib.runner import Row, WrongResult, baselines_of, first_line, group_means, ratios
from benchmarks.lib.shapes import by_place
from benchmarks.quantize import Compiler

#: (phase, batch, new tokens of each, tokens before them), the most telling first.
SITUATIONS = (
    ("prefill", 1, 2048, 0),
    ("decode", 16, 1, 1024),
    ("decode", 1, 1, 1024),
    ("prefill", 1, 512, 0),
    ("decode", 64, 1, 1024),
    ("prefill", 1, 8192, 0),
    ("decode", 8, 1, 1024),
    ("prefill", 1, 128, 0),
)
CPU_SITUATIONS = (("prefill", 1, 128, 0), ("decode", 1, 1, 128), ("decode", 8, 1, 128))
TOY_SITUATIONS = (("prefill", 1, 8, 0), ("decode", 2, 1, 5))
FLOATS = {"cuda": ("float16", "bfloat16"), "cpu": ("float32", "bfloat16")}
#: Tokens that the smoothing factors are computed from.
CALIBRATION = 128
PARTS = ("gemm", "quantise", "attention")  # the spelling of the results files

# Relative to what the exact block adds to x. The mean square error of an int8 rounding is peak / (127 sqrt(12)), 0.2 %
# of the peak: with peaks of up to 20 times the root mean square, which products of normal variables have, 4.5 %; for x
# and w of two matrices in a row 4.5 % x sqrt(4). A wrong scale or factor gives about 100 %.
MOST_ERROR = 0.09
# Some ten roundings to bfloat16 in a row, each off by at most 2^-9.
MOST_FLOAT_ERROR = 10 * 2.0**-9


@dataclass(frozen=True)
class Case:
    shape: Shape
    phase: str
    batch: int
    tokens: int
    start: int

    @property
    def m(self) -> int:
        return self.batch * self.tokens

    @property
    def operations(self) -> int:
        """Of the matrices, without attention."""
        return 2 * self.m * self.shape.parameters


def key_of(case: Case) -> Row:
    row = {"model": case.shape.model, "phase": case.phase, "batch": case.batch}
    return row | {"M": case.m, "context": case.start}


@dataclass
class Set:
    """One copy of everything: blocks by variant, with what they read."""

    variants: dict[str, tuple[Any, Tensor, Situation]]

    def call(self, name: str, function: Callable[..., Any] | None = None) -> Callable[[], Any]:
        module, x, at = self.variants[name]
        return partial(function or module, x, at)


def make_sets(case: Case, names: Sequence[str], device: torch.device) -> tuple[list[Set], Tensor]:
    """Copies that share nothing, enough for a cold L2 cache, at least two, and the exact result of them all."""
    generator = torch.Generator(device).manual_seed(case.m * 1_000_003 + case.shape.hidden)
    shape, main = case.shape, getattr(torch, names[0])
    exact = Block(shape, device).randomize(generator)
    x = torch.randn(case.batch, case.tokens, shape.hidden, generator=generator, device=device)
    x = x.to(main).float()  # what all variants but bfloat16's get exactly
    at = Situation.make(shape, case.batch, case.tokens, case.start, x, generator)
    sample = torch.randn(1, CALIBRATION, shape.hidden, generator=generator, device=device)
    calibration = Situation.make(shape, 1, CALIBRATION, 0, sample, generator)
    int8 = blocks.quantized(exact, sample, calibration, dtype=main)
    y = exact(x, at.to(torch.float32))
    variants: dict[str, tuple[Any, Tensor, Situation]] = {}
    for name in names:
        dtype = getattr(torch, name)
        variants[name] = (copy.deepcopy(exact).to(dtype), x.to(dtype), at.to(dtype))
    del exact
    variants["unfused"] = (int8, x.to(main), at.to(main))
    variants["fused"] = (blocks.fused(int8, x.to(main), at.to(main)), x.to(main), at.to(main))
    count = timer.input_sets(case.shape.parameters, device)  # bytes of int8 weights
    return [Set(variants), *(Set(copy.deepcopy(variants)) for _ in range(count - 1))], y


def errors(first: Set, y: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Relative errors of all variants, the float types `names` among them; `WrongResult` as `checked_error`."""
    found = {}
    for name in (*names, "unfused", "fused"):
        most = MOST_FLOAT_ERROR if name in names else MOST_ERROR
        found[name] = checked_error(name, first.call(name)(), y, first.variants[name][1], most)
    return found


def checked_error(what: str, y: Tensor, exact: Tensor, x: Tensor, most: float) -> float:
    """The relative error; `WrongResult`, beginning with `what`, if roundings do not explain it."""
    error = blocks.relative_error(y, exact, x)
    if not error <= most:  # NaN too
        raise WrongResult(f"{what}: relative error {error:.3g}, at most {most:.3g} is explained")
    return error


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    compiler: Compiler,
    sample: gpu.Sampler = dict,
) -> Row:
    """Checks, then times one case: whole blocks, and the parts of the fused one and of the first float one."""
    names = FLOATS[device.type]
    main, compiled = names[0], f"{names[0]}_compiled"
    sets, y = make_sets(case, names, device)
    error = errors(sets[0], y, names)
    calls = {n: [one.call(n) for one in sets] for n in (*names, "unfused", "fused")}
    ready = {name: timer.record(found, device) for name, found in calls.items()}
    start, missing = time.perf_counter(), ""
    try:  # without --compile-seconds it says so at once
        function = compiler(Block.forward)
        of_main = [one.call(main, partial(function, one.variants[main][0])) for one in sets]
        checked_error("wrong", of_main[0](), y, sets[0].variants[main][1], MOST_FLOAT_ERROR)
        ready[compiled] = timer.record(of_main, device)
    except Exception as failure:  # a baseline that cannot run must not hide the others
        missing = first_line(failure)
    compiler.seconds_left -= time.perf_counter() - start
    parts = [Parts(module).calls(x, at) for module, x, at in (s.variants["fused"] for s in sets)]
    ready |= {part: timer.record([p[part] for p in parts], device) for part in PARTS}
    linears = [blocks.float_linears(*one.variants[main]) for one in sets]
    ready["linears"] = timer.record(linears, device)
    timings = timer.measure(ready, device=device, seconds=seconds)
    asked = [compiled] if compiler.mode != "none" else []
    row = row_of(case, timings, [*names, *asked], error["fused"])
    if missing and asked:
        row[f"{compiled}_missing"] = missing
    return row | sample_under_load(ready["fused"], row["us"], sample, device)


def row_of(case: Case, timings: dict[str, timer.Timing], names: Sequence[str], error: float) -> Row:
    """The parts are timed alone; `rest_us` is what the whole takes beyond them, less than 0 where parts overlap."""
    op = timings["fused"]
    row = key_of(case) | runner.timing_columns(op) | {"tops": case.operations / op.us / 1e6}
    row |= {f"{part}_us": timings[part].us for part in PARTS}
    row["rest_us"] = op.us - sum(timings[part].us for part in PARTS)
    row[f"{names[0]}_linears_us"] = timings["linears"].us
    row |= runner.ratio_columns(op.us, {name: timings.get(name) for name in (*names, "unfused")})
    return row | {"error": error}


def line(row: Row) -> str:
    head = f"{row['model']:12s} {row['phase']:7s} batch {row['batch']:2d} M {row['M']:4d} context {row['context']:4d}"
    names = zip(PARTS, ("gemm", "quantize", "attention"), strict=True)
    parts = " + ".join(f"{row[f'{part}_us']:.1f} {name}" for part, name in names)
    return (
        f"{head} | {row['us']:9.1f} us = {parts} + {row['rest_us']:.1f} rest | {row['tops']:6.1f} TOPS | "
        f"{ratios(row, baselines_of([row]))} | error {row['error']:.3f}"
    )


def means(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Geometric means of every ratio, by phase."""
    columns = {name: f"vs_{name}" for name in baselines_of(rows)}
    return group_means(runner.grouped(rows, lambda row: row["phase"]), columns)


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if a block was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device, args.threads)
    sample = gpu.sampler(device)
    compiler = Compiler("default" if args.compile_seconds > 0 else "none", args.compile_seconds)
    places = by_place(args.shapes, args.situations)
    rows = runner.run_cases(
        [Case(args.shapes[i], *args.situations[j]) for i, j in places],
        lambda case: measure(case, device, args.seconds, compiler, sample),
        key=key_of,
        line=line,
        args=args,
        facts=facts,
        summary=lambda rows: {"geomeans": means(rows)},
    )
    for phase, found in means([row for row in rows if "us" in row]).items():
        text = " | ".join(f"{found[n]:.2f}x {n}" for n in found if n != "cases")
        print(f"geomean {phase:7s} {found['cases']:2.0f} cases | {text}")
    return runner.status(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="toy shapes, on a CPU")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME",
        help=f"on a GPU of {', '.join(s.model for s in blocks.GPU_SHAPES)}; on a CPU of "
        f"{', '.join(s.model for s in blocks.CPU_SHAPES)}",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.4, CPU: 4)")
    parser.add_argument(
        "--compile-seconds", type=float, help="for torch.compile of a baseline (GPU: no limit, CPU: 0)"
    )  # fmt: skip
    args = parser.parse_args(arguments)
    runner.check_options(parser, args, toys=args.quick)
    on_gpu = args.device == "cuda"
    here = blocks.GPU_SHAPES if on_gpu else blocks.TOY_SHAPES if args.quick else blocks.CPU_SHAPES
    named = {shape.model: shape for shape in here}
    for name in args.models or ():
        if name not in named:
            parser.error(f"there is no model {name!r} here; the models are: {', '.join(named)}")
    args.shapes = [named[name] for name in args.models or named]
    args.situations = SITUATIONS if on_gpu else TOY_SITUATIONS if args.quick else CPU_SITUATIONS
    if args.seconds is None:
        args.seconds = 0.4 if on_gpu else 0.0 if args.quick else 4.0
    if args.compile_seconds is None:
        args.compile_seconds = math.inf if on_gpu else 0.0
    return args


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(run(parse()))
