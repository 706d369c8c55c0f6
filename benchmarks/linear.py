"""`W8A8Linear`, its quantisation included, against `nn.Linear` in float types, in one run.

    python benchmarks/bench_linear.py --device cpu [--threads 1] [--json FILE]
    python benchmarks/bench_linear.py --device cuda [--budget-seconds 60] [--json FILE]

On a CPU: against float32 and bfloat16. The baselines are stock `nn.Linear`, which lays its weight out anew at every
call; `W8A8Linear` keeps a packed copy. The ratio that the hardware allows against prepacked weights is 4x float32 and
2x bfloat16 with 8-bit dot products (VNNI).

On a GPU (linear_gpu.py): against float16 and bfloat16, that is cuBLAS, for every scheme with and without smoothing at
run time; all inputs float16 for int8. And host: what a call costs the CPU while the GPU has nothing queued.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import linear_gpu
import runner
import torch
from bench_gemm import add_common_options, fill_in
from report import geomean
from shapes import CPU_LINEARS, CPU_TOKENS, GPU_TOKENS
from timer import interleaved, median_ratio
from torch import nn

from smoothquant_kernels import W8A8Linear
from smoothquant_kernels.backends import onednn as cpu


def measure(
    n: int, k: int, tokens: int, scheme: str, smooth: bool, seconds: float
) -> dict[str, Any]:
    """One line of the table. The input is float32 for float32 and int8, bfloat16 for bfloat16."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(k, n, bias=False)
    half = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    x = torch.randn(tokens, k, generator=generator)
    x_half = x.bfloat16()
    static = scheme == "static"
    int8 = W8A8Linear.from_linear(
        linear,
        activation_scheme=scheme,
        smooth=torch.rand(k, generator=generator) + 0.5 if smooth else None,
        x_scale=float(x.abs().max()) / 127 if static else None,
    )
    with torch.inference_mode():
        times = interleaved(
            {
                "int8": lambda: int8(x),
                "float32": lambda: linear(x),
                "bfloat16": lambda: half(x_half),
            },
            seconds=seconds,
        )
    row: dict[str, Any] = {"N": n, "K": k, "M": tokens, "rounds": len(times["int8"])}
    for name, values in times.items():
        row[f"{name}_us"] = statistics.median(values) * 1e6
    row["gops"] = 2 * tokens * n * k / statistics.median(times["int8"]) / 1e9
    row["vs_float32"] = median_ratio(times["float32"], times["int8"])
    row["vs_bfloat16"] = median_ratio(times["bfloat16"], times["int8"])
    return row


def environment(threads: int) -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "int8_mode": cpu.gemm_mode(),
        "threads": threads,
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
    }


def run_on_cpu(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    machine = environment(args.threads)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = []
    for name, (n, k) in CPU_LINEARS.items():
        for tokens in args.tokens or CPU_TOKENS:
            row = {"layer": name, **measure(n, k, tokens, args.scheme, args.smooth, args.seconds)}
            rows.append(row)
            print(
                f"{name:20s} N {n:5d} K {k:5d} M {tokens:5d} | {row['int8_us']:10.1f} us | {row['gops']:7.1f} GOPS | "
                f"{row['vs_float32']:5.2f}x float32 | {row['vs_bfloat16']:5.2f}x bfloat16",
                flush=True,
            )
    for low, what in ((16, "M >= 16"), (1, "all M")):
        chosen = [r for r in rows if r["M"] >= low]
        if chosen:
            print(
                f"geometric mean, {what}: {geomean(r['vs_float32'] for r in chosen):.2f}x float32, "
                f"{geomean(r['vs_bfloat16'] for r in chosen):.2f}x bfloat16"
            )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="the GPU's form, on a CPU, on toys")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--scheme", choices=linear_gpu.ACTIVATION_SCHEMES,
        help="CPU: per_token; GPU: all, one after the other",
    )  # fmt: skip
    parser.add_argument("--smooth", action="store_true", help="only with the division by s")
    add_common_options(parser)
    runner.add_options(parser)
    args = parser.parse_args(arguments)
    if args.rehearse and args.device == "cuda":
        parser.error("--rehearse is for --device cpu")
    args.gpu_form = args.rehearse or args.device == "cuda"
    if not args.gpu_form and (args.resume or args.csv or args.budget_seconds < math.inf):
        parser.error("--resume, --csv and --budget-seconds are for the GPU's form (--rehearse)")
    if args.gpu_form:
        runner.check_options(parser, args)
        args.tokens = args.tokens or (None if args.rehearse else GPU_TOKENS)
        fill_in(parser, args)
    else:
        args.scheme = args.scheme or "per_token"
        args.seconds = 4.0 if args.seconds is None else args.seconds
    return args


def main() -> int:
    args = parse()
    if not args.gpu_form:
        return run_on_cpu(args)
    with torch.inference_mode():
        return linear_gpu.run(args)


if __name__ == "__main__":
    sys.exit(main())
