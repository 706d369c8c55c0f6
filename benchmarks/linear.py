"""`W8A8Linear`, its quantization included, against `nn.Linear` in float types, in one run.

    python -m benchmarks.linear --device cpu [--python vllm=PATH ...] [--isa avx512_vnni] [--json FILE]
    python -m benchmarks.linear --device cuda [--budget-seconds 60] [--json FILE]

On a CPU: against stock `nn.Linear` in float32 and bfloat16, which lays its weight out anew at every call, against this
package's path without compiled kernels (before), and against the int8 layers of others where they are installed. Each
has a process of its own (lib/cpu_worker.py), and they take turns. With 8-bit dot products (VNNI) the hardware allows 4x
prepacked float32 and 2x bfloat16. On a GPU: against float16 and bfloat16 (cuBLAS) by graph replays, for every scheme
with and without smoothing at run time. host: what a call costs the CPU while the GPU has nothing queued.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks.lib import cases, cpu_isa, cpu_linear, gpu, runner, timer
from benchmarks.lib.cases import Case, Expected, Operands
from benchmarks.lib.cpu_peers import VARIANTS
from benchmarks.lib.runner import Row, geomeans
from benchmarks.lib.shapes import CPU_LINEARS, CPU_TOKENS, GPU_TOKENS
from smoothquant_kernels import W8A8Linear, reference
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES

BASELINES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = tuple(f"vs_{name}" for name in BASELINES)
#: Bounds of one host time: enough calls for a median, and a limit where each call keeps the GPU busy.
HOST_SECONDS, HOST_LEAST, HOST_MOST = 0.02, 9, 200

Kind = tuple[str, bool]  # activation scheme, smoothing at run time
Layers = dict[Kind, W8A8Linear]


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def run_on_cpu(args: argparse.Namespace) -> int:
    facts = runner.machine_facts(torch.device("cpu"), args.threads) | {
        "capability": torch.backends.cpu.get_cpu_capability(),
        **cpu_isa.facts(),
        "isa": args.isa,
        "scheme": args.scheme + ("+smooth" if args.smooth else ""),
    }
    names = {sizes: name for name, sizes in CPU_LINEARS.items()}
    todo = [(names.get(nk, "any"), *nk, m) for nk in args.shapes for m in args.tokens]
    with ExitStack() as stack:
        workers = cpu_linear.start_workers(args, stack, facts)
        rows = runner.run_cases(
            todo,
            lambda case: cpu_linear.measure(case, workers, facts["int8_mode"], args.seconds),
            key=cpu_linear.key_of,
            line=cpu_linear.line,
            args=args,
            facts=facts,
            summary=lambda rows: {"geomeans": cpu_linear.means(rows)},
        )
    for name, means in cpu_linear.means([row for row in rows if runner.is_good(row)]).items():
        text = ", ".join(f"{means[n]:.2f}x {n}" for n in means if n != "cases")
        print(f"geometric mean, {name}, {means['cases']:.0f} cases: {text}")
    return runner.status(rows)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def name_of(kind: Kind) -> str:
    return kind[0] + ("+smooth" if kind[1] else "")


def make_layers(kinds: Sequence[Kind], linear: nn.Linear, x: Tensor) -> Layers:
    """A layer of each kind around one int8 weight: they differ in what they do to x."""
    base = W8A8Linear.from_linear(linear)
    sizes = (base.in_features, base.out_features)
    found: Layers = {}
    for scheme, smooth in kinds:
        layer = W8A8Linear(
            *sizes, bias=False, activation_scheme=scheme, smooth=smooth, device=x.device
        )
        layer.w_q, layer.w_scale = base.w_q, base.w_scale
        if smooth:
            layer.inv_smooth = torch.rand_like(layer.inv_smooth) + 0.5
        if scheme == "static":
            layer.x_scale = (x.float().abs().amax() / 127).reshape(1)
        found[scheme, smooth] = layer
    return found


def wrong_layer(case: Case, layer: W8A8Linear, x: Tensor, generator: torch.Generator) -> str:
    """Empty, or why the layer's result is not the specification's."""
    cases.poison(case, x.device)
    y = layer(x)
    x_q, x_scale = reference.quantize(
        x,
        inv_smooth=layer.inv_smooth,
        scale=layer.x_scale,
        granularity="tensor" if layer.activation_scheme == "per_tensor" else "token",
    )
    operands = Operands(x_q, layer.w_q, x_scale.expand(case.m), layer.w_scale)
    return Expected(case, operands, generator).wrong(y)


def host_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds that one call takes the CPU with nothing queued before it: the median."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < HOST_LEAST or (
        len(times) < HOST_MOST and time.perf_counter() - begin < HOST_SECONDS
    ):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(
    case: Case,
    kinds: Sequence[Kind],
    device: torch.device,
    seconds: float,
    sample: gpu.Sampler = dict,
) -> list[Row]:
    """A row for every kind, all timed side by side; one whose result is wrong says so and is not timed."""
    generator = cases.generator_of(case, device)
    ready: dict[str, timer.Recorded] = {}
    host: dict[str, float] = {}
    sets: list[tuple[Tensor, dict[str, nn.Linear], Layers]] = []
    for _ in range(timer.input_sets(case.bytes, device)):
        x, w = cases.make_floats(case, torch.float16, generator)
        floats = {}
        for name, dtype in BASELINES.items():
            floats[name] = nn.Linear(case.k, case.n, bias=False, device="meta")
            floats[name].weight = nn.Parameter(w.to(dtype), requires_grad=False)
        sets.append((x, floats, make_layers(kinds, floats["float16"], x)))

    def record(name: str, calls: list[Callable[[], Tensor]]) -> None:
        ready[name] = timer.record(calls, device)
        host[name] = host_us(calls[0], device)

    for name, dtype in BASELINES.items():
        pairs = [(f[name], x.to(dtype)) for x, f, _ in sets]
        record(name, [lambda f=f, x=x: f(x) for f, x in pairs])
    x, _, layers = sets[0]
    wrong = {kind: wrong_layer(case, layers[kind], x, generator) for kind in kinds}
    for kind in kinds:
        if not wrong[kind]:
            record(name_of(kind), [lambda layer=ls[kind], x=x: layer(x) for x, _, ls in sets])
    timings = timer.measure(ready, device=device, seconds=seconds)
    *_, loaded = timings  # an int8 layer, unless all were wrong
    clocks = cases.sample_under_load(ready[loaded], timings[loaded].us, sample, device)
    return [
        key_of(case, kind)
        | ({"wrong": wrong[kind]} if wrong[kind] else row_of(case, kind, timings, host) | clocks)
        for kind in kinds
    ]


def key_of(case: Case, kind: Kind | None = None) -> Row:
    row = {"layer": str(case.layer), "N": case.n, "K": case.k, "M": case.m}
    return row | ({"scheme": kind[0], "smooth": kind[1]} if kind else {})


def row_of(case: Case, kind: Kind, timings: dict[str, timer.Timing], host: dict[str, float]) -> Row:
    """The CPU's columns with float16 for float32, and the host's times."""
    op = timings[name_of(kind)]
    row: Row = {"rounds": op.rounds, "int8_us": op.us, "int8_us_p20": op.p20, "int8_us_p80": op.p80}
    row |= {f"{name}_us": timings[name].us for name in BASELINES}
    row["gops"] = case.operations / op.us / 1e3
    row |= {f"vs_{name}": timings[name].us / op.us for name in BASELINES}
    row["host_us"] = host[name_of(kind)]
    return row | {f"{name}_host_us": host[name] for name in BASELINES}


def line(row: Row) -> str:
    kind = name_of((row["scheme"], row["smooth"]))
    head = f"{row['layer']:18s} M {row['M']:4d} N {row['N']:5d} K {row['K']:5d} {kind:17s}"
    if "wrong" in row:
        return f"{head} | wrong: {row['wrong']}"
    return (
        f"{head} | {row['int8_us']:8.2f} us | {row['gops'] / 1e3:7.1f} TOPS | {row['vs_float16']:5.2f}x float16 | "
        f"{row['vs_bfloat16']:5.2f}x bfloat16 | host {row['host_us']:6.1f} us, float16 {row['float16_host_us']:6.1f}"
    )


def means_by_kind(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """For each scheme, with and without smoothing: geometric means by class of M."""
    timed = [row for row in rows if "int8_us" in row]
    groups = runner.grouped(timed, lambda row: name_of((row["scheme"], row["smooth"])))
    return {name: geomeans(group, COLUMNS) for name, group in groups.items()}


@torch.inference_mode()
def run_on_gpu(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    facts = runner.machine_facts(device)
    sample = gpu.sampler(device)
    schemes = [args.scheme] if args.scheme else ACTIVATION_SCHEMES
    kinds = list(itertools.product(schemes, (True,) if args.smooth else (False, True)))
    rows = runner.run_cases(
        cases.cases_of(args.layers, args.tokens),
        lambda case: measure(case, kinds, device, args.seconds, sample),
        key=key_of,
        line=line,
        args=args,
        facts=facts,
        summary=lambda rows: {"geomeans": means_by_kind(rows)},
    )
    print("geomeans: times as fast as float16, as bfloat16")
    for name, classes in means_by_kind(rows).items():
        means = [f"{m} {c['vs_float16']:.2f}x {c['vs_bfloat16']:.2f}x" for m, c in classes.items()]
        print(" | ".join([f"{name:17s}", *means]))
    return runner.status(rows)


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 if a layer was wrong or failed, or nothing was measured."""
    return run_on_gpu(args) if args.gpu_form else run_on_cpu(args)


def shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = runner.parser_of(__doc__, "cpu")
    parser.add_argument("--rehearse", action="store_true", help="the GPU's form, on a CPU, on toys")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--scheme", choices=ACTIVATION_SCHEMES, help="CPU: per_token; GPU: all, one after the other"
    )
    parser.add_argument("--smooth", action="store_true", help="only with the division by s")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="NxK", help="CPU: of weights")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), metavar="NAME",
        help=f"CPU: what is timed, of {', '.join(VARIANTS)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--python", action="append", default=[], metavar="NAME=PATH",
        help="CPU: the Python that has a variant's library; default: this one",
    )  # fmt: skip
    parser.add_argument(
        "--isa", choices=list(cpu_isa.ISAS), default="native", help="CPU: the most that all may use"
    )
    runner.add_layer_options(parser)
    args = parser.parse_args(arguments)
    for item in args.python:
        if item.partition("=")[0] not in VARIANTS or "=" not in item:
            parser.error(f"--python NAME=PATH, with a NAME of {', '.join(VARIANTS)}; not {item!r}")
    if args.rehearse and args.device == "cuda":
        parser.error("--rehearse is for --device cpu")
    args.gpu_form = args.rehearse or args.device == "cuda"
    runner.check_options(parser, args)
    if args.gpu_form:
        args.tokens = args.tokens or (None if args.rehearse else GPU_TOKENS)
        runner.fill_in_layers(args)
    else:
        args.scheme = args.scheme or "per_token"
        args.shapes = args.shapes or list(CPU_LINEARS.values())
        args.tokens = args.tokens or CPU_TOKENS
        wanted = args.variants or list(VARIANTS)
        args.variants = [name for name in VARIANTS if name in ("int8", *wanted)]
        args.seconds = 4.0 if args.seconds is None else args.seconds
    return args


if __name__ == "__main__":
    sys.exit(run(parse()))
