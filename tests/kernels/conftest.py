"""The backend under test, and a count of what was compared."""

from __future__ import annotations

import backends
import compare
import pytest


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    return backends.start(request.config.getoption("--backend"))


@pytest.fixture
def compiled(backend: backends.Backend) -> backends.Backend:
    """A backend whose kernels are the CUDA sources."""
    if not backend.compiled:
        pytest.skip("the CPU path has no CUDA kernels: --backend simulator or cuda")
    return backend


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"compared with the reference: {compare.compared} results")
