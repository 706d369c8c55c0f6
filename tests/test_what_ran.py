"""What the suite prints of tests that did not run, and that no test starts a compiler unmarked."""

from __future__ import annotations

import pytest
import torch

from tests.support import what_ran

INNER = """
import subprocess, sys
import pytest

def start(folder, *arguments):
    program = folder / "g++"  # the name counts: no compiler is needed for this
    program.write_text("#!/bin/sh\\n")
    program.chmod(0o755)
    subprocess.run([str(program), *arguments], check=True)

def test_unmarked(tmp_path):
    start(tmp_path, "-c", "a.cpp")

@pytest.mark.compiler
def test_marked(tmp_path):
    start(tmp_path, "-c", "a.cpp")

def test_only_asks(tmp_path):
    start(tmp_path, "--version")

@pytest.mark.slow
def test_long(): ...

@pytest.mark.slow
@pytest.mark.simulator
def test_longer(): ...

@pytest.mark.parametrize("i", range(3))
def test_skips(i):
    pytest.skip("no GPU" if i else "no moon")
"""
INI = "[pytest]\nmarkers =\n" + "".join(f"    {name}\n" for name in what_ran.HEAVY)


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    pytester.makefile(".ini", pytest=INI)
    pytester.makepyfile(INNER)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments, plugins=[what_ran])


def test_nothing_is_left_out_silently(pytester: pytest.Pytester) -> None:
    found = run(pytester, "-m", "not slow", "--deselect", "test_nothing.py")
    found.stdout.fnmatch_lines(
        [
            f"torch {torch.__version__}*instructions: {torch.backends.cpu.get_cpu_capability()}*",
            "*not run, and why*",
            "*2  skipped: no GPU",
            "*1  skipped: no moon",
            "*1  not selected: slow",
            "*1  not selected: simulator",
        ],
        consecutive=False,
    )


def test_all_run_is_nothing_to_say(pytester: pytest.Pytester) -> None:
    found = run(pytester, "-k", "longer")
    assert "1  not selected: compiler" in found.stdout.str()
    assert what_ran.summary(what_ran.Counter(), what_ran.Counter()) == []


def test_a_compiler_needs_its_marker(pytester: pytest.Pytester) -> None:
    found = run(pytester)
    found.assert_outcomes(passed=5, errors=1, skipped=3)
    found.stdout.fnmatch_lines(["*starts a compiler and is not marked so: *g++ -c a.cpp*"])
    assert "ERROR at teardown of test_unmarked" in found.stdout.str()


def test_instructions_that_torch_does_not_take_are_an_error(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "abacus")
    found = run(pytester)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert "ATEN_CPU_CAPABILITY=abacus, but torch takes" in found.stderr.str()
