"""The int8 cache of keys and values: attention to it against float16 flash decoding, its writer against a copy.

    python -m benchmarks.attention --device cuda [--budget-seconds 60] [--json FILE] [--csv FILE]
    python -m benchmarks.attention --device cpu                       # a rehearsal, on toy shapes

A line: microseconds of one call, GB/s (everything read once and written once), then how many times as fast as a copy of
as many bytes, the float16 baselines, and the fastest of these (`float16`). The baselines of `decode_attention_s8` are
PyTorch's: `sdpa` as it chooses, `flash` and `cudnn` by name, and `folded`, in which the query heads of a kv head are
tokens; their keys and values are contiguous, also where the int8 cache is paged. The baseline of `kv_append` is the
rotary embedding with two copies by index. No wrong result is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.lib import caches, cases, gpu, runner, timer
from benchmarks.lib.caches import APPEND, ATTENTION, Case
from benchmarks.lib.runner import Row, WrongResult, baselines_of, first_line, group_means, ratios
from benchmarks.quantize import copies

#: A line's columns that identify its case.
KEYS = ("op", "model", "batch", "T", "context", "page")
#: Share of the GPU's memory that the inputs of a case may take.
MEMORY_SHARE = 0.6


def fits(case: Case, device: torch.device) -> bool:
    """Whether the inputs fit into memory, with at least two sets of them."""
    if device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(device).total_memory
    return 2 * case.memory <= MEMORY_SHARE * total


def sets_of(case: Case, device: torch.device) -> int:
    """How many input sets to rotate through: more than L2 holds, as far as memory allows."""
    wanted = timer.input_sets(case.bytes, device)
    if device.type != "cuda":
        return wanted
    total = torch.cuda.get_device_properties(device).total_memory
    return max(2, min(wanted, int(MEMORY_SHARE * total / case.memory)))


def measure(case: Case, device: torch.device, seconds: float, sample: gpu.Sampler = dict) -> Row:
    """Checks, then times one case; `WrongResult` if the op is wrong."""
    cases.has_cuda_ops(device)  # in the simulator it binds the ops
    seed = case.batch * 1_000_003 + case.context * 1_009 + case.tokens
    g = torch.Generator(device).manual_seed(seed)
    sets = [caches.make_inputs(case, g) for _ in range(sets_of(case, device))]
    ready: dict[str, timer.Recorded] = {}
    reasons: dict[str, str] = {}

    def record(function: Callable[..., object], arguments: Sequence[Any]) -> timer.Recorded:
        return timer.record([lambda a=a: function(*a) for a in arguments], device)

    prepare = prepare_attention if case.op == ATTENTION else prepare_append
    baselines = prepare(case, sets, g)
    ready["op"] = record(lambda inputs: caches.run_op(case, inputs), [(one,) for one in sets])
    ready["copy"] = timer.record(copies(case.bytes, len(sets), device), device)
    for name, (function, arguments, check) in baselines.items():
        try:
            if wrong := check():
                raise WrongResult(wrong)
            ready[name] = record(function, arguments)
        except Exception as error:  # a baseline that cannot run must not hide the others
            reasons[name] = first_line(error)
    timings = timer.measure(ready, device=device, seconds=seconds)
    row = row_of(case, timings, list(baselines), reasons)
    return row | cases.sample_under_load(ready["op"], row["us"], sample, device)


#: A baseline: a function, its arguments for each set of inputs, and a check that returns what is wrong.
Baselines = dict[str, tuple[Callable[..., object], Sequence[Any], Callable[[], str]]]


def prepare_attention(case: Case, sets: list[caches.Inputs], g: torch.Generator) -> Baselines:
    """Checks the op, then makes the baselines' keys and values."""
    pairs = caches.sampled(case, g)
    y = caches.run_op(case, sets[0])
    if wrong := caches.wrong_attention(case, sets[0], y, pairs, caches.ALLOWED):
        raise WrongResult(wrong)
    arguments = [(one["q"], *caches.float_cache(case, one)) for one in sets]

    def check(function: Callable[..., Any]) -> str:
        found = function(*arguments[0])
        return caches.wrong_attention(case, sets[0], found, pairs, caches.BASELINE_ALLOWED)

    return {
        name: (function, arguments, lambda function=function: check(function))
        for name, function in caches.attention_baselines(case).items()
    }


def prepare_append(case: Case, sets: list[caches.Inputs], g: torch.Generator) -> Baselines:
    if wrong := caches.wrong_append(sets[0]):
        raise WrongResult(wrong)
    h, device = case.heads, g.device
    shape = (case.batch, h.kv, case.context, h.dim)
    where = torch.arange(case.context - case.tokens, case.context, device=device)
    arguments = [
        (one, *(torch.zeros(shape, dtype=caches.DTYPE, device=device) for _ in range(2)), where)
        for one in sets
    ]
    return {"float16": (caches.float_append, arguments, str)}


def key_of(case: Case) -> Row:
    values = (case.op, case.heads.model, case.batch, case.tokens, case.context, case.page)
    return dict(zip(KEYS, values, strict=True))


def row_of(
    case: Case, timings: dict[str, timer.Timing], baselines: Sequence[str], reasons: dict[str, str]
) -> Row:
    """A line of the results: ratios are those of the medians, GB/s = bytes / us / 1000."""
    op = timings["op"]
    row = key_of(case) | {"bytes": case.bytes, **runner.timing_columns(op)}
    row |= {"gb_per_s": case.bytes / op.us / 1e3}
    row |= runner.ratio_columns(op.us, {name: timings.get(name) for name in ("copy", *baselines)})
    if "float16" not in baselines:
        best = min(
            (timings[n] for n in baselines if n in timings), key=lambda t: t.us, default=None
        )
        row |= runner.ratio_columns(op.us, {"float16": best})
    return row | {f"{name}_missing": reason for name, reason in reasons.items()}


def line(row: Row) -> str:
    paged = f" page {row['page']}" if row["page"] else ""
    name = (
        f"{row['op']} {row['model']} B {row['batch']} T {row['T']} context {row['context']}{paged}"
    )
    measured = f"{row['us']:9.2f} us | {row['gb_per_s']:7.1f} GB/s"
    return f"{name:78s} | {measured} | {ratios(row, baselines_of([row]))}"


def geomeans(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Per op; a baseline counts where it was measured."""
    groups = {name: [r for r in rows if r["op"] == name] for name in (ATTENTION, APPEND)}
    return group_means(groups, {name: f"vs_{name}" for name in baselines_of(rows)})


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if an op was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device, 1)
    sample = gpu.sampler(device)
    sizes = (args.heads, args.contexts, args.batches, args.new)
    wanted = caches.cases_of(args.ops, *sizes)
    chosen = [case for case in wanted if fits(case, device)]
    if left := len(wanted) - len(chosen):
        print(f"{left} cases are too large for this GPU's memory")
    rows = runner.run_cases(
        chosen, lambda case: measure(case, device, args.seconds, sample),
        key=key_of, line=line, args=args, facts=facts,
        summary=lambda rows: {"geomeans": geomeans(rows)},
    )  # fmt: skip
    for name, means in geomeans([r for r in rows if "us" in r]).items():
        found = " | ".join(f"{means[b]:.2f}x {b}" for b in means if b != "cases")
        print(f"geomean {name:20s} {means['cases']:4.0f} cases | {found}")
    return runner.status(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    both = [ATTENTION, APPEND]
    parser.add_argument("--ops", nargs="+", choices=both, default=both)
    parser.add_argument("--contexts", type=int, nargs="+", help="the most important first")
    parser.add_argument("--batches", type=int, nargs="+", help="of attention")
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.3)")
    args = parser.parse_args(arguments)
    on_gpu = args.device == "cuda"
    args.heads = caches.HEADS if on_gpu else caches.TOY_HEADS
    args.contexts = args.contexts or (caches.CONTEXTS if on_gpu else caches.TOY_CONTEXTS)
    args.batches = args.batches or (caches.BATCHES if on_gpu else caches.TOY_BATCHES)
    args.new = caches.NEW if on_gpu else caches.TOY_NEW
    args.seconds = args.seconds if args.seconds is not None else (0.3 if on_gpu else 0.02)
    runner.check_options(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(run(parse()))
