"""What a rotation should cost in `quantize` on 16-bit rows, by counted instructions: nothing was measured.

A rotation moves no bytes. It costs time only where its instructions, or its shuffles, take longer than memory does.
"""

from __future__ import annotations

from .gpus import GPUS

GROUPS = (0, 64, 128, 256)
TOKENS = (1, 64, 2048)
#: Executed instructions per element of the path wide on sm_80: without a rotation, of a stage within a thread, and of
#: one between lanes, where 70 instructions serve a thread's 32 elements.
PLAIN, WITHIN, BETWEEN = 13.3, 1.0, 70 / 32
#: A thread of the path block, which takes single rows, has 8 elements: 18 instructions.
BETWEEN_BLOCK = 18 / 8
#: Threads per SM and clock that issue, and that exchange a value (CUDA C++ Programming Guide, arithmetic throughput).
ISSUED, EXCHANGED = 128, 32
#: Memory reaches nine tenths of its data sheet, as for the GEMMs.
MEMORY = 0.9


def stages(group: int) -> tuple[int, int]:
    """How many stages lie within a thread, which has 8 adjacent channels, and how many between lanes."""
    number = max(0, group.bit_length() - 1)
    return min(3, number), max(0, number - 3)


def clocks(group: int, elements: float) -> float:
    """Clocks of one SM on the path wide, where some rows' rotations overlap with others' loads and stores."""
    within, between = stages(group)
    issue = elements * (PLAIN + within * WITHIN + between * BETWEEN) / ISSUED
    return max(issue, elements * between / EXCHANGED)


def added_clocks(group: int, elements: float) -> float:
    """Clocks that a rotation adds to one row in one block, where nothing else runs at that time."""
    within, between = stages(group)
    issue = elements * (within * WITHIN + between * BETWEEN_BLOCK) / ISSUED
    return max(issue, elements * between / EXCHANGED)


def microseconds(gpu: str, m: int, k: int, group: int) -> float:
    """Without the launch and without latencies. Up to one row per SM takes the path block."""
    facts = GPUS[gpu]
    memory = 3 * m * k / (MEMORY * facts.gb_per_s) / 1e3
    if m <= facts.sms:
        return memory + added_clocks(group, k) / facts.ghz / 1e3
    return max(memory, clocks(group, m * k / facts.sms) / facts.ghz / 1e3)


def table(gpus: tuple[str, ...], k: int = 4096) -> tuple[list[str], list[list[str]]]:
    """The time that a rotation adds, in microseconds."""
    rows = []
    for gpu in gpus:
        for m in TOKENS:
            plain = microseconds(gpu, m, k, 0)
            added = [microseconds(gpu, m, k, group) - plain for group in GROUPS[1:]]
            rows.append([gpu, str(m), f"{plain:.2f}", *(f"+{us:.2f}" for us in added)])
    return ["GPU", "M", "memory us", *(f"g = {group}" for group in GROUPS[1:])], rows
