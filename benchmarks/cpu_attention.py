"""Attention of one token to an int8 cache on one thread of a CPU, against PyTorch's on float keys and values.

    python -m benchmarks.cpu_attention [--seconds 2] [--json FILE]

A line: microseconds of one call, then how many times as fast as PyTorch's `scaled_dot_product_attention` on float32 and
on bfloat16 keys and values (`enable_gqa`), as the same where the query heads of a kv head are tokens (`folded`,
float32), and as this package without compiled kernels (`plain`). All are called in turns. SMOOTHQUANT_KERNELS_CPU
chooses the instructions of the compiled kernels, and ATEN_CPU_CAPABILITY those of PyTorch. No wrong result is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib import runner, timer
from benchmarks.lib.caches import Case, Heads, make_inputs, plain, wrong_attention
from benchmarks.lib.runner import Row, WrongResult, baselines_of, ratios
from smoothquant_kernels import ops
from smoothquant_kernels.backends import attention, cpu_native

HEADS = (Heads("SmolLM2-135M", 9, 3, 64), Heads("Llama 3 8B", 32, 8, 128))
CONTEXTS = (4096, 1024, 16384)
BASELINES = ("float32", "bfloat16", "folded", "plain")
#: Of the largest |v|: roundings of float32.
ALLOWED = 2.0**-13


def floats_of(case: Case, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    k, v = (plain(inputs[f"{half}_cache"], inputs[f"{half}_scale"], case) for half in ("k", "v"))
    return k.contiguous(), v.contiguous()


def calls(case: Case, inputs: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """The op and what it is compared with, on the same keys and values."""
    k, v = floats_of(case, inputs)
    q, group = inputs["q"], case.heads.query // case.heads.kv
    halves = [t.bfloat16() for t in (q, k, v)]
    rows = q.reshape(1, case.heads.kv, group, case.heads.dim)
    arguments = [inputs[n] for n in ("q", "k_cache", "v_cache", "scale", "k_scale", "v_scale")]
    more = (inputs["lengths"], None, None, None, None, inputs["rotation"], 0, False)
    sdpa = F.scaled_dot_product_attention
    return {
        "op": lambda: ops.decode_attention_s8(**inputs),
        "float32": lambda: sdpa(q, k, v, enable_gqa=True),
        "bfloat16": lambda: sdpa(*halves, enable_gqa=True),
        "folded": lambda: sdpa(rows, k, v),
        "plain": lambda: attention.decode_attention_s8(*arguments, *more),
    }


def measure(case: Case, seconds: float) -> Row:
    """Checks, then times one case; `WrongResult` if the op is wrong."""
    device = torch.device("cpu")
    g = torch.Generator().manual_seed(case.context)
    sets = [make_inputs(case, g) for _ in range(timer.input_sets(case.kept, device))]
    for one in sets:
        one["q"] = one["q"].float().contiguous()
    pairs = [(0, head) for head in range(case.heads.kv)]
    made = [calls(case, one) for one in sets]
    if wrong := wrong_attention(case, sets[0], made[0]["op"](), pairs, ALLOWED):
        raise WrongResult(wrong)
    ready = {name: timer.record([one[name] for one in made], device) for name in made[0]}
    timings = timer.measure(ready, device=device, seconds=seconds)
    us = timings["op"].us
    row = key_of(case) | {"bytes": case.kept, **runner.timing_columns(timings["op"])}
    row |= {"gb_per_s": case.kept / us / 1e3}
    return row | runner.ratio_columns(us, {name: timings[name] for name in BASELINES})


def key_of(case: Case) -> Row:
    return {"model": case.heads.model, "context": case.context}


def line(row: Row) -> str:
    measured = f"{row['us']:9.1f} us | {row['gb_per_s']:5.1f} GB/s"
    return f"{row['model']:13s} context {row['context']:6d} | {measured} | {ratios(row, baselines_of([row]))}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__, "cpu")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--seconds", type=float, default=2.0, help="to measure per case")
    args = parser.parse_args(arguments)
    if args.device != "cpu":
        parser.error("this is about CPUs; benchmarks.attention measures on a GPU")
    runner.check_options(parser, args)
    return args


def run(args: argparse.Namespace) -> int:
    facts = runner.machine_facts(torch.device("cpu"), 1) | {"level": cpu_native.level()}
    cases = [Case("decode_attention_s8", h, 1, 1, n) for n in args.contexts for h in HEADS]
    rows = runner.run_cases(
        cases, lambda case: measure(case, args.seconds), key=key_of, line=line, args=args, facts=facts
    )  # fmt: skip
    return runner.status(rows)


if __name__ == "__main__":
    sys.exit(run(parse()))
