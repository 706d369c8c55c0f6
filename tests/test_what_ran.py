"""The suite lists the tests that did not run, and fails a test that starts a compiler without the marker."""

from __future__ import annotations

import pytest
import torch

from tests.support import what_ran

INNER = """
import subprocess, sys
import pytest

def start(folder, *arguments):
    program = folder / "g++"  # the plugin looks at the name only, so no compiler is needed
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


def test_skipped_and_deselected_tests_are_listed(pytester: pytest.Pytester) -> None:
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


def test_nothing_is_listed_when_all_tests_run(pytester: pytest.Pytester) -> None:
    found = run(pytester, "-k", "longer")
    assert "1  not selected: compiler" in found.stdout.str()
    assert what_ran.summary(what_ran.Counter(), what_ran.Counter()) == []


def test_starting_a_compiler_needs_the_marker(pytester: pytest.Pytester) -> None:
    found = run(pytester)
    found.assert_outcomes(passed=5, errors=1, skipped=3)
    found.stdout.fnmatch_lines(["*starts a compiler without the marker `compiler`: *g++ -c a.cpp*"])
    assert "ERROR at teardown of test_unmarked" in found.stdout.str()


def test_unsupported_cpu_instructions_are_an_error(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "abacus")
    found = run(pytester)
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert "ATEN_CPU_CAPABILITY=abacus, but torch takes" in found.stderr.str()
