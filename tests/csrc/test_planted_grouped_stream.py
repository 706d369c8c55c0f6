"""Defects planted in a copy of the streaming GEMM by experts: its tests in the simulator catch each one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, RACE, UNINITIALIZED, WRONG_VALUES, Mutant

# In one worker of pytest-xdist with test_planted.py, because both need the same library.
pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

FILE = "gemm/grouped/stream.cuh"
#: What the simulator says of an access outside of the block's shared memory.
OUTSIDE_SHARED = r"out-of-bounds shared"


def defect(name: str, old: str, new: str, tests: str, symptom: str | None) -> Mutant:
    """A mutant of the kernel for 8 rows, run by the tests that have no more."""
    source = "csrc/gemm/instances/grouped_stream_8x16.cu"
    return Mutant(name, FILE, old, new, source, "test_grouped_stream.py", tests, symptom)


WAIT = "  wait_for_previous_kernel();\n  allow_next_kernel();\n"
EXPERTS = "  const ExpertsWithRows experts(p);\n"
MUTANTS = (
    defect(
        "offsets are not clamped",
        "return max(0, min(load_fresh(p.offsets + expert), p.all.epilogue.m));",
        "return load_fresh(p.offsets + expert);",
        "bad_offsets and 3",
        f"{OUT_OF_BOUNDS}|{OUTSIDE_SHARED}|{UNINITIALIZED}",
    ),
    defect(
        "rows are not clamped",
        "row[threadIdx.x] = max(0, min(given, p.x_rows - 1));",
        "row[threadIdx.x] = given;",
        "bad_rows",
        OUT_OF_BOUNDS,
    ),
    defect(
        "rows are used before all of them are there",
        "  __syncthreads();  // `row` is there\n",
        "",
        "bad_rows",
        f"{RACE}|{UNINITIALIZED}",
    ),
    defect(
        "an expert's rows are taken from the first row on",
        "own.row = row + begin;",
        "own.row = row;",
        "smoke and 5",
        WRONG_VALUES,
    ),
    defect(
        "an expert's rows have the scales of the first ones",
        "if (e.x_per_token) e.x_scale += begin;",
        "",
        "smoke and 5",
        WRONG_VALUES,
    ),
    defect(
        "rows after the last expert are left as they were",
        "if (row >= begin && row < end) continue;",
        "if (row >= begin) continue;",
        "smoke and 5",
        WRONG_VALUES,
    ),
    defect(
        "only the first 32 experts that a lane holds are counted",
        "if (lane == first / 32 + i) mine = bits;",
        "if (lane == i) mine = bits;",
        "last_of_many",
        WRONG_VALUES,
    ),
    defect(
        "the number of an expert leaves out those before its lane",
        "return 32 * holder + __ffs(",
        "return __ffs(",
        "last_of_many",
        WRONG_VALUES,
    ),
    defect(
        "rows always stay in shared memory, even if they do not fit",
        "own.resident = rows * own.stages * kStage <= own.activation_bytes;",
        "own.resident = true;",
        "long_rows and 10001",
        f"{OUTSIDE_SHARED}|{RACE}|{WRONG_VALUES}",
    ),
    defect(
        "blocks of one expert take all tiles of another",
        "own.step = blocks;",
        "own.step = gridDim.x;",
        "several_tiles",
        WRONG_VALUES,
    ),
    replace(
        defect(
            "offsets are read before the wait",
            WAIT,
            "",
            "chain and 6",
            WRONG_VALUES,
        ),
        arch="sm_90",
        overlap=True,
        cuts=((FILE, EXPERTS, EXPERTS + WAIT),),
    ),
    # The same tests with unchanged sources must pass, so the failures above are due to the defects.
    defect(
        "nothing is wrong",
        "own.step = blocks;",
        "own.step = blocks + 0;",
        "bad or (smoke and 5) or last_of_many or (long_rows and 10001) or several_tiles or chain",
        None,
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
