"""What the dispatch takes and expects for any GPU, from its own C++ code (csrc/gemm). No CUDA is needed."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .gpus import Gpu, floor

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")


@dataclass(frozen=True)
class Prediction:
    tile: str
    splits: int
    us: float
    bound_by: str  # "tensor cores", "L2", "SM intake", "memory" or "latency"
    floor_us: float
    tops: float

    @property
    def name(self) -> str:
        """As in the results of the GEMM benchmark: "128x128x64 /4"."""
        return self.tile + (f" /{self.splits}" if self.splits > 1 else "")


def available() -> bool:
    return shutil.which(COMPILER) is not None


@cache
def _library() -> ctypes.CDLL:
    """The plan's code, compiled with the C++ compiler."""
    sources = sorted(str(path) for path in (ROOT / "csrc" / "gemm").glob("*.cpp"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan.so"
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Icsrc/include", "-Icsrc"]
        subprocess.run([*command, *sources, "-o", str(target)], cwd=ROOT, check=True)
        # Lazy: what asks the CUDA runtime stays undefined and is never called.
        library = ctypes.CDLL(str(target), mode=os.RTLD_LAZY)
    library.sqk_gemm_choice.restype = library.sqk_gemm_tables.restype = ctypes.c_char_p
    return library


@cache
def tables() -> dict[str, Any]:
    """By table: its machine's numbers and its tiles."""
    found: dict[str, Any] = json.loads(_library().sqk_gemm_tables())
    return found


def choose(gpu: Gpu, m: int, n: int, k: int) -> dict[str, Any]:
    """table, tile, splits, expected_clocks and bound_by of what the dispatch takes."""
    device = (ctypes.c_int32 * 5)(gpu.sms, gpu.capability, gpu.shared_bytes, int(gpu.wgmma))
    size = ctypes.c_int64
    found: dict[str, Any] = json.loads(
        _library().sqk_gemm_choice(size(m), size(n), size(k), device)
    )
    return found


def machine_of(gpu: Gpu) -> dict[str, int]:
    """The numbers that the arithmetic goes by (GemmMachine in csrc/gemm)."""
    machine: dict[str, int] = tables()[choose(gpu, 1, 64, 64)["table"]]["machine"]
    return machine


def predict(gpu: Gpu, m: int, n: int, k: int, ghz: float | None = None) -> Prediction:
    """ghz: the SMs' clock where one was measured; the default is the boost clock. The memory keeps its own clock."""
    choice = choose(gpu, m, n, k)
    if ghz is None or choice["bound_by"] == "memory":
        ghz = gpu.ghz
    us = choice["expected_clocks"] / ghz / 1e3
    tile = tables()[choice["table"]]["tiles"][choice["tile"]]["name"]
    tops = 2 * m * n * k / us / 1e6
    return Prediction(tile, choice["splits"], us, choice["bound_by"], floor(gpu, m, n, k)[0], tops)
