"""A pytest plugin for a machine with a GPU: `pytest -p benchmarks.on_gpu.pytest_plugin`.

* It keeps what needs the CUDA library: tests/kernels, and tests marked `cuda` or `cuda_build`. Kernels come first,
  `torch.compile` comes last.
* After a CUDA error every later call in the same process fails. So a failure is followed by a cheap call to the GPU,
  and a process whose context is dead ends itself: pytest-xdist starts another.
* A test that hangs ends its process after SQK_TEST_SECONDS.
* Failures are printed when they happen.
"""

from __future__ import annotations

import faulthandler
import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

#: The exit status of a process whose CUDA context is dead.
DEAD = 75
#: Of a failure's text.
MOST_LINES = 25
MARKS = ("cuda", "cuda_build")

_failed: set[str] = set()


def place_of(item: pytest.Item) -> int | None:
    """0: a kernel alone, 1: what uses one, 2: compiles; None: needs no CUDA library."""
    if item.path.parent.name == "kernels":
        return 0
    if not any(item.get_closest_marker(name) for name in MARKS):
        return None
    function: Any = getattr(item, "function", None)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = ""
    compiles = any(word in source for word in ("torch.compile", "CompileCounter"))
    return 2 if compiles or "compile" in item.name else 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    placed = [(place, item) for item in items if (place := place_of(item)) is not None]
    items[:] = [item for _, item in sorted(placed, key=lambda one: one[0])]


def context_is_dead() -> bool:
    """Asks the GPU, if this process has used it at all."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    seconds = float(os.environ.get("SQK_TEST_SECONDS", "60"))
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if item.nodeid in _failed and context_is_dead():
        os._exit(DEAD)  # the reports are sent and printed by now
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)


class Printer:
    """In the controller, which hears of all workers."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            text = report.longreprtext.splitlines()[-MOST_LINES:]
            for line in ("", f"FAILED {report.nodeid} ({report.when})", *text):
                terminal.write_line(line)
            terminal.flush()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Printer(config), "gpu-printer")
