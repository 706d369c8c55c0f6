"""Interleaved timing: plain calls on a CPU, CUDA graphs with a cold L2 cache on a GPU.

Events around one kernel below 100 us measure the gap in which the CPU enqueues it. So each variant becomes a CUDA graph
that calls it once on each of several input sets, and a replay's time is divided by the number of calls. The L2 cache is
filled with something else before every replay, and no two calls of a graph share an input or an output: every call
finds its data in device memory, as a layer of a large model does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]
Round = Callable[[Mapping[str, "Recorded"]], dict[str, float]]

#: Calls in a graph: enough for a few hundred microseconds of small kernels.
MOST_SETS = 32
#: How much more than the L2 cache a graph's inputs, where they can, and the filling between replays take.
L2_TIMES = 4
#: Clock cycles that the GPU idles before each replay (some 0.3 ms), so that the CPU has enqueued the start event, the
#: graph and the stop event before the GPU reaches the first of them.
IDLE_CYCLES = 500_000


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: the median over the rounds, and how far they spread."""

    us: float
    p20: float
    p80: float
    rounds: int
    calls: int  # in each round


@dataclass(frozen=True)
class Recorded:
    """A variant that is ready to be timed: `replay` makes `calls` calls."""

    replay: Call
    calls: int
    keep: Any = None  # what must live as long as the graph


def l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache; 0 on a CPU, where no cache is kept cold."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def input_sets(bytes_per_call: int, device: torch.device) -> int:
    """How many input sets to rotate through: more than the L2 cache holds, within 2 .. MOST_SETS."""
    wanted = math.ceil(L2_TIMES * l2_bytes(device) / max(bytes_per_call, 1))
    return max(2, min(MOST_SETS, wanted))


def record(calls: Sequence[Call], device: torch.device) -> Recorded:
    """Warms up every call and, on a GPU, captures them all, one after the other, in one graph."""
    for call in calls:  # all: a compiled function must not meet new guards during the capture
        call()
    if device.type != "cuda":
        return Recorded(lambda: [call() for call in calls], len(calls))
    torch.cuda.synchronize(device)
    # Lazy initialization, off the default stream.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        calls[0]()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    results = []
    with torch.cuda.graph(graph):
        for call in calls:
            results.append(call())  # held until the end, so that no call writes where another wrote
    return Recorded(graph.replay, len(calls), (graph, calls))


def measure(
    variants: Mapping[str, Recorded],
    *,
    device: torch.device,
    seconds: float,
    least: int = 10,
    most: int = 400,
) -> dict[str, Timing]:
    """Times all variants in turn (A B C A B C ...), so that clocks and temperature hit all alike.

    Args:
        seconds: about how long to measure in all; every variant gets the same number of rounds.
        least, most: bounds of that number.
    """
    one_round = _gpu_round(device) if device.type == "cuda" else _cpu_round
    samples = _samples(variants, one_round, seconds, least, most)
    return {name: summary(values, variants[name].calls) for name, values in samples.items()}


def interleaved(
    variants: Mapping[str, Call], *, seconds: float, least: int = 5, most: int = 200
) -> dict[str, list[float]]:
    """Microseconds of every call on the CPU, the variants in turn."""
    plain = {name: Recorded(call, 1) for name, call in variants.items()}
    return _samples(plain, _cpu_round, seconds, least, most)


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median over the rounds of slow / fast: both were measured side by side in each."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def summary(samples: Sequence[float], calls: int) -> Timing:
    """The median and the 20th and 80th percentile of microseconds per call."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3], len(samples), calls)


def _samples(
    variants: Mapping[str, Recorded], one_round: Round, seconds: float, least: int, most: int
) -> dict[str, list[float]]:
    one_round(variants)  # allocations, packing, the choice of kernels
    start = time.perf_counter()
    one_round(variants)
    once = time.perf_counter() - start
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(max(least, min(most, int(seconds / max(once, 1e-9))))):
        for name, us in one_round(variants).items():
            samples[name].append(us / variants[name].calls)
    return samples


def _cpu_round(variants: Mapping[str, Recorded]) -> dict[str, float]:
    times = {}
    for name, variant in variants.items():
        start = time.perf_counter()
        variant.replay()
        times[name] = (time.perf_counter() - start) * 1e6
    return times


def _gpu_round(device: torch.device) -> Round:
    # Read, not written: a cache full of dirty lines would charge its write-back to the next kernel.
    flush = torch.ones(L2_TIMES * l2_bytes(device) // 4, dtype=torch.float32, device=device)

    def one_round(variants: Mapping[str, Recorded]) -> dict[str, float]:
        events = {}
        for name, variant in variants.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(IDLE_CYCLES)
            flush.sum()
            start.record()
            variant.replay()
            stop.record()
            events[name] = (start, stop)
        torch.cuda.synchronize(device)
        return {name: 1e3 * start.elapsed_time(stop) for name, (start, stop) in events.items()}

    return one_round
