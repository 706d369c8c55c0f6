"""The CUDA kernels' PTX, run on the CPU: tests/kernels inside of the simulator, for three architectures."""

from __future__ import annotations

import re

import pytest

from tests.support import simulator
from tools.build.plan import ROOT

#: What of tests/kernels depends on the GPU's limits: its table of GEMM tiles, the longest rows that fit, small samples.
LIMITS = (
    "smoke or every_path or every_tile or go_round or more_tiles or not_be_cleared or every_number_of_tokens"
    " or (long_rows and not bfloat16 and not float32)"
)
#: GPU -> (what is run, tests that must pass, results that must equal the reference): a suite that silently stopped to
#: run would pass as well. sm_89 runs the PTX of sm_80; only its limits are of interest.
ARCHS = {"sm_80": ("", 1500, 21_000), "sm_89": (LIMITS, 400, 3_000), "sm_90": ("", 1600, 21_000)}
#: The checks that stop a launch: every access is checked for its bounds in any case.
CHECKS = "init,race"


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    simulator.require()
    selected, least_passed, least_results = ARCHS[arch]
    arguments = ("tests/kernels", "-k", selected) if selected else ("tests/kernels",)
    done = simulator.kernel_tests(simulator.library(), *arguments, arch=arch, checks=CHECKS)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    results = re.search(r"compared with the reference: (\d+) results", done.stdout)
    assert passed and results, done.stdout[-2000:]
    with capsys.disabled():
        print(f"\n{arch}: {passed[0]}, {results[1]} results equal to the reference")
    collected = len(list((ROOT / "tests" / "kernels").glob("test_*.py")))
    assert collected >= 8
    assert int(passed[1]) > least_passed and int(results[1]) > least_results


#: What blocks do for each other: splits that add up by tickets, stream-K, clusters; every tile, in small shapes.
TOGETHER = "need_not_be_cleared and 127"
#: seed -> whether memory is weak as well, which the planted defects need to show (tests/csrc/test_planted_order.py).
ORDERS = {1: True, 2: False, 3: True}


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_any_order_of_blocks_gives_the_same_bits(arch: str, seed: int) -> None:
    simulator.require()
    done = simulator.kernel_tests(
        simulator.library(),
        "tests/kernels/test_gemm_c_entry.py",
        "-k",
        TOGETHER,
        arch=arch,
        checks="",
        environment=simulator.adversarial(seed, weak=ORDERS[seed]),
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 8, done.stdout[-2000:]
