"""A pytest plugin: it lists the tests that did not run, and enforces the marker `compiler`.

At the end of a run it prints each reason to skip with its number of tests, and how many tests the marker expression
deselected. A test that starts a compiler without the marker `compiler` (or `simulator`) fails, so `make test` needs
no compiler.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

#: The markers of tests that are not quick. A test counts under the first of these that it has.
HEAVY = ("simulator", "compiler", "real_model", "slow")
COMPILERS = {"nvcc", "g++", "gcc", "c++", "cc", "cpp", "clang", "clang++", "ccache"}

_LEFT_OUT = "left_out"
_COUNTS = pytest.StashKey["Counter[str]"]()
_started: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "subprocess.Popen":
        return
    program, command = arguments[0], arguments[1]
    if Path(os.fsdecode(program)).name not in COMPILERS:
        return
    words = [command] if isinstance(command, (str, bytes, os.PathLike)) else list(command)
    if "--version" not in map(os.fsdecode, words):
        _started.append(" ".join(map(os.fsdecode, words[:4])))


def pytest_configure(config: pytest.Config) -> None:
    wanted = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    taken = torch.backends.cpu.get_cpu_capability().lower()
    if wanted not in ("", taken):
        raise pytest.UsageError(f"ATEN_CPU_CAPABILITY={wanted}, but torch takes {taken}")
    if not hasattr(sys, "_sqk_watches_compilers"):  # an audit hook cannot be taken back
        sys.addaudithook(_watch)
        sys._sqk_watches_compilers = True  # type: ignore[attr-defined]


def pytest_report_header(config: pytest.Config) -> str:
    return (
        f"torch {torch.__version__}, instructions: {torch.backends.cpu.get_cpu_capability()}, "
        f"threads: {torch.get_num_threads()}"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    _started.clear()
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    marked = any(item.get_closest_marker(name) for name in ("compiler", "simulator"))
    if _started and not marked:
        pytest.fail(
            f"starts a compiler without the marker `compiler`: {_started[0]}", pytrace=False
        )


# --- tests that did not run -------------------------------------------------------------------------------------------


def _reason(item: pytest.Item) -> str:
    return next((name for name in HEAVY if item.get_closest_marker(name)), "other")


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        counts = items[0].config.stash.setdefault(_COUNTS, Counter())
        counts.update(map(_reason, items))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A pytest-xdist worker reports its counts to the main process, which collects no tests itself."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_LEFT_OUT] = dict(session.config.stash.get(_COUNTS, Counter()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Takes the counts of one worker, not their sum: every worker deselects the same tests."""
    counts = getattr(node, "workeroutput", {}).get(_LEFT_OUT)
    if counts is not None:
        node.config.stash[_COUNTS] = Counter(counts)


def summary(skipped: Counter[str], left_out: Counter[str]) -> list[str]:
    """The lines to print, the most frequent reason first."""
    lines = [f"{count:6}  skipped: {reason}" for reason, count in skipped.most_common()]
    return lines + [f"{count:6}  not selected: {name}" for name, count in left_out.most_common()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[reason.removeprefix("Skipped: ")] += 1
    lines = summary(skipped, terminalreporter.config.stash.get(_COUNTS, Counter()))
    if lines:
        terminalreporter.section("not run, and why")
        for line in lines:
            terminalreporter.write_line(line)
