"""What attention to an int8 cache and its writer should take, by their bytes: nothing was measured.

Decoding reads all keys and values once, so its time is that of their bytes, plus what a kernel takes at least. int8
with a float32 scale per token and head has D + 4 bytes where float16 has 2 D: at most 1.94 times as fast at D = 128.
"""

from __future__ import annotations

from benchmarks.lib.caches import APPEND, ATTENTION, BATCHES, CONTEXTS, DTYPE, HEADS, Case

from .gpus import GPUS

#: Share of the data sheet's bandwidth that a kernel reaches, as in csrc/gemm/cost.cpp.
MEMORY = 0.9
#: Microseconds that the shortest kernel takes, and that merging the parts of a sequence adds. Both are assumed.
LEAST, MERGE = 2.0, 2.0
#: Prompts and decoded tokens that are written: (sequences, new tokens of each).
NEW = ((1, 1), (64, 1), (1, 2048), (1, 32768))

HEADER = ["GPU", "op", "model", "B", "T", "context", "MB", "float16 us", "int8 us", "vs float16"]


def microseconds(gpu: str, moved: int, more: float = 0.0) -> float:
    return max(LEAST, moved / (MEMORY * GPUS[gpu].gb_per_s) / 1e3) + more


def row(gpu: str, case: Case) -> list[str]:
    h = case.heads
    if case.op == ATTENTION:
        floats = 2 * DTYPE.itemsize * case.batch * h.dim * (h.kv * case.context + h.query)
        times = [microseconds(gpu, moved, MERGE) for moved in (floats, case.bytes)]
    else:  # float16 reads k and v and writes them as they are
        floats = 4 * DTYPE.itemsize * case.batch * h.kv * case.tokens * h.dim
        times = [microseconds(gpu, moved) for moved in (floats, case.bytes)]
    words = [gpu, case.op, h.model, *map(str, (case.batch, case.tokens, case.context))]
    numbers = [f"{case.bytes / 1e6:.1f}", *(f"{us:.1f}" for us in times)]
    return [*words, *numbers, f"{times[0] / times[1]:.2f}x"]


def table(gpus: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """Of the first model."""
    cases = [Case(ATTENTION, HEADS[0], b, 1, n) for n in sorted(CONTEXTS) for b in sorted(BATCHES)]
    cases += [Case(APPEND, HEADS[0], b, t, max(1024, t)) for b, t in NEW]
    return HEADER, [row(gpu, case) for gpu in gpus for case in cases]
