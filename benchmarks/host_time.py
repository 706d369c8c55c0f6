"""What one call of the linear layer's ops, and one decoder layer, cost the CPU, counted without a GPU.

    python -m benchmarks.host_time [--gpus h100 a100] [--seconds 30] [--library FILE] [--json FILE]

The binding is built for CPU tensors, as the tests' simulator has it (tests/support/simulator.py), and runs on a CUDA
runtime in which every call succeeds at once and no kernel runs (tests/support/null_runtime.py). So everything of the
library is timed: Python, dispatcher, boxing, argument checks, allocation, plan, CUTLASS's parameters.
**What is missing**: the driver's part (a launch takes it some 2 to 3 us), torch's device guard and stream look-up, and
its CUDA allocator, in whose place stands malloc. The columns of each line:

    us      the public function, or the module's call: the median; p5 (a machine at rest) and p80 beside it
    python  of that, what the Python function adds to the op's overload
    op      dispatcher, boxing, checks and allocation: the overload less the C entry
    plan    the C entry that only plans
    launch  the C entry that plans and launches, less the former
    calls   of the CUDA runtime: launches, memset nodes, others; of a decoder layer also the kernels of torch itself

A decoder layer is transformers' own for LLaMA in W8A8, as `quantize_model` leaves it ("unfused") and after
`optimize_for_inference` ("fused"). torch's own operations run on the CPU: those of --layers small, which is timed, are
so small that they cost what their dispatch does. The layers of other sizes are only counted.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import host_layers, runner
from benchmarks.lib.timer import Call, interleaved
from smoothquant_kernels import W8A8Linear, ops
from tests.support import c_gemm, c_interface, null_runtime

GPUS = ("h100", "a100", "l40s")  # as null_use_device counts them
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COUNTERS = (
    "launches", "clears", "tensor_maps", "entry_points", "devices", "attributes", "function_attributes"
)  # fmt: skip
CALLS = 100  # in one sample: the clock is read twice for all of them
ROUNDS = 200  # at most
MOST_TIMED = 16  # tokens of a timed layer


# --- what is timed ----------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One line.

    Attributes:
        op: a name for what `call` does.
        call: as users call it.
        overload: the op's overload with the same arguments; None if there is none, or several.
        entries: (op, its C params): what `sqk_<op>` and `sqk_<op>_plan` are called with.
        keep: what the params point into.
        timed: whether its microseconds mean anything.
        torch: kernels of torch itself -> how often the call launches them.
    """

    op: str
    m: int
    n: int
    k: int
    dtype: str
    call: Call
    overload: Call | None = None
    entries: Sequence[tuple[str, ctypes.Structure]] = ()
    keep: Sequence[object] = field(default_factory=list)
    timed: bool = True
    torch: dict[str, int] = field(default_factory=dict)


def make_cases(m: int, n: int, k: int, dtype: str) -> Iterator[Case]:
    """All ops on one problem: a weight per channel, tokens with a scale of their own, smoothing and bias.

    "with residual" adds one of y's type. `fused_linear_s8` is a whole step of a block: RMSNorm, GEMM, bias, residual.
    """
    float_type = DTYPES[dtype]
    x = torch.randn(m, k).to(float_type)
    layer = W8A8Linear(k, n, smooth=True)
    w_q, w_scale, bias, inv_smooth = layer.w_q, layer.w_scale, layer.bias, layer.inv_smooth
    assert bias is not None and inv_smooth is not None
    x_q, x_scale, y = torch.zeros(m, k, dtype=torch.int8), torch.ones(m), x.new_empty(m, n)
    workspace = torch.zeros(64 << 20, dtype=torch.int8)
    quantize_op, gemm_op, gated_op, linear_op, fused_op = (
        getattr(torch.ops.smoothquant_kernels, name).default
        for name in ("quantize", "gemm_s8", "gemm_s8_gated", "linear_s8", "fused_linear_s8")
    )
    factors = {"inv_smooth": inv_smooth, "k_multiple": 16}
    scales = {"bias": bias, "out_dtype": float_type}
    both = {"bias": bias, "inv_smooth": inv_smooth}
    residual, weight = torch.randn(m, n).to(float_type), torch.ones(k).to(float_type)
    added = {**both, "residual": residual}
    norm = {**added, "norm_weight": weight, "eps": 1e-6}
    quantize = c_interface.params_of(x, x_q, x_scale, inv_smooth=inv_smooth)
    normalized = c_interface.params_of(
        x, x_q, x_scale, producer="rms_norm", weight=weight, inv_smooth=inv_smooth
    )
    gemm, more = (
        c_gemm.params_of(x_q, w_q, x_scale, w_scale, y, bias=bias, residual=last)
        for last in (None, residual)
    )
    for params in (quantize, normalized, gemm, more):
        params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
    linear, linear_more, fused = (
        c_gemm.LinearParams(first, second)
        for first, second in ((quantize, gemm), (quantize, more), (normalized, more))
    )
    keep = [x_q, x_scale, y, workspace, layer, residual, weight]

    def pair(quantize: Any, multiply: Any) -> Tensor:
        q, q_scale = quantize(x, **factors)
        result: Tensor = multiply(q, w_q, q_scale, w_scale, **scales)
        return result

    operands = (x_q, w_q, x_scale, w_scale)
    out_scale, gates = torch.ones(1), {"bias": bias, "dtype": float_type}
    first, second = ("quantize", quantize), ("gemm_s8", gemm)
    calls: dict[str, tuple[Call, Call | None, list[tuple[str, ctypes.Structure]]]] = {
        "quantize": (lambda: ops.quantize(x, **factors), lambda: quantize_op(x, **factors), [first]),
        "gemm_s8": (
            lambda: ops.gemm_s8(*operands, **scales), lambda: gemm_op(*operands, **scales), [second]
        ),
        "gemm_s8_gated": (
            lambda: ops.gemm_s8_gated(*operands, out_scale, **gates),
            lambda: gated_op(*operands, out_scale, **gates), [],
        ),
        "quantize, gemm_s8": (
            lambda: pair(ops.quantize, ops.gemm_s8), lambda: pair(quantize_op, gemm_op), [first, second]
        ),
        "linear_s8": (
            lambda: ops.linear_s8(x, w_q, w_scale, **both),
            lambda: linear_op(x, w_q, w_scale, **both), [("linear_s8", linear)],
        ),
        "linear_s8 with residual": (
            lambda: ops.linear_s8(x, w_q, w_scale, **added),
            lambda: linear_op(x, w_q, w_scale, **added), [("linear_s8", linear_more)],
        ),
        "fused_linear_s8": (
            lambda: ops.fused_linear_s8(x, "rms_norm", w_q, w_scale, **norm),
            lambda: fused_op(x, "rms_norm", w_q, w_scale, **norm), [("linear_s8", fused)],
        ),
        "W8A8Linear": (lambda: layer(x), None, []),
    }  # fmt: skip
    for op, (call, overload, entries) in calls.items():
        yield Case(op, m, n, k, dtype, call, overload, entries, keep)


def bare_case() -> Case:
    """The smallest op of the library: what a dispatcher call, one tensor in and one out, cannot go below."""
    x = torch.zeros(16)
    call = torch.ops.smoothquant_kernels._saturate_s8.default
    return Case("_saturate_s8", 1, 16, 16, "fp32", lambda: call(x), lambda: call(x))


def layer_cases(
    layers: Mapping[str, Mapping[str, torch.nn.Module]], tokens: Sequence[int], dtype: str
) -> Iterator[Case]:
    """All layers by the name of their shape, which are made before the kernels are empty. N, K: hidden, mlp."""
    for name, variants in layers.items():
        shape = host_layers.SHAPES[name]
        for m, (variant, layer) in itertools.product(tokens, variants.items()):
            call = host_layers.call_of(layer, shape, m, DTYPES[dtype])
            yield Case(
                f"layer {name} {variant}", m, shape.hidden, shape.mlp, dtype, call,
                timed=name == "small" and m <= MOST_TIMED, torch=host_layers.torch_launches(call),
            )  # fmt: skip


def counted(runtime: ctypes.CDLL, call: Call) -> dict[str, int]:
    """How often one call asks the CUDA runtime for what."""
    call()  # what is asked for once is not of interest
    numbers = {name: ctypes.c_long.in_dll(runtime, f"null_{name}") for name in COUNTERS}
    before = {name: number.value for name, number in numbers.items()}
    call()
    return {name: number.value - before[name] for name, number in numbers.items()}


def variants(case: Case, library: ctypes.CDLL) -> dict[str, Call]:
    """What is timed for a case: the call, the overload, and the C entries that launch and that only plan."""
    found: dict[str, Call] = {"call": case.call}
    if case.overload is not None:
        found["overload"] = case.overload
    for name, params in case.entries:
        reference = ctypes.byref(params)
        # sqk_gemm_plan serves gemm_s8; both ask the current GPU where no device is given.
        planner = getattr(library, f"sqk_{name.removesuffix('_s8')}_plan")
        plan = ctypes.byref(ctypes.create_string_buffer(512))
        arguments = (reference, plan) if name == "linear_s8" else (reference, None, plan)
        launcher = getattr(library, f"sqk_{name}")
        if launcher(reference, None) or planner(*arguments):
            raise RuntimeError(f"sqk_{name} refuses M {case.m}, N {case.n}, K {case.k}.")
        found[f"launch {name}"] = lambda run=launcher, p=reference: run(p, None)
        found[f"plan {name}"] = lambda run=planner, a=arguments: run(*a)
    return found


def repeated(call: Call) -> Call:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def measure(
    cases: Sequence[Case], gpu: str, runtime: ctypes.CDLL, library: ctypes.CDLL, seconds: float
) -> list[dict[str, Any]]:
    """The lines of one GPU; all cases take turns, so that a machine that slows down slows all of them."""
    runtime.null_use_device(GPUS.index(gpu))
    nowhere = ctypes.byref(ctypes.c_int())
    todo: dict[str, Call] = {
        # What timing itself costs: a call of nothing, and one through ctypes.
        "nothing": lambda: None,
        "ctypes": lambda: runtime.null_call(nowhere, None, nowhere),
    }
    counts = []
    for i, case in enumerate(cases):
        counts.append(counted(runtime, case.call))
        if case.timed:
            todo |= {f"{i} {name}": call for name, call in variants(case, library).items()}
    gc.collect()
    gc.disable()
    try:
        times = interleaved(
            {name: repeated(call) for name, call in todo.items()}, seconds=seconds, most=ROUNDS
        )
    finally:
        gc.enable()
    us = {name: [t / CALLS for t in values] for name, values in times.items()}
    middle = {name: statistics.median(values) for name, values in us.items()}
    rows = []
    for i, (case, count) in enumerate(zip(cases, counts, strict=True)):
        row: dict[str, Any] = {
            "op": case.op, "M": case.m, "N": case.n, "K": case.k, "dtype": case.dtype, "gpu": gpu,
            "calls": count, "torch": case.torch,
        }  # fmt: skip
        rows.append(row)
        if not case.timed:
            continue
        sample = us[f"{i} call"]
        ranks = statistics.quantiles(sample, n=20)
        row |= {
            "us": middle[f"{i} call"] - middle["nothing"],
            "p5": ranks[0] - middle["nothing"], "p80": ranks[15] - middle["nothing"],
            "rounds": len(sample), "python_us": None, "op_us": None, "plan_us": None,
            "launch_us": None,
        }  # fmt: skip
        if case.overload is not None:
            row["python_us"] = middle[f"{i} call"] - middle[f"{i} overload"]
            entries = [name for name, _ in case.entries]
            plan = sum(middle[f"{i} plan {name}"] - middle["ctypes"] for name in entries)
            both = sum(middle[f"{i} launch {name}"] - middle["ctypes"] for name in entries)
            row["op_us"] = middle[f"{i} overload"] - middle["nothing"] - both
            if entries:
                row |= {"plan_us": plan, "launch_us": both - plan}
    return rows


def text_of(row: dict[str, Any]) -> str:
    """`linear_s8 M 64 N 4096 K 4096 fp16 h100 | 9.80 us, p5 9.61, p80 9.91 | ... | 2 launches, 0 memsets, 7 others`"""
    launches, clears = row["calls"]["launches"], row["calls"]["clears"]
    other = sum(row["calls"].values()) - launches - clears
    text = f"{row['op']:24s} M {row['M']:4d} N {row['N']} K {row['K']} {row['dtype']} {row['gpu']}"
    if "us" in row:
        parts = " ".join(
            f"{name} {row[f'{name}_us']:5.2f}" if row[f"{name}_us"] is not None else f"{name}     -"
            for name in ("python", "op", "plan", "launch")
        )
        text += f" | {row['us']:6.2f} us, p5 {row['p5']:6.2f}, p80 {row['p80']:6.2f} | {parts}"
    text += f" | {launches} launches, {clears} memsets, {other} others"
    if row["torch"]:
        each = ", ".join(f"{count} {name}" for name, count in sorted(row["torch"].items()))
        text += f"; {sum(row['torch'].values())} of torch: {each}"
    return text


def shares(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a fused layer takes of the unfused one's time: by the medians, and on a machine at rest."""
    timed = {(row["op"], row["M"], row["gpu"]): row for row in rows if "us" in row}
    lines = []
    for (op, m, gpu), row in timed.items():
        if op.startswith("layer ") and op.endswith(" fused"):
            other = timed[op.removesuffix("fused") + "unfused", m, gpu]
            us, p5 = (row[name] / other[name] for name in ("us", "p5"))
            lines.append(f"{op} M {m} {gpu}: {us:.2f} of the unfused layer's time (p5 {p5:.2f})")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=GPUS)
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 64, 2048))
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    parser.add_argument(
        "--layers", nargs="*", choices=list(host_layers.SHAPES), default=("small", "LLaMA-7B")
    )
    parser.add_argument(
        "--layer-tokens",
        nargs="+",
        type=int,
        default=(1, 16, 64, 512),
        help="sequences that decode",
    )
    parser.add_argument("--seconds", type=float, default=30, help="about, for each GPU")
    parser.add_argument("--library", type=Path, help="the binding for CPU tensors; else built")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    layers = {
        name: host_layers.make_layers(host_layers.SHAPES[name], DTYPES[given.dtype])
        for name in given.layers
    }
    try:
        path = given.library or null_runtime.simulator_library()
        with tempfile.TemporaryDirectory() as folder:
            runtime, library = null_runtime.load(path, Path(folder))
    except null_runtime.Missing as error:
        print(f"host_time: {error}", file=sys.stderr)
        return 1
    load_before = os.getloadavg()[0]
    with torch.no_grad():
        cases = [bare_case()]
        for m in given.tokens:
            cases += make_cases(m, given.n, given.k, given.dtype)
        cases += layer_cases(layers, given.layer_tokens, given.dtype)
        for gpu in given.gpus:
            found = measure(cases, gpu, runtime, library, given.seconds)
            rows += found
            print("\n".join([*map(text_of, found), *shares(found)]), flush=True)
    print(f"load of the machine: {load_before:.1f} before, {os.getloadavg()[0]:.1f} after")
    facts = {"torch": torch.__version__, "load": [load_before, os.getloadavg()[0]]}
    runner.write_json(given.json, {**facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
