"""How many blocks of a kernel fit on one multiprocessor: the architectures' limits, and arithmetic.

The numbers are those of the CUDA programming guide ("Technical Specifications per Compute
Capability") and of cuda_occupancy.h.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WARP = 32
MAX_THREADS = 1024  # per block, on every architecture below
REGISTER_UNIT = 256  # registers are allocated to a warp in units of this many
PARTITIONS = 4  # a multiprocessor's register file has four parts, each for a fourth of the warps
SHARED_UNIT = 128  # bytes
SHARED_RESERVED = 1024  # bytes that the system reserves in each block's shared memory


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has; shared memory in bytes."""

    device: str  # the best-known GPU of that architecture
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536


LIMITS = {
    "sm_80": Limits("A100", 64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Limits("A10", 48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Limits("L40S", 48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Limits("H100", 64, 32, 228 * 1024, 227 * 1024),
}


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def blocks_per_sm(limits: Limits, registers: int, threads: int, shared: int) -> int:
    """Blocks that one multiprocessor holds at a time; 0: not even one can be launched.

    Args:
        limits: the architecture.
        registers: per thread.
        threads: per block.
        shared: bytes per block, static and dynamic, without those that the system reserves.
    """
    if threads > MAX_THREADS or shared > limits.shared_per_block:
        return 0
    warps = round_up(threads, WARP) // WARP
    per_warp = round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    resident = limits.registers // PARTITIONS // per_warp * PARTITIONS
    return min(
        limits.blocks,
        limits.warps // warps,
        resident // warps,
        limits.shared // round_up(shared + SHARED_RESERVED, SHARED_UNIT),
    )


def warps_per_sm(limits: Limits, registers: int, threads: int, shared: int) -> int:
    blocks = blocks_per_sm(limits, registers, threads, shared)
    return blocks * (round_up(threads, WARP) // WARP)


def _numbers(arch: str) -> tuple[int, int, str]:
    found = re.fullmatch(r"sm_(\d+)(\d)([af]?)", arch)
    if found is None:
        raise ValueError(f"'{arch}' is not an architecture such as sm_80 or sm_90a.")
    return int(found[1]), int(found[2]), found[3]


def limits_of(arch: str) -> Limits | None:
    """The limits of compiled code, or None if the table lacks them; sm_90a has those of sm_90."""
    return LIMITS.get(arch.rstrip("af"))


def code_for(device: str, compiled: set[str]) -> str | None:
    """Which of the compiled architectures a GPU runs, as the driver chooses: sm_86 runs sm_80 code.

    Args:
        device: the GPU's architecture, a key of LIMITS.
        compiled: the architectures in the binary; ``a`` runs only on its own GPU.
    """
    major, minor, _ = _numbers(device)
    fitting = []
    for arch in compiled:
        code_major, code_minor, suffix = _numbers(arch)
        same = code_minor == minor
        if code_major == major and (same or (code_minor < minor and suffix != "a")):
            fitting.append((code_minor, suffix, arch))
    return max(fitting)[2] if fitting else None
