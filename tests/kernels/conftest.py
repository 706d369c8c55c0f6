"""The backend under test, its GEMM tiles, and the number of compared results."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from tests.support import backends, c_gemm, compare


# For a module and not longer, because the tests of other folders need the default kernels.
@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    with backends.started(
        getattr(request, "param", request.config.getoption("--backend"))
    ) as found:
        yield found


@pytest.fixture
def compiled(backend: backends.Backend) -> backends.Backend:
    """A backend whose kernels are the CUDA sources."""
    if not backend.compiled:
        pytest.skip("no CUDA kernels on a CPU: --backend simulator or cuda")
    return backend


@pytest.fixture(scope="module")
def library(backend: backends.Backend) -> ctypes.CDLL:
    """The CUDA library with its C entries."""
    if not backend.compiled:
        pytest.skip("no CUDA kernels on a CPU: --backend simulator or cuda")
    return c_gemm.declare(backend.c_library)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes `tile` for each tile of the GEMM table, and any test for each backend.

    `w4_tile`: for each tile that serves weights of 4 bits.
    """
    option = metafunc.config.getoption("--backend")
    names = backends.several(option)
    if "backend" in metafunc.fixturenames and names not in ([], [option]):
        metafunc.parametrize("backend", names, indirect=True, scope="module")
    for argument, w4 in (("tile", False), ("w4_tile", True)):
        if argument not in metafunc.fixturenames:
            continue
        rows = backends.gemm_tiles(option, w4)
        # SQK_WITHOUT_TILES excludes tiles that must not run.
        tiles = [tile for tile in rows if not tile.get("excluded")]
        names = [tile["name"].replace(" ", "_") for tile in tiles]
        metafunc.parametrize(argument, tiles, ids=names)


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Resets the simulator's GPU after a failure, which would otherwise make all later kernels fail."""
    if call.excinfo is not None and item.config.getoption("--backend") == "simulator":
        ctypes.CDLL("libcudart.so.13").ptxsim_reset()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"compared with the reference: {compare.compared} results")
