"""The GPU's form of bench_linear.py: whole layers by graph replays, every scheme, and what a call costs the CPU."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import gemm_cases
import gpu_state
import gpu_timer
import runner
import torch
from gemm_cases import Case, Expected, Operands
from report import Row, geomeans
from torch import Tensor, nn

from smoothquant_kernels import W8A8Linear, reference
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES

BASELINES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = tuple(f"vs_{name}" for name in BASELINES)
#: Bounds of one host time: enough calls for a median, and not all day where a call keeps the GPU busy.
HOST_SECONDS, HOST_LEAST, HOST_MOST = 0.02, 9, 200

Kind = tuple[str, bool]  # activation scheme, smoothing at run time
Layers = dict[Kind, W8A8Linear]


def name_of(kind: Kind) -> str:
    return kind[0] + ("+smooth" if kind[1] else "")


def make_layers(kinds: Sequence[Kind], linear: nn.Linear, x: Tensor) -> Layers:
    """A layer of each kind around one int8 weight: they differ in what they do to x."""
    base = W8A8Linear.from_linear(linear)
    found: Layers = {}
    for scheme, smooth in kinds:
        layer = W8A8Linear(
            base.in_features,
            base.out_features,
            bias=False,
            activation_scheme=scheme,
            smooth=smooth,
            device=x.device,
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
    gemm_cases.poison(case, x.device)
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
    """Microseconds of the CPU for one call whose kernels nothing is queued before: the median."""
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
    sample: gpu_state.Sampler = dict,
) -> list[Row]:
    """A row for every kind, all timed side by side; one whose result is wrong says so and is not timed."""
    generator = gemm_cases.generator(case, device)
    ready: dict[str, gpu_timer.Recorded] = {}
    host: dict[str, float] = {}
    sets: list[tuple[Tensor, dict[str, nn.Linear], Layers]] = []
    for _ in range(gpu_timer.input_sets(case.bytes, device)):
        x, w = gemm_cases.make_floats(case, torch.float16, generator)
        floats = {}
        for name, dtype in BASELINES.items():
            floats[name] = nn.Linear(case.k, case.n, bias=False, device="meta")
            floats[name].weight = nn.Parameter(w.to(dtype), requires_grad=False)
        sets.append((x, floats, make_layers(kinds, floats["float16"], x)))
    x, _, layers = sets[0]
    for name, dtype in BASELINES.items():
        pairs = [(f[name], x.to(dtype)) for x, f, _ in sets]
        calls = [lambda f=f, x=x: f(x) for f, x in pairs]
        ready[name] = gpu_timer.record(calls, device)
        host[name] = host_us(calls[0], device)
    wrong: dict[Kind, str] = {}
    for kind in kinds:
        if said := wrong_layer(case, layers[kind], x, generator):
            wrong[kind] = said
            continue
        calls = [lambda layer=ls[kind], x=x: layer(x) for x, _, ls in sets]
        ready[name_of(kind)] = gpu_timer.record(calls, device)
        host[name_of(kind)] = host_us(calls[0], device)
    timings = gpu_timer.measure(ready, device=device, seconds=seconds)
    *_, loaded = timings  # an int8 layer, unless all were wrong
    clocks = gemm_cases.sample_under_load(ready[loaded], timings[loaded].us, sample, device)
    rows = []
    for kind in kinds:
        row = describe(case, kind)
        row |= (
            {"wrong": wrong[kind]} if kind in wrong else row_of(case, kind, timings, host) | clocks
        )
        rows.append(row)
    return rows


def describe(case: Case, kind: Kind) -> Row:
    names = ("layer", "N", "K", "M", "scheme", "smooth")
    return dict(zip(names, (str(case.layer), case.n, case.k, case.m, *kind), strict=True))


def row_of(
    case: Case, kind: Kind, timings: dict[str, gpu_timer.Timing], host: dict[str, float]
) -> Row:
    """The CPU form's columns with float16 for float32, and the host's times."""
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
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "int8_us" in row:
            groups.setdefault(name_of((row["scheme"], row["smooth"])), []).append(row)
    return {name: geomeans(group, COLUMNS) for name, group in groups.items()}


def run(args: argparse.Namespace) -> int:
    """Measures what the budget allows; 1 where a layer was wrong or failed, or nothing was measured."""
    device = torch.device(args.device)
    facts = runner.machine_facts(device)
    sample = gpu_state.sampler(device)
    schemes = [args.scheme] if args.scheme else ACTIVATION_SCHEMES
    kinds = list(itertools.product(schemes, (True,) if args.smooth else (False, True)))
    rows = runner.run_cases(
        gemm_cases.cases(args.layers, args.tokens),
        lambda case: measure(case, kinds, device, args.seconds, sample),
        key=lambda case: {"layer": str(case.layer), "N": case.n, "K": case.k, "M": case.m},
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
