"""The producers of int8 activations: as fast as a copy of the same bytes? And against PyTorch, eager and compiled.

    python benchmarks/bench_quantize.py --device cuda [--budget-seconds 200] [--json FILE] [--csv FILE]

Each line: microseconds of one call, GB/s, then how many times as fast as (1) a device-to-device copy that reads and
writes as many bytes in all, (2) the eager chain, (3) the chain under torch.compile. More is better, everywhere. Bytes:
each input read once, each output written once. A result that is not the specification's is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gemm_cases
import gpu_state
import gpu_timer
import producers
import runner
import torch
from producers import PRODUCERS, SCHEMES, Case
from report import Row, WrongResult, first_line, group_means, ratio_columns, ratios, timing_columns
from shapes import GPU_TOKENS, HIDDEN_WIDTHS, MLP_WIDTHS, REHEARSAL_TOKENS, REHEARSAL_WIDTHS
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
BASELINES = ("copy", "eager", "compiled")


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


def cases(
    names: Sequence[str],
    tokens: Sequence[int],
    hidden: Sequence[int],
    mlp: Sequence[int],
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Case]:
    """All combinations, the most telling first.

    Each axis is given most important first. A case's rank is the sum of its places, so first come the main cases of
    all producers, then those that differ from them in one step of one axis, and so on.
    """
    ranked = []
    for order, name in enumerate(names):
        widths = mlp if PRODUCERS[name].mlp else hidden
        axes: tuple[Sequence[Any], ...] = (tokens, widths, SCHEMES, dtypes, (False, True))
        places = itertools.product(*(range(len(axis)) for axis in axes))
        # of one rank, those that differ in M come first
        best_first = sorted(places, key=lambda p: (sum(p), [-place for place in p]))
        for turn, place in enumerate(best_first):  # the producers take turns
            m, k, scheme, dtype, smooth = (axis[i] for axis, i in zip(axes, place, strict=True))
            ranked.append((sum(place), turn, order, Case(name, smooth, scheme, dtype, m, k)))
    return [item[-1] for item in sorted(ranked, key=lambda item: item[:3])]


def measure(
    case: Case,
    device: torch.device,
    seconds: float,
    compiler: Compiler,
    sample: gpu_state.Sampler = dict,
) -> Row:
    """Checks, then times one case; `WrongResult` where the op is wrong."""
    moved = producers.bytes_moved(case)
    generator = torch.Generator(device).manual_seed(case.m * 1_000_003 + case.k)
    sets = [
        producers.make_inputs(case, generator) for _ in range(gpu_timer.input_sets(moved, device))
    ]
    scale = producers.static_scale(case, sets[0])
    poison = torch.full((case.m, case.k), -128, dtype=torch.int8, device=device)
    del poison  # most likely the block that the op gets: no kernel writes -128, so what is left unwritten shows
    actual = producers.run_op(case, sets[0], scale)
    expected = producers.run_reference(case, sets[0], scale)
    if wrong := producers.wrong_op(case, actual, expected):
        raise WrongResult(wrong)

    def chain(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return producers.run_eager(case, inputs, scale)

    def record(function: Callable[[dict[str, Tensor]], object]) -> gpu_timer.Recorded:
        calls = [lambda inputs=inputs: function(inputs) for inputs in sets]
        return gpu_timer.record(calls, device)

    ready = {"op": record(lambda inputs: producers.run_op(case, inputs, scale))}
    ready["copy"] = gpu_timer.record(copies(moved, len(sets), device), device)
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
    timings = gpu_timer.measure(ready, device=device, seconds=seconds)
    row = row_of(case, moved, timings, reasons)
    return row | gemm_cases.sample_under_load(ready["op"], row["us"], sample, device)


def copies(moved: int, count: int, device: torch.device) -> list[gpu_timer.Call]:
    """`count` copies of different buffers that read and write `moved` bytes in all, each."""
    made: list[gpu_timer.Call] = []
    for _ in range(count):
        source = torch.randint(-128, 128, (moved // 2,), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        made.append(lambda source=source, target=target: target.copy_(source))
    return made


def describe(case: Case) -> Row:
    return {
        "producer": case.producer,
        "smooth": case.smooth,
        "scheme": case.scheme,
        "dtype": str(case.dtype).removeprefix("torch."),
        "M": case.m,
        "K": case.k,
    }


def row_of(
    case: Case,
    moved: int,
    timings: dict[str, gpu_timer.Timing],
    reasons: dict[str, str] | None = None,
) -> Row:
    """A line of the results: ratios are those of the medians, GB/s = bytes / us / 1000."""
    op = timings["op"]
    row = describe(case) | {"bytes": moved, **timing_columns(op), "gb_per_s": moved / op.us / 1e3}
    row |= ratio_columns(op.us, {name: timings.get(name) for name in BASELINES})
    return row | {f"{name}_missing": reason for name, reason in (reasons or {}).items()}


def line(row: Row) -> str:
    dtype = getattr(torch, row["dtype"])
    case = Case(row["producer"], row["smooth"], row["scheme"], dtype, row["M"], row["K"])
    return f"{case!s:66s} | {row['us']:8.2f} us | {row['gb_per_s']:7.1f} GB/s | {ratios(row, BASELINES)}"


def geomeans(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per producer and over all; a baseline counts where it was measured."""
    groups = {name: [r for r in rows if r["producer"] == name] for name in PRODUCERS}
    groups["all"] = list(rows)
    return group_means(groups, {baseline: f"vs_{baseline}" for baseline in BASELINES})


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 where an op was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device)
    sample = gpu_state.sampler(device)
    compiler = Compiler(args.compile, args.compile_seconds)
    chosen = cases(args.producers, args.tokens, args.hidden, args.mlp, args.dtypes)
    if args.quick:
        chosen = chosen[: 2 * len(args.producers)]
    rows = runner.run_cases(
        chosen,
        lambda case: measure(case, device, args.seconds, compiler, sample),
        key=describe,
        line=line,
        args=args,
        facts=facts,
        summary=lambda rows: {"geomeans": geomeans(rows)},
    )
    report(rows)
    return runner.status(rows)


def report(rows: Sequence[Row]) -> None:
    """The end of the printed table."""
    for name, means in geomeans([r for r in rows if "us" in r]).items():
        found = " | ".join(f"{means[b]:.2f}x {b}" for b in BASELINES if b in means)
        print(f"geomean {name:30s} {means['cases']:4.0f} cases | {found}")
    for reason, count in Counter(row.get("compiled_missing") for row in rows).items():
        if reason:
            print(f"not compiled in {count} cases: {reason}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="two cases of each producer")
    parser.add_argument(
        "--producers", nargs="+", choices=list(PRODUCERS), default=list(PRODUCERS), metavar="NAME",
        help=", ".join(PRODUCERS),
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", help="M, the most important first")
    parser.add_argument("--widths", type=int, nargs="+", help="K, the most important first")
    parser.add_argument("--dtypes", nargs="+", choices=["fp16", "bf16"], default=["fp16", "bf16"])
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.3, CPU: 0.05)")
    parser.add_argument(
        "--compile", choices=["none", "default", "max-autotune-no-cudagraphs"],
        help="how to compile the chain (GPU: max-autotune-no-cudagraphs, CPU: none)",
    )  # fmt: skip
    parser.add_argument("--compile-seconds", type=float, default=math.inf, help="for all compiling")
    runner.add_options(parser)
    args = parser.parse_args(arguments)
    gpu = args.device == "cuda"
    args.dtypes = [torch.float16 if name == "fp16" else torch.bfloat16 for name in args.dtypes]
    args.tokens = args.tokens or (GPU_TOKENS if gpu else REHEARSAL_TOKENS)
    args.hidden = args.widths or (HIDDEN_WIDTHS if gpu else REHEARSAL_WIDTHS)
    args.mlp = args.widths or (MLP_WIDTHS if gpu else REHEARSAL_WIDTHS)
    args.seconds = args.seconds if args.seconds is not None else (0.3 if gpu else 0.05)
    args.compile = args.compile or ("max-autotune-no-cudagraphs" if gpu else "none")
    runner.check_options(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(run(parse()))
