"""GPUs as their data sheets have them, and the floor that no kernel can beat."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Dense int8 TOPS at the boost clock, memory in GB/s."""

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


def floor(gpu: Gpu, m: int, n: int, k: int) -> tuple[float, str]:
    """Microseconds that no kernel can beat, and what says so: "memory" or "tensor cores"."""
    compute = 2 * m * n * k / gpu.tops / 1e6
    memory = (n * k + m * k + 4 * (m + n) + 2 * m * n) / gpu.gb_per_s / 1e3  # 16-bit y
    return max(compute, memory), "tensor cores" if compute > memory else "memory"


def gpu_of(machine: Mapping[str, Any]) -> str:
    """A key of GPUS for the name that the driver gives, such as "NVIDIA H100 80GB HBM3"."""
    name = str(machine.get("device", ""))
    found = [gpu for gpu in GPUS if re.search(rf"\b{gpu}\b", name)]
    if len(found) != 1:
        raise ValueError(f"'{name}' is none of {', '.join(GPUS)}; name one with --gpu.")
    return found[0]
