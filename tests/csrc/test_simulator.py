"""Runs the PTX of the CUDA kernels on the CPU: tests/kernels in the simulator, for three architectures."""

from __future__ import annotations

import re

import pytest

from tests.support import share, simulator
from tools.build.plan import ROOT

#: The tests that depend on the GPU's limits: its table of GEMM tiles, the longest rows that fit, small samples.
LIMITS = (
    "smoke or every_path or every_tile or go_round or more_tiles or not_be_cleared or every_number_of_tokens"
    " or (long_rows and not bfloat16 and not float32)"
)
#: GPU -> (tests to run, least number that pass, least number of results that equal the reference). Without the numbers
#: a suite that runs nothing would pass. sm_89 runs the PTX of sm_80, so only its limits are tested.
ARCHS = {"sm_80": ("", 1500, 21_000), "sm_89": (LIMITS, 400, 3_000), "sm_90": ("", 1600, 21_000)}
#: The checks that stop a launch. The bounds of every access are always checked.
CHECKS = "init,race"


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(
    arch: str, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    simulator.require()
    selected, least_passed, least_results = ARCHS[arch]
    arguments = ["tests/kernels", *share.arguments(pytestconfig)]
    arguments += ["-k", selected] if selected else []
    done = simulator.kernel_tests(simulator.library(), *arguments, arch=arch, checks=CHECKS)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    results = re.search(r"compared with the reference: (\d+) results", done.stdout)
    assert passed and results, done.stdout[-2000:]
    with capsys.disabled():
        print(f"\n{arch}: {passed[0]}, {results[1]} results equal to the reference")
    collected = len(list((ROOT / "tests" / "kernels").glob("test_*.py")))
    assert collected >= 8
    parts = share.parts(pytestconfig)
    parts = 1 if parts == 1 else 2 * parts  # shares differ in size: half of one is asked for
    assert int(passed[1]) > least_passed // parts and int(results[1]) > least_results // parts


#: Cooperation of blocks: splits with tickets, stream-K, clusters, scales of gated rows; every tile, in small shapes.
#: Then the int8 cache: tokens that share blocks, and parts of a sequence that the last block merges.
#: Rings of 4-bit weights whose lanes share steps. Blocks that find their tiles in the offsets of experts, or
#: share the experts which have rows.
TOGETHER = (
    "(need_not_be_cleared and 127) or every_gated_tile or smoke_kv_append or smoke_decode"
    " or smoke_w4_stream or smoke_grouped"
)
#: seed -> whether memory is weak too, without which the defects planted by test_planted_order.py do not show.
ORDERS = {1: True, 2: False, 3: True}


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_any_order_of_blocks_gives_the_same_bits(arch: str, seed: int) -> None:
    simulator.require()
    done = simulator.kernel_tests(
        simulator.library(),
        "tests/kernels/test_gemm_c_entry.py",
        "tests/kernels/test_gated_c_entry.py",
        "tests/kernels/test_gemm_w4_stream.py",
        "tests/kernels/test_gemm_w4_tiles.py",
        "tests/kernels/test_grouped_stream.py",
        "tests/kernels/test_grouped_wgmma.py",
        "tests/kernels/test_kv_append.py",
        "tests/kernels/test_decode_attention.py",
        "tests/kernels/test_grouped_c_entry.py",
        "-k",
        TOGETHER,
        arch=arch,
        checks="",
        environment=simulator.adversarial(seed, weak=ORDERS[seed]),
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 8, done.stdout[-2000:]
