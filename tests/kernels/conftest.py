"""The backend under test, the rows of its GEMM table, and a count of what was compared."""

from __future__ import annotations

import ctypes

import pytest

from tests.support import backends, c_gemm, compare


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    return backends.start(request.config.getoption("--backend"))


@pytest.fixture
def compiled(backend: backends.Backend) -> backends.Backend:
    """A backend whose kernels are the CUDA sources."""
    if not backend.compiled:
        pytest.skip("the CPU path has no CUDA kernels: --backend simulator or cuda")
    return backend


@pytest.fixture(scope="session")
def library(backend: backends.Backend) -> ctypes.CDLL:
    """The C entries."""
    if not backend.compiled:
        pytest.skip("the CPU path has no C entries")
    return c_gemm.declare(backend.c_library)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `tile` is run for each row of the GEMM table."""
    if "tile" in metafunc.fixturenames:
        rows = backends.gemm_tiles(metafunc.config.getoption("--backend"))
        # A row that SQK_WITHOUT_TILES rules out must not run here either.
        tiles = [tile for tile in rows if not tile.get("excluded")]
        names = [tile["name"].replace(" ", "_") for tile in tiles]
        metafunc.parametrize("tile", tiles, ids=names)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """A kernel that failed would fail all that come after it: the simulator's GPU starts afresh."""
    if call.excinfo is not None and item.config.getoption("--backend") == "simulator":
        ctypes.CDLL("libcudart.so.13").ptxsim_reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"compared with the reference: {compare.compared} results")
