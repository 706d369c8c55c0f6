"""Plants defects in a copy of the CUDA kernels, builds it, runs its tests in the simulator and checks how they fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import simulator
from tools.build.plan import ROOT, jobs

# Patterns of the output that show a failure.
WRONG_VALUES = r"\d elements differ, first at \("
NOT_WITHIN_THE_BOUND = r"int8 values are not within the bound|: scales .* not in "
OUT_OF_BOUNDS = r"out-of-bounds global"
UNINITIALIZED = r"uninitiali[sz]ed"
RACE = r"shared-memory race"
WROTE_OUTSIDE = r"wrote outside y"


@dataclass(frozen=True)
class Mutant:
    """One defect.

    Attributes:
        name: describes the defect.
        file: the changed file, relative to csrc.
        old: text that occurs in it exactly once.
        new: the text that replaces it.
        source: the source that is compiled with the change.
        suite: a file of tests/kernels.
        tests: tests of the suite, for pytest's -k; they take a few seconds at most.
        symptom: a pattern of the output; None: the tests pass.
        arch: the GPU to simulate.
        orders: (seed, weak) of `simulator.adversarial`. At least one shows the symptom, but the tests pass in the fixed
            order of blocks and warps. If empty, the fixed order shows it. Without a symptom the tests pass in all.
        overlap: launches overlap (`simulator.OVERLAP`); the tests pass where they do not. Without a symptom, in both.
        cuts: (file, old, new) that leave out code that the tests do not need, so that a copy compiles in a fraction of
            the time; old occurs exactly once.
    """

    name: str
    file: str
    old: str
    new: str
    source: str
    suite: str
    tests: str
    symptom: str | None
    arch: str = "sm_80"
    orders: tuple[tuple[int, bool], ...] = ()
    overlap: bool = False
    cuts: tuple[tuple[str, str, str], ...] = ()

    def planted(self, csrc: Path) -> Iterator[tuple[Path, str]]:
        """Yields the changed files under `csrc` with the text that each gets, one change after the other."""
        for name, old, new in ((self.file, self.old, self.new), *self.cuts):
            yield csrc / name, with_replaced(csrc / name, old, new)


def with_replaced(file: Path, old: str, new: str) -> str:
    """The text of a file that contains `old` exactly once, with `new` in its place."""
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} does not contain this exactly once: {old}"
    return text.replace(old, new)


def build_and_test(mutant: Mutant, root: Path) -> subprocess.CompletedProcess[str]:
    """Runs the mutant's tests with a library that has the defect, and removes `root`.

    A library has 100 MB and there are more than a hundred mutants: pytest, which removes its folders at the end or
    later, would fill a disk.
    """
    try:
        return _built_and_tested(mutant, root)
    finally:
        shutil.rmtree(root)


def _built_and_tested(mutant: Mutant, root: Path) -> subprocess.CompletedProcess[str]:
    shutil.copytree(ROOT / "csrc", root / "csrc")
    for file, text in mutant.planted(root / "csrc"):
        file.write_text(text)
    library = simulator.library_with(root, [mutant.source], mutant.arch)
    arguments = (f"tests/kernels/{mutant.suite}", "-x", "-k", mutant.tests)
    if mutant.overlap:
        done = simulator.few_kernel_tests(library, *arguments, arch=mutant.arch)
        assert done.returncode == 0, f"without overlap: {done.stdout}{done.stderr}"
        return simulator.few_kernel_tests(
            library, *arguments, arch=mutant.arch, environment=simulator.OVERLAP
        )
    if not mutant.orders:
        return simulator.few_kernel_tests(library, *arguments, arch=mutant.arch)
    # One thread here too: with several threads, chance decides which block comes last.
    done = simulator.few_kernel_tests(
        library, *arguments, arch=mutant.arch, environment={"PTXSIM_THREADS": "1"}
    )
    assert done.returncode == 0, f"the fixed order shows it: {done.stdout}{done.stderr}"
    for seed, weak in mutant.orders:
        order = simulator.adversarial(seed, weak=weak)
        done = simulator.few_kernel_tests(library, *arguments, arch=mutant.arch, environment=order)
        if done.returncode != 0:
            break
    return done


Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


def run_all(
    mutants: Sequence[Mutant],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Runs]:
    """The results of the selected mutants' tests by name; the mutants are built and tested in parallel."""
    simulator.require()
    simulator.library()
    wanted = {
        item.callspec.params.get("mutant")
        for item in request.session.items
        if item.fspath == request.fspath
    }
    with ThreadPoolExecutor(jobs(os.environ)) as pool:
        yield {
            mutant.name: pool.submit(build_and_test, mutant, tmp_path_factory.mktemp("mutant"))
            for mutant in mutants
            if mutant in wanted
        }


def assert_caught(mutant: Mutant, runs: Runs) -> None:
    """Checks that the tests failed as expected, or passed if nothing is wrong."""
    done = runs[mutant.name].result()
    said = done.stdout + done.stderr
    if mutant.symptom is None:
        assert done.returncode == 0, said
        assert re.search(r"\d passed", said) and "skipped" not in said, said
        return
    assert done.returncode == 1, f"no test failed (exit {done.returncode}): {said}"
    assert re.search(mutant.symptom, said), f"not {mutant.symptom!r}, but: {said[-6000:]}"
