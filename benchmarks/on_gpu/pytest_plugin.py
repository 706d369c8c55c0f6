"""A pytest plugin for a machine with a GPU: `pytest -p pytest_gpu`, with this folder on PYTHONPATH.

* It keeps what needs the CUDA library: tests/kernels, and tests marked `cuda` or `cuda_build`. Kernels come first,
  `torch.compile` comes last.
* After a CUDA error every later call in the same process fails. So a failure is followed by a cheap question to the
  GPU, and a process whose context is dead ends itself: pytest-xdist, or gpu_tests.py, starts another.
* A test that hangs ends its process after SQK_TEST_SECONDS.
* Failures are printed when they happen.
"""

from __future__ import annotations

import faulthandler
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: The exit status of a process whose CUDA context is dead.
DEAD = 75
#: Of a failure's text.
MOST_LINES = 25
MARKS = ("cuda", "cuda_build")
#: The last line of a journal whose process has come to its end.
FINISHED = "(finished)"

_failed: set[str] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-journal", metavar="FILE", help="tests that it names are left out; further ones are added"
    )  # fmt: skip


def is_worker(config: pytest.Config) -> bool:
    """Of pytest-xdist: the controller prints what it hears of its workers."""
    return hasattr(config, "workerinput")


# --- which, and in what order -----------------------------------------------------------------------------------------


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
    return 2 if "compile" in item.name or "torch.compile" in source or "CompileCounter" in source else 1  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = done_before(config)
    placed = [(place, item) for item in items if (place := place_of(item)) is not None]
    kept = [item for _, item in sorted(placed, key=lambda one: one[0])]
    items[:] = [item for item in kept if item.nodeid not in known]


def done_before(config: pytest.Config) -> set[str]:
    """Tests that an earlier process has begun: what ended it must not end this one too."""
    name = config.getoption("--gpu-journal")
    if not name or not Path(name).exists():
        return set()
    return set(Path(name).read_text().splitlines())


# --- a context that is dead -------------------------------------------------------------------------------------------


def context_is_dead() -> bool:
    """Asks the GPU, where this process has used it at all."""
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
    note(item.config, item.nodeid)
    try:
        result = yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    if item.nodeid in _failed and context_is_dead():
        os._exit(DEAD)  # the reports are sent and printed by now
    return result


def note(config: pytest.Config, line: str) -> None:
    if journal := config.getoption("--gpu-journal"):
        with open(journal, "a") as file:
            print(line, file=file)


def pytest_sessionfinish(session: pytest.Session) -> None:
    note(session.config, FINISHED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)


class Printer:
    """Where there are no workers, or in their controller."""

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
    if not is_worker(config):
        config.pluginmanager.register(Printer(config), "gpu-printer")
