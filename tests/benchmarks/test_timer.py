"""The clock: what is called, in which order, and what the numbers are. No test looks at a time."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.lib import timer
from benchmarks.lib.timer import Timing

CPU = torch.device("cpu")


def test_variants_are_interleaved() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timer.interleaved(variants, seconds=0, least=5)
    assert calls == ["a", "b"] * (2 + 5)
    assert len(times["a"]) == len(times["b"]) == 5


def test_ratios_are_taken_pair_by_pair() -> None:
    """A machine that slows down tenfold half-way changes no ratio."""
    assert timer.median_ratio([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]) == 2.0


def test_the_summary_is_median_and_fifths() -> None:
    timing = timer.summary([5.0, 1.0, 2.0, 3.0, 4.0, 100.0], calls=7)
    assert timing == Timing(3.5, 2.0, 5.0, 6, 7)


def test_input_sets_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timer.input_sets(1, CPU) == 2
    monkeypatch.setattr(timer, "l2_bytes", lambda device: 50 << 20)
    found = [timer.input_sets(size, CPU) for size in (12 << 10, 25 << 20, 700 << 20)]
    assert found == [timer.MOST_SETS, 8, 2]


def test_a_gpu_replay_is_one_graph_between_two_events_with_a_cold_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of the calls, on a pretended GPU: every input set once per graph, and variants in turn."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 0.006  # milliseconds

    @contextlib.contextmanager
    def scope(name: str) -> Any:
        log.append(name)
        yield
        log.append("end")

    cuda = SimpleNamespace(
        Event=Event,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        Stream=lambda device: None,
        stream=lambda stream: scope("side"),
        graph=lambda graph: scope("capture"),
        synchronize=lambda device: None,
        _sleep=lambda cycles: log.append("sleep"),
    )
    flush = SimpleNamespace(sum=lambda: log.append("flush"))
    fake = SimpleNamespace(cuda=cuda, ones=lambda *a, **k: flush, float32=None)
    monkeypatch.setattr(timer, "torch", fake)
    monkeypatch.setattr(timer, "l2_bytes", lambda device: 1024)
    device: Any = SimpleNamespace(type="cuda")
    recorded = timer.record([lambda name=name: log.append(name) for name in "abc"], device)
    assert log == [*"abc", "side", "a", "end", "capture", *"abc", "end"]
    log.clear()
    variants = {"one": recorded, "two": recorded}
    times = timer.measure(variants, device=device, seconds=0, least=4, most=4)
    each = ["sleep", "flush", "event", "replay", "event"]
    assert log == each * 2 * (2 + 4)
    assert times["one"].us == pytest.approx(2.0) and times["one"].rounds == 4
