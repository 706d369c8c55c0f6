"""Floors of `gemm_s8` and what the dispatch takes, by arithmetic alone: nothing here was measured.

    python -m benchmarks.prediction.predict [--gpu H100] [--tokens 1 64 2048]

For each layer: the floor, which no kernel can beat (operations over the tensor cores' peak, or the bytes that must
move over the memory's bandwidth, whichever is longer), the tile that the tables choose, and the time that their
arithmetic expects of it (csrc/gemm/plan.cpp, compiled here with the C++ compiler; no CUDA). What a tile should really
take, and why: model.py.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.shapes import LLM_LAYERS

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")
SOURCES = ("csrc/gemm/plan.cpp", "csrc/gemm/tables.cpp")
TOKENS = (1, 8, 16, 64, 128, 512, 2048, 8192)
LAYERS = ("LLaMA-7B o", "LLaMA-7B up", "LLaMA-7B down", "LLaMA-70B up", "Llama 3 8B kv")


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it: dense int8 TOPS at the boost clock, memory in GB/s."""

    name: str
    sms: int
    capability: int
    shared_bytes: int  # the most for one block
    wgmma: bool
    ghz: float
    tops: float
    gb_per_s: float


GPUS = {
    "H100": Gpu("H100 SXM 80GB", 132, 90, 232448, True, 1.83, 1979, 3350),
    "H200": Gpu("H200 SXM 141GB", 132, 90, 232448, True, 1.83, 1979, 4800),
    "A100": Gpu("A100 SXM 80GB", 108, 80, 166912, False, 1.41, 624, 2039),
    "L40S": Gpu("L40S", 142, 89, 101376, False, 2.52, 733, 864),
    "4090": Gpu("RTX 4090", 128, 89, 101376, False, 2.52, 661, 1008),
}


@dataclass(frozen=True)
class Prediction:
    floor_us: float
    bound: str  # "memory" or "compute"
    tile: str
    splits: int
    expected_us: float

    @property
    def of_floor(self) -> float:
        return self.floor_us / self.expected_us


def floor(gpu: Gpu, m: int, n: int, k: int) -> tuple[float, str]:
    """Microseconds that no kernel can beat, and what says so: "memory" or "compute"."""
    compute = 2 * m * n * k / gpu.tops / 1e6
    memory = (n * k + m * k + 4 * (m + n) + 2 * m * n) / gpu.gb_per_s / 1e3  # 16-bit y
    return max(compute, memory), "compute" if compute > memory else "memory"


class Planner:
    """plan_gemm for any GPU."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "plan.so"
            command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC"]
            command += ["-Icsrc/include", "-Icsrc", *SOURCES, "-o", str(target)]
            subprocess.run(command, cwd=ROOT, check=True)
            # Lazy: what asks the CUDA runtime stays undefined, and is not called.
            self._library = ctypes.CDLL(str(target), mode=os.RTLD_LAZY)
        self._library.sqk_gemm_choice.restype = ctypes.c_char_p
        self._library.sqk_gemm_tables.restype = ctypes.c_char_p
        self.tables: dict[str, Any] = json.loads(self._library.sqk_gemm_tables())

    def choose(self, gpu: Gpu, m: int, n: int, k: int) -> dict[str, Any]:
        values = (gpu.sms, gpu.capability, gpu.shared_bytes, int(gpu.wgmma))
        device = (ctypes.c_int32 * 5)(*values)  # sqk::GemmDevice
        size = ctypes.c_int64
        choice: dict[str, Any] = json.loads(
            self._library.sqk_gemm_choice(size(m), size(n), size(k), device)
        )
        return choice

    def predict(self, gpu: Gpu, m: int, n: int, k: int) -> Prediction:
        choice = self.choose(gpu, m, n, k)
        return Prediction(
            *floor(gpu, m, n, k),
            self.tables[choice["table"]]["tiles"][choice["tile"]]["name"],
            choice["splits"],
            choice["expected_clocks"] / gpu.ghz / 1e3,
        )


#: Of model.prediction_table.
HEADER = ["layer", "N x K", "tile", "better by the model", "bound by", "M", "floor us", "us (low .. high)"]  # fmt: skip
HEADER += ["of the floor", "TOPS", "vs FP16"]


def choices(planner: Planner, gpu: Gpu, tokens: tuple[int, ...] = TOKENS) -> list[list[str]]:
    found = []
    for layer in (LLM_LAYERS[name] for name in LAYERS):
        for m in tokens:
            p = planner.predict(gpu, m, layer.n, layer.k)
            found.append(
                [
                    str(layer),
                    f"{layer.n} x {layer.k}",
                    p.tile + (f", {p.splits} splits" if p.splits > 1 else ""),
                    str(m),
                    f"{p.floor_us:.1f}",
                    p.bound,
                    f"{p.expected_us:.1f}",
                    f"{100 * p.of_floor:.0f} %",
                ]
            )
    return found


CHOICE_HEADER = [
    "layer",
    "N x K",
    "tile",
    "M",
    "floor us",
    "bound by",
    "expected us",
    "of the floor",
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    args = parser.parse_args()
    if shutil.which(COMPILER) is None:
        print(
            f"predict: {COMPILER} was not found; install a C++ compiler or set CXX.",
            file=sys.stderr,
        )
        return 2
    table = [CHOICE_HEADER, *choices(Planner(), GPUS[args.gpu], tuple(args.tokens))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"{GPUS[args.gpu].name}: arithmetic, not measured")
    for row in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
