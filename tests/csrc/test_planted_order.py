"""Defects of memory order in how blocks add up a tile's splits, which only random orders and weak memory show.

Each is planted in a copy of the GEMMs. The tests still pass in the simulator's fixed order of blocks and warps.
"""

from __future__ import annotations

import pytest

from tests.csrc.test_planted_gemm import ENTRY, PAIRS, mma_source
from tests.support import mutants
from tests.support.mutants import WRONG_VALUES, Mutant

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

WEAK = tuple((seed, True) for seed in (1, 2, 3))
RANDOM = tuple((seed, False) for seed in (1, 2, 3))

TICKET = """  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    fence_gpu();
    last = atomicAdd(p.tickets + tile, 1u) + 1 == p.splits;
    fence_gpu();
    if (last) p.tickets[tile] = 0;  // for the next launch: nobody else takes one in this launch
  }
"""


def without(name: str, new: str, orders: tuple[tuple[int, bool], ...]) -> Mutant:
    return Mutant(
        name,
        "gemm/mma/kernel.cuh",
        TICKET,
        new,
        mma_source(PAIRS),
        ENTRY,
        f"need_not_be_cleared and {PAIRS[0]}",
        None if new == TICKET else WRONG_VALUES,
        orders=orders,
    )


MUTANTS = (
    without("no fences", TICKET.replace("    fence_gpu();\n", ""), WEAK),
    without(
        "the fence comes before the barrier, and is one thread's",
        "  if (threadIdx.x == 0) fence_gpu();\n" + TICKET.replace("    fence_gpu();\n", ""),
        WEAK,
    ),
    without("no barrier before the ticket", TICKET.removeprefix("  __syncthreads();\n"), WEAK),
    without("nothing is wrong", TICKET, WEAK + RANDOM),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
