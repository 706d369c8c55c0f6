"""The CUDA kernels' PTX, run on the CPU: tests/kernels inside of the simulator, for three architectures."""

from __future__ import annotations

import re

import pytest
import simulator
from build_support import ROOT

#: The GPUs, and the checks that stop a launch: every access is checked for its bounds in any case.
ARCHS = ("sm_80", "sm_89", "sm_90")
CHECKS = "init,race"


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    simulator.require()
    done = simulator.kernel_tests(simulator.library(), "tests/kernels", arch=arch, checks=CHECKS)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    results = re.search(r"compared with the reference: (\d+) results", done.stdout)
    assert passed and results, done.stdout[-2000:]
    with capsys.disabled():
        print(f"\n{arch}: {passed[0]}, {results[1]} results equal to the reference")
    # A suite that silently stopped to run would pass as well.
    collected = len(list((ROOT / "tests" / "kernels").glob("test_*.py")))
    assert collected >= 4 and int(passed[1]) > 900 and int(results[1]) > 15_000
