"""The producers of int8 activations: as fast as a copy of the same bytes? And against PyTorch, eager and compiled.

    python -m benchmarks.quantize --device cuda [--budget-seconds 200] [--json FILE] [--csv FILE]
    python -m benchmarks.quantize --device cpu [--budget-seconds 200] [--json FILE] [--quick]

A line: microseconds of one call, GB/s (each input read once, each output written once), then how many times as fast as
a copy of as many bytes on the device, the eager chain, and the chain under torch.compile. On a CPU, a producer that
rotates is also compared with itself without the rotation. No wrong result is timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import cpu_isa, cpu_peers, gpu, producers, runner, timer
from benchmarks.lib.cases import sample_under_load
from benchmarks.lib.producers import PRODUCERS, SCHEMES, Case
from benchmarks.lib.runner import Row, WrongResult, baselines_of, first_line, group_means, ratios
from benchmarks.lib.shapes import (
    CPU_HIDDEN_WIDTHS,
    CPU_MLP_WIDTHS,
    CPU_PRODUCER_TOKENS,
    GPU_TOKENS,
    HIDDEN_WIDTHS,
    MLP_WIDTHS,
    REHEARSAL_TOKENS,
    REHEARSAL_WIDTHS,
)
from smoothquant_kernels.ops import checks
from smoothquant_kernels.reference import MAX_ROTATION

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BASELINES = ("copy", "eager", "compiled")
#: A line's columns that identify its case.
KEYS = ("producer", "smooth", "scheme", "dtype", "M", "K", "rotation")


@dataclass
class Compiler:
    """torch.compile within a limit: it takes seconds for each shape, while the GPU waits."""

    mode: str  # "none", or one of torch.compile's
    seconds_left: float

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.mode == "none":
            raise RuntimeError("not asked for (--compile none)")
        if self.seconds_left <= 0:
            raise RuntimeError("the time for compiling (--compile-seconds) is spent")
        # One function serves all cases: without a reset dynamo would meet its limit of recompilations.
        torch.compiler.reset()
        return torch.compile(function, mode=self.mode, fullgraph=True, dynamic=False)


def cases_of(
    names: Sequence[str],
    tokens: Sequence[int],
    hidden: Sequence[int],
    mlp: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16),
    rotations: Sequence[int] = (0,),
) -> list[Case]:
    """All combinations, the most telling first; each axis is given most important first.

    A width that a group of `rotations` does not divide is left out.
    A case's rank is the sum of its places: first the main cases of all producers, then those one step off, and so on.
    """
    ranked = []
    for order, name in enumerate(names):
        widths = mlp if PRODUCERS[name].mlp else hidden
        axes: tuple[Sequence[Any], ...]
        axes = (tokens, widths, SCHEMES, dtypes, (False, True), rotations)
        places = itertools.product(*(range(len(axis)) for axis in axes))
        # of one rank, those that differ in M come first
        best_first = sorted(places, key=lambda p: (sum(p), [-place for place in p]))
        for turn, place in enumerate(best_first):  # the producers take turns
            m, k, scheme, dtype, smooth, rotation = (
                axis[i] for axis, i in zip(axes, place, strict=True)
            )
            if rotation and k % rotation:
                continue
            case = Case(name, smooth, scheme, dtype, m, k, rotation)
            ranked.append((sum(place), turn, order, case))
    return [item[-1] for item in sorted(ranked, key=lambda item: item[:3])]


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    compiler: Compiler,
    sample: gpu.Sampler = dict,
) -> Row:
    """Checks, then times one case; `WrongResult` if the op is wrong."""
    moved = producers.bytes_moved(case)
    generator = torch.Generator(device).manual_seed(case.m * 1_000_003 + case.k)
    count = timer.input_sets(moved, device)
    sets = [producers.make_inputs(case, generator) for _ in range(count)]
    scale = producers.static_scale(case, sets[0])
    # Most likely the block that the op gets: no kernel writes -128, so what is left unwritten shows.
    torch.full((case.m, case.k), -128, dtype=torch.int8, device=device)
    actual = producers.run_op(case, sets[0], scale)
    expected = producers.run_reference(case, sets[0], scale)
    if wrong := producers.wrong_op(case, actual, expected):
        raise WrongResult(wrong)

    def chain(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return producers.run_eager(case, inputs, scale)

    def record(function: Callable[[dict[str, Tensor]], object]) -> timer.Recorded:
        return timer.record([lambda inputs=inputs: function(inputs) for inputs in sets], device)

    ready = {"op": record(lambda inputs: producers.run_op(case, inputs, scale))}
    ready["copy"] = timer.record(copies(moved, len(sets), device), device)
    if case.rotation and device.type == "cpu":  # a GPU's time goes to cases of their own
        plain = replace(case, rotation=0)
        ready["unrotated"] = record(lambda inputs: producers.run_op(plain, inputs, scale))
    reasons = {}
    for name in ("eager", "compiled"):
        start = time.perf_counter()
        try:
            function = chain if name == "eager" else compiler(chain)
            if wrong := producers.wrong_baseline(function(sets[0]), expected):
                raise WrongResult(wrong)
            ready[name] = record(function)
        except Exception as error:  # a baseline that cannot run must not hide the others
            reasons[name] = first_line(error)
        if name == "compiled":
            compiler.seconds_left -= time.perf_counter() - start
    del actual, expected
    timings = timer.measure(ready, device=device, seconds=seconds)
    row = row_of(case, moved, timings, reasons)
    return row | sample_under_load(ready["op"], row["us"], sample, device)


def copies(moved: int, count: int, device: torch.device) -> list[timer.Call]:
    """`count` copies of different buffers, each reading and writing `moved` bytes in all."""
    made: list[timer.Call] = []
    for _ in range(count):
        source = torch.randint(-128, 128, (moved // 2,), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        made.append(lambda source=source, target=target: target.copy_(source))
    return made


def key_of(case: Case) -> Row:
    dtype = str(case.dtype).removeprefix("torch.")
    values = (case.producer, case.smooth, case.scheme, dtype, case.m, case.k, case.rotation)
    return dict(zip(KEYS, values, strict=True))


def row_of(
    case: Case, moved: int, timings: dict[str, timer.Timing], reasons: dict[str, str] | None = None
) -> Row:
    """A line of the results: ratios are those of the medians, GB/s = bytes / us / 1000."""
    op = timings["op"]
    row = key_of(case) | {"bytes": moved, **runner.timing_columns(op)}
    row |= {"gb_per_s": moved / op.us / 1e3}
    names = [*BASELINES, *(["unrotated"] if "unrotated" in timings else [])]
    row |= runner.ratio_columns(op.us, {name: timings.get(name) for name in names})
    return row | {f"{name}_missing": reason for name, reason in (reasons or {}).items()}


def line(row: Row) -> str:
    name, smooth, scheme, dtype, m, k, rotation = (row[key] for key in KEYS)
    case = Case(name, smooth, scheme, getattr(torch, dtype), m, k, rotation)
    return f"{case!s:76s} | {row['us']:8.2f} us | {row['gb_per_s']:7.1f} GB/s | {ratios(row, baselines_of([row]))}"


def geomeans(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per producer and over all; a baseline counts where it was measured."""
    groups = {name: [r for r in rows if r["producer"] == name] for name in PRODUCERS}
    columns = {baseline: f"vs_{baseline}" for baseline in baselines_of(rows)}
    return group_means(groups | {"all": list(rows)}, columns)


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if an op was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device, args.threads)
    if device.type == "cpu":
        facts |= cpu_isa.facts() | {"int8_mode": cpu_peers.level_of_int8()}
    sample, compiler = gpu.sampler(device), Compiler(args.compile, args.compile_seconds)
    chosen = cases_of(
        args.producers, args.tokens, args.hidden, args.mlp, args.dtypes, args.rotation
    )
    rows = runner.run_cases(
        chosen[: 2 * len(args.producers)] if args.quick else chosen,
        lambda case: measure(case, device, args.seconds, compiler, sample),
        key=key_of,
        line=line,
        args=args,
        facts=facts,
        summary=lambda rows: {"geomeans": geomeans(rows)},
    )
    for name, means in geomeans([r for r in rows if "us" in r]).items():
        found = " | ".join(f"{means[b]:.2f}x {b}" for b in means if b != "cases")
        print(f"geomean {name:30s} {means['cases']:4.0f} cases | {found}")
    for reason, count in Counter(row.get("compiled_missing") for row in rows).items():
        if reason:
            print(f"not compiled in {count} cases: {reason}")
    return runner.status(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two cases of each producer, on toy shapes"
    )
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--producers", nargs="+", choices=list(PRODUCERS), default=list(PRODUCERS), metavar="NAME",
        help=", ".join(PRODUCERS),
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", help="M, the most important first")
    parser.add_argument("--widths", type=int, nargs="+", help="K, the most important first")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), help="GPU, and toys: fp16 bf16; CPU: fp32"
    )
    parser.add_argument(
        "--rotation", type=int, nargs="+", metavar="G",
        help="channels per rotated group, where they divide K, 0 for none (GPU: 0 256, CPU: 256 64 0)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.3, CPU: 0.05)")
    parser.add_argument(
        "--compile", choices=["none", "default", "max-autotune-no-cudagraphs"],
        help="how to compile the chain (GPU: max-autotune-no-cudagraphs, CPU: none)",
    )  # fmt: skip
    parser.add_argument("--compile-seconds", type=float, default=math.inf, help="for all compiling")
    args = parser.parse_args(arguments)
    on_gpu = args.device == "cuda"
    dtypes, rotations = ["fp16", "bf16"], [0, 256]
    sizes: tuple[Sequence[int], ...] = (GPU_TOKENS, HIDDEN_WIDTHS, MLP_WIDTHS)
    if not on_gpu and args.quick:
        sizes = (REHEARSAL_TOKENS, REHEARSAL_WIDTHS, REHEARSAL_WIDTHS)
    elif not on_gpu:
        sizes = (CPU_PRODUCER_TOKENS, CPU_HIDDEN_WIDTHS, CPU_MLP_WIDTHS)
        dtypes, rotations = ["fp32"], [256, 64, 0]
    tokens, hidden, mlp = sizes
    args.dtypes = [DTYPES[name] for name in args.dtypes or dtypes]
    args.rotation = args.rotation if args.rotation is not None else rotations
    args.tokens = args.tokens or tokens
    args.hidden = args.widths or hidden
    args.mlp = args.widths or mlp
    args.seconds = args.seconds if args.seconds is not None else (0.3 if on_gpu else 0.05)
    args.compile = args.compile or ("max-autotune-no-cudagraphs" if on_gpu else "none")
    if wrong := [group for group in args.rotation if not checks.fits_rotation(group, MAX_ROTATION)]:
        parser.error(f"--rotation: 0 or a power of two from 2 to {MAX_ROTATION}, not {wrong[0]}")
    runner.check_options(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(run(parse()))
