"""Defects in how Hopper's GEMM with weights of 4 bits orders its loads, its multiplications and its splits."""

from __future__ import annotations

import pytest

from tests.csrc.test_overlap import TOO_EARLY
from tests.support import mutants
from tests.support.mutants import WRONG_VALUES, Mutant

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

SOURCE = "csrc/gemm/instances/w4_wgmma_16x128x128_swap_sm90.cu"
MULTIPLY, LOAD = "gemm/w4/wgmma_multiply.cuh", "gemm/w4/wgmma_load.cuh"
EVERY_ROW, OWN = "test_gemm_w4_tiles.py", "test_gemm_w4_wgmma.py"
TILE = "w4_16x128x128_swap"
WEAK = tuple((seed, True) for seed in (1, 2, 3))
TICKET = """      fence_gpu();
      last = atomicAdd(p_.tickets + now.tile, 1u) + 1 == p_.splits;
      fence_gpu();
"""
WAIT = """    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i, ring.step()) load_tokens(now, i, i);
"""


def mutant(
    name: str,
    file: str,
    old: str,
    new: str,
    suite: str,
    tests: str,
    symptom: str,
    *,
    orders: tuple[tuple[int, bool], ...] = (),
    overlap: bool = False,
) -> Mutant:
    return Mutant(
        name,
        file,
        old,
        new,
        SOURCE,
        suite,
        f"{TILE} and {tests}",
        symptom,
        arch="sm_90",
        orders=orders,
        overlap=overlap,
    )


MUTANTS = (
    mutant(
        "a stage is given back while it is multiplied",
        MULTIPLY,
        "cute::warpgroup_wait<kInFlight>();",
        "cute::warpgroup_wait<kInFlight + 1>();",
        EVERY_ROW,
        "go_round",
        r"overwritten before wgmma\.wait_group",
    ),
    mutant(
        "no fences around the ticket",
        MULTIPLY,
        TICKET,
        TICKET.replace("      fence_gpu();\n", ""),
        EVERY_ROW,
        "need_not_be_cleared and 127",
        WRONG_VALUES,
        orders=WEAK,
    ),
    mutant(
        "tokens are loaded before the wait",
        LOAD,
        WAIT,
        "".join(reversed(WAIT.splitlines(keepends=True))),
        OWN,
        "chain",
        TOO_EARLY,
        overlap=True,
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
