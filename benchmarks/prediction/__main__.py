"""Expected times of `gemm_s8` by the dispatch's own arithmetic (csrc/gemm/cost.cpp): nothing here was measured.

    python -m benchmarks.prediction [--gpu H100] [--layers WORD ...] [--tokens 1 64 2048]
    python -m benchmarks.prediction --rotation                        # what rotated groups add to `quantize`
    python -m benchmarks.prediction --cache                           # attention to an int8 cache, and its writer
    python -m benchmarks.prediction --blocks                          # decoder layers: fused, unfused, float16
    python -m benchmarks.prediction --yardstick                       # beside other people's measured times
    python -m benchmarks.prediction --compare results/.../gemm.json   # a run of ours, each row at its measured clock

For each layer: the floor, which no kernel can beat (operations over the tensor cores' peak or the least bytes over the
memory's bandwidth, whichever is longer), the tile that the dispatch takes, the time that it expects at the boost clock
without the launch, and the resource that takes the longest. It needs a C++ compiler (CXX) and no CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.shapes import LLM_LAYERS

from . import caches, compare, expected, layers, planner, rotation, yardstick
from .gpus import GPUS


def show(table: tuple[list[str], list[list[str]]]) -> None:
    lines = [table[0], *table[1]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prediction",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), help="H100, or the one that was measured")
    parser.add_argument("--layers", nargs="*", default=list(expected.LAYERS), help="words of names")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(expected.TOKENS))
    parser.add_argument("--compare", type=Path, metavar="gemm.json")
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--yardstick", action="store_true")
    parser.add_argument("--rotation", action="store_true")
    parser.add_argument("--cache", action="store_true")
    args = parser.parse_args(arguments)
    if args.rotation:
        print("quantize, float16, K = 4096: arithmetic, not measured")
        show(rotation.table((args.gpu,) if args.gpu else ("A100", "L40S", "H100")))
        return 0
    if args.cache:
        print("int8 keys and values: arithmetic, not measured")
        show(caches.table((args.gpu,) if args.gpu else ("A100", "L40S", "H100")))
        return 0
    if not planner.available():
        parser.error(f"{planner.cxx()} was not found; install a C++ compiler or set CXX.")
    if args.blocks:
        if args.gpu not in (None, *layers.BEST_INT8):
            parser.error(f"--blocks is for {', '.join(layers.BEST_INT8)}, not {args.gpu}.")
        show(layers.table((args.gpu,) if args.gpu else tuple(layers.BEST_INT8)))
        print("\n".join(f"{name}: {what}" for name, what in layers.ASSUMPTIONS.items()))
    elif args.yardstick:
        pairs = yardstick.rows()
        show(yardstick.table(pairs))
        print()
        show(compare.by_class([compared for _, compared in pairs]))
    elif args.compare:
        results = json.loads(args.compare.read_text())
        try:
            show(compare.run_table(results, args.gpu))
            print()
            show(compare.by_class(compare.compare(results, args.gpu)))
        except ValueError as error:
            parser.error(str(error))
    else:
        gpu = args.gpu or "H100"
        names = [name for name in LLM_LAYERS if any(word in name for word in args.layers)]
        print(f"{GPUS[gpu].name}: arithmetic, not measured")
        show(expected.table(gpu, names, args.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
