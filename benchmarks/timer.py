"""Timing on machines whose speed drifts: interleaved variants, medians, and ratios taken pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Variant = Callable[[], object]


def interleaved(
    variants: Mapping[str, Variant], *, seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """Seconds of each call, the variants in turn (A B C A B C ...) so that drift hits all alike.

    Args:
        variants: name -> function without arguments.
        seconds: about how long to measure in all; every variant gets the same number of calls.
        least, most: bounds of that number.
    """
    begin = time.perf_counter()
    for call in variants.values():  # warm-up: allocations, packing, the choice of kernels
        call()
    once = time.perf_counter() - begin
    for call in variants.values():
        call()
    rounds = max(least, min(most, int(seconds / max(once, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of slow / fast: both were measured side by side in each."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
