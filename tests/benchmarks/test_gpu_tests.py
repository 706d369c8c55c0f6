"""How the GPU's tests are run: order, dead contexts, crashes and hangs, with pytest-xdist. No GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.on_gpu import tests as gpu_tests
from tests.benchmarks.programs import Done, python

pytest.importorskip("xdist")

#: The context of a process is dead from the test on that breaks it, as after a sticky CUDA error.
CONFTEST = """
import os, pytest
from benchmarks.on_gpu import pytest_plugin
DEAD = []
pytest_plugin.context_is_dead = lambda: bool(DEAD)

@pytest.fixture(autouse=True)
def context():
    if DEAD:
        raise RuntimeError("CUDA error: the context is dead")
"""
TESTS = """
import os, time, pytest
from conftest import DEAD

pytestmark = pytest.mark.cuda

def test_compiles(): pass
def test_first(): pass
def test_breaks_the_context():
    DEAD.append(1)
    raise RuntimeError("CUDA error: an illegal memory access")
def test_second(): pass
def test_crashes(): os._exit(9)
def test_third(): pass
def test_is_only_wrong(): assert 1 == 2
def test_hangs(): time.sleep(600)
def test_last(): pass
"""
KERNEL = "def test_a_kernel(): pass\n"
OTHER = "def test_needs_no_gpu(): raise AssertionError\n"
BAD = ("test_breaks_the_context", "test_crashes", "test_is_only_wrong", "test_hangs")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nmarkers =\n  cuda: x\n  cuda_build: x\npythonpath = .\n"
    )
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_other.py").write_text(OTHER)
    (tmp_path / "kernels" / "test_kernel.py").write_text(KERNEL)
    return tmp_path


def run(suite: Path, *options: str) -> Done:
    command = ("-m", "benchmarks.on_gpu.tests", "--backend", "none", "--workers", "1")
    return python(*command, *options, cwd=suite, SQK_TEST_SECONDS="4", PYTEST_ADDOPTS="")


def failed(text: str) -> set[str]:
    lines = [line for line in text.splitlines() if line.startswith("FAILED ")]
    return {line.split("::")[1].split(" ")[0].rstrip(":") for line in lines}


@pytest.mark.slow
def test_what_breaks_a_process_costs_one_test(suite: Path) -> None:
    """Each of them fails; every other test passes, in a process that stands in for the one that ended."""
    files = ["kernels/test_kernel.py", "test_some.py", "test_other.py"]
    done = run(suite, "--seconds", "120", *files)
    assert done.returncode == 1, done.stdout + done.stderr
    assert failed(done.stdout) == set(BAD), done.stdout
    assert "CUDA error: an illegal memory access" in done.stdout
    assert "the context is dead" not in done.stdout
    assert "needs_no_gpu" not in done.stdout


def test_kernels_come_first_and_compiling_last(suite: Path) -> None:
    order = "def test_{}():\n    open('order.txt', 'a').write('{}\\n')\n"
    mark = "import pytest\npytestmark = pytest.mark.cuda\n"
    (suite / "test_some.py").write_text(
        mark + order.format("it_compiles", "compile") + order.format("layer", "layer")
    )
    (suite / "kernels" / "test_kernel.py").write_text(order.format("kernel", "kernel"))
    done = run(suite, "--seconds", "60", "kernels/test_kernel.py", "test_some.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (suite / "order.txt").read_text().split() == ["kernel", "layer", "compile"]


def test_the_projects_tests_for_a_gpu_are_found() -> None:
    files = gpu_tests.test_files()
    expected = ["kernels/test_gemm.py", "gpu/test_cuda.py", "gpu/test_cuda_graphs.py"]
    assert {f"tests/{name}" for name in expected} <= set(files)
    first = [name.startswith("tests/kernels/") for name in files]
    assert first == sorted(first, reverse=True)
    assert "tests/smoothing/test_smooth.py" not in files


def test_the_end_of_the_time_stops_everything(suite: Path) -> None:
    hangs = "import time\ndef test_a(): time.sleep(600)\n"
    (suite / "kernels" / "test_kernel.py").write_text(hangs)
    done = run(suite, "--seconds", "3", "kernels/test_kernel.py")
    assert done.returncode == 1 and "stopped" in done.stdout
