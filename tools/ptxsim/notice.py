"""A plugin of pytest: after tests that ran in the simulator it says what their results are worth.

The simulator is written from NVIDIA's documents. Until its results have been compared with a GPU's and
the comparison is recorded in COMPARISON, every run of it says so.
"""

from __future__ import annotations

from pathlib import Path

import pytest

#: Records which instructions gave the same bits on which GPU; a comparison on a GPU writes it.
COMPARISON = Path(__file__).with_name("compared_with_gpu.json")
TEXT = "the simulator has not been compared with a GPU yet"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if "simulator" in report.keywords or "tools/ptxsim/" in report.nodeid
    ]
    if ran and not COMPARISON.is_file():
        terminalreporter.write_line(f"{len(ran)} tests ran in a simulator of PTX: {TEXT}")
