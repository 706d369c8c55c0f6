"""The GEMMs of a mixture of experts in one call, against a GEMM for each expert and PyTorch's grouped GEMM in bfloat16.

    python -m benchmarks.experts --device cuda [--budget-seconds 60] [--json FILE] [--csv FILE]
    python -m benchmarks.experts --device cpu                         # a rehearsal, on toy shapes

A line: microseconds of one call, TOPS, GB/s (the weights of the experts that have rows, read once), then how many times
as fast as each baseline. `loop` calls `gemm_s8` for each expert that has rows, and knows their numbers beforehand,
which a model does not; `bf16` is `torch.nn.functional.grouped_mm`. The op gathers the rows of x itself; the baselines
get them sorted. The routing is random. No wrong result is timed: the op must have the bits of the loop.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.lib import cases, gpu, runner, timer
from benchmarks.lib.runner import Row, WrongResult, baselines_of, first_line, geomeans, ratios
from smoothquant_kernels import ops, reference

BASELINES = ("loop", "bf16")
DTYPE = torch.bfloat16
#: The largest difference of the bfloat16 baseline, as a share of the largest result: it rounds both operands to 8 bits.
ALLOWED = 0.02
#: Share of the GPU's memory that the inputs of a case may take.
MEMORY_SHARE = 0.6


class Layer(NamedTuple):
    """One GEMM of each expert of a model."""

    name: str
    experts: int
    choices: int  # of each token
    n: int
    k: int


LAYERS = (
    Layer("Qwen3-30B-A3B gate_up", 128, 8, 2 * 768, 2048),
    Layer("Mixtral-8x7B gate_up", 8, 2, 2 * 14336, 4096),
    Layer("Qwen3-30B-A3B down", 128, 8, 2048, 768),
    Layer("Mixtral-8x7B down", 8, 2, 4096, 14336),
)
TOY_LAYERS = (Layer("toy gate_up", 4, 2, 48, 64), Layer("toy down", 9, 3, 33, 40))
TOKENS, TOY_TOKENS = (1, 1024, 16, 8192, 128), (1, 13)


@dataclass(frozen=True)
class Case:
    layer: Layer
    tokens: int

    @property
    def m(self) -> int:
        return self.tokens * self.layer.choices

    @property
    def memory(self) -> int:
        """Bytes of a set of inputs, with those of the baselines."""
        _, experts, _, n, k = self.layer
        return 3 * experts * n * k + self.m * (3 * k + 2 * n)


class Inputs(NamedTuple):
    x_q: Tensor
    w_q: Tensor
    x_scale: Tensor
    w_scale: Tensor
    offsets: Tensor
    rows: Tensor
    bounds: list[int]  # of the experts, on the host
    x_sorted: Tensor
    x_float: Tensor
    w_float: Tensor  # [experts, k, n], each expert column by column


def cases_of(layers: Sequence[Layer], tokens: Sequence[int]) -> list[Case]:
    """The first of both lists first."""
    return [Case(layer, m) for m in tokens for layer in layers]


def make_inputs(case: Case, g: torch.Generator) -> Inputs:
    _, experts, choices, n, k = case.layer
    device = g.device

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=g, device=device, dtype=torch.int8)

    def scales(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=g, device=device) + 0.5) / 127

    score = torch.rand(case.tokens, experts, generator=g, device=device)
    order, _, offsets = reference.sort_by_expert(score.topk(choices).indices, experts)
    rows = order // choices
    x_q, w_q = integers(case.tokens, k), integers(experts, n, k)
    x_scale, w_scale = scales(case.m), scales(experts, n)
    x_sorted = x_q[rows.long()]
    w_float = torch.empty(experts, n, k, dtype=DTYPE, device=device)
    for e in range(experts):  # one by one: float32 weights of all may not fit
        w_float[e] = w_q[e].float() * w_scale[e, :, None]
    x_float = (x_sorted.float() * x_scale[:, None]).to(DTYPE)
    return Inputs(
        *(x_q, w_q, x_scale, w_scale, offsets, rows, offsets.tolist()),
        x_sorted, x_float, w_float.transpose(1, 2),
    )  # fmt: skip


def grouped(a: Inputs) -> Tensor:
    y: Tensor = ops.grouped_gemm_s8(
        *(a.x_q, a.w_q, a.x_scale, a.w_scale, a.offsets), rows=a.rows, out_dtype=DTYPE
    )
    return y


def loop(a: Inputs) -> list[Tensor]:
    return [
        ops.gemm_s8(
            a.x_sorted[first:last], a.w_q[e], a.x_scale[first:last], a.w_scale[e], out_dtype=DTYPE
        )
        for e, (first, last) in enumerate(itertools.pairwise(a.bounds))
        if last > first
    ]


def bf16(a: Inputs) -> Tensor:
    return functional.grouped_mm(a.x_float, a.w_float, offs=a.offsets[1:], out_dtype=DTYPE)


def check(a: Inputs) -> None:
    """Raises `WrongResult` unless the op has the bits of the loop."""
    found, right = grouped(a), torch.cat(loop(a))
    if not torch.equal(found.view(torch.int16), right.view(torch.int16)):
        wrong = int((found.view(torch.int16) != right.view(torch.int16)).sum())
        raise WrongResult(f"{wrong} of {right.numel()} elements differ from gemm_s8's")


def check_bf16(a: Inputs) -> None:
    right = grouped(a).float()
    difference = float((bf16(a).float() - right).abs().max() / right.abs().max())
    if not difference <= ALLOWED:
        raise WrongResult(f"differs by {difference:.3f} of the largest result")


def fits(case: Case, device: torch.device) -> bool:
    """Whether the inputs fit into memory, with at least two sets of them."""
    if device.type != "cuda":
        return True
    total = torch.cuda.get_device_properties(device).total_memory
    return 2 * case.memory <= MEMORY_SHARE * total


def measure(case: Case, device: torch.device, seconds: float, sample: gpu.Sampler = dict) -> Row:
    """Checks, then times one case; `WrongResult` if the op is wrong."""
    cases.has_cuda_ops(device)  # in the simulator it binds the ops
    g = torch.Generator(device).manual_seed(case.m * 1_000_003 + case.layer.n)
    count = timer.input_sets(case.layer.experts * case.layer.n * case.layer.k, device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        count = max(2, min(count, int(MEMORY_SHARE * total / case.memory)))
    sets = [make_inputs(case, g) for _ in range(count)]
    check(sets[0])

    def record(function: Any) -> timer.Recorded:
        return timer.record([lambda a=a: function(a) for a in sets], device)

    ready, reasons = {"op": record(grouped), "loop": record(loop)}, {}
    try:
        check_bf16(sets[0])
        ready["bf16"] = record(bf16)
    except Exception as error:  # a baseline that cannot run must not hide the others
        reasons["bf16_missing"] = first_line(error)
    timings = timer.measure(ready, device=device, seconds=seconds)
    op, (_, _, _, n, k) = timings["op"], case.layer
    busy = sum(last > first for first, last in itertools.pairwise(sets[0].bounds))
    row = key_of(case) | runner.timing_columns(op) | {"busy": busy}
    row |= {"tops": 2e-6 * case.m * n * k / op.us, "gb_per_s": busy * n * k / op.us / 1e3}
    row |= runner.ratio_columns(op.us, {name: timings.get(name) for name in BASELINES}) | reasons
    return row | cases.sample_under_load(ready["op"], row["us"], sample, device)


def key_of(case: Case) -> Row:
    return {"layer": case.layer.name, "M": case.tokens, "N": case.layer.n, "K": case.layer.k}


def line(row: Row) -> str:
    name = f"{row['layer']} tokens {row['M']} ({row['busy']} experts)"
    measured = f"{row['us']:9.2f} us | {row['tops']:7.1f} TOPS | {row['gb_per_s']:7.1f} GB/s"
    return f"{name:52s} | {measured} | {ratios(row, baselines_of([row]))}"


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if the op was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device, 1)
    sample = gpu.sampler(device)
    on_gpu = device.type == "cuda"
    tokens = args.tokens or (TOKENS if on_gpu else TOY_TOKENS)
    wanted = cases_of(LAYERS if on_gpu else TOY_LAYERS, tokens)
    chosen = [case for case in wanted if fits(case, device)]
    if left := len(wanted) - len(chosen):
        print(f"{left} cases are too large for this GPU's memory")
    columns = [f"vs_{name}" for name in BASELINES]
    rows = runner.run_cases(
        chosen, lambda case: measure(case, device, args.seconds, sample),
        key=key_of, line=line, args=args, facts=facts,
        summary=lambda rows: {"geomeans": geomeans(rows, columns)},
    )  # fmt: skip
    return runner.status(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="the most important first")
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 0.3)")
    args = parser.parse_args(arguments)
    if args.seconds is None:
        args.seconds = 0.3 if args.device == "cuda" else 0.02
    runner.check_options(parser, args)
    return args


if __name__ == "__main__":
    sys.exit(run(parse()))
