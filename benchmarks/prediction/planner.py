"""What the dispatch takes and expects for any GPU, from its own C++ code (csrc/gemm). No CUDA is needed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tools.build.commands import cxx
from tools.build.module import build_module, load_module

from .gpus import Gpu, floor


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
    return shutil.which(cxx()) is not None


@cache
def _kernels() -> Any:
    """The module that describes the kernels, compiled with the C++ compiler."""
    return load_module(build_module(Path("build") / "module", os.environ))


@cache
def tables() -> dict[str, Any]:
    """By table: its machine's numbers and its tiles."""
    found: dict[str, Any] = _kernels().Library().gemm_tables()
    return found


def choose(gpu: Gpu, m: int, n: int, k: int) -> dict[str, Any]:
    """table, tile, splits, expected_clocks and bound_by of what the dispatch takes."""
    device = _kernels().Device(
        sms=gpu.sms,
        capability=gpu.capability,
        shared_bytes=gpu.shared_bytes,
        wgmma=gpu.wgmma,
    )
    found: dict[str, Any] = _kernels().Library().plan_gemm(m, n, k, device)
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
