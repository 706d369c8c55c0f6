"""Defects in how Hopper's GEMM by experts finds its tiles, keeps to their rows, orders its loads and gathers rows."""

from __future__ import annotations

import pytest

from tests.csrc.test_overlap import TOO_EARLY
from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, RACE, WRONG_VALUES, Mutant

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

FEW, MANY = "16x128x128_swap", "128x128x128"
KERNEL, FIND, MULTIPLY, GATHER = (
    f"gemm/grouped/{name}"
    for name in ("wgmma.cuh", "wgmma_params.cuh", "wgmma_multiply.cuh", "gather_sm90.cu")
)
SMOKE = "smoke and False"
OWN = "epilogue_of(p_.epilogue, now.expert, now.last)"


def mutant(
    name: str,
    file: str,
    old: str,
    new: str,
    symptom: str | None,
    tests: str = SMOKE,
    tile: str = FEW,
    *,
    overlap: bool = False,
) -> Mutant:
    instance = f"csrc/gemm/instances/grouped_wgmma_{tile}_sm90.cu"
    return Mutant(
        name,
        file,
        old,
        new,
        f"csrc/{file}" if file == GATHER else instance,
        "test_grouped_wgmma.py",
        f"{tile} and {tests}",
        symptom,
        arch="sm_90",
        overlap=overlap,
    )


MUTANTS = (
    mutant(
        "a stage is given back while it is multiplied",
        MULTIPLY,
        "cute::warpgroup_wait<kInFlight>();",
        "cute::warpgroup_wait<kInFlight + 1>();",
        r"overwritten before wgmma\.wait_group",
        "goes_on",
    ),
    mutant(
        "all experts have the weights of the first one",
        MULTIPLY,
        "now.channel0, now.expert, full",
        "now.channel0, 0, full",
        WRONG_VALUES,
    ),
    mutant(
        "all experts have the scales of the first one",
        MULTIPLY,
        OWN,
        OWN.replace("now.expert", "0"),
        WRONG_VALUES,
        tile=MANY,
    ),
    mutant(
        "a tile stores rows beyond its expert's",
        MULTIPLY,
        OWN,
        OWN.replace("now.last", "p_.epilogue.m"),
        WRONG_VALUES,
        tile=MANY,
    ),
    mutant(
        "the rows before the first expert keep their garbage",
        MULTIPLY,
        "    clear(0, experts.first_token());\n",
        "",
        WRONG_VALUES,
    ),
    mutant(
        "the rows after the last expert keep their garbage",
        MULTIPLY,
        "    clear(experts.last_token(), p_.epilogue.m);\n",
        "",
        WRONG_VALUES,
    ),
    mutant(
        "nobody waits until the experts are found",
        KERNEL,
        "  experts.find();\n  __syncthreads();\n",
        "  experts.find();\n",
        RACE,
    ),
    mutant(
        "the last part of k is left out",
        KERNEL,
        "divide_up(params.k, int64_t{Tile::kK})",
        "params.k / Tile::kK",
        WRONG_VALUES,
        tile=MANY,
    ),
    mutant(
        "offsets are taken as they are",
        FIND,
        "min(max(load_fresh(p_.offsets + e), 0), p_.epilogue.m)",
        "load_fresh(p_.offsets + e)",
        OUT_OF_BOUNDS,
        "bad_offsets",
    ),
    mutant(
        "rows are taken as they are",
        GATHER,
        "min(max(load_fresh(p.rows + row), 0), p.x_rows - 1)",
        "load_fresh(p.rows + row)",
        OUT_OF_BOUNDS,
        "bad_offsets",
    ),
    mutant(
        "rows are copied to the end of their last piece",
        GATHER,
        "whole = p.k / 16",
        "whole = (p.k + 15) / 16",
        OUT_OF_BOUNDS,
        "smoke and True",
    ),
    mutant(
        "the GEMM never waits",
        KERNEL,
        "  wait_for_previous_kernel();\n",
        "",
        TOO_EARLY,
        "chain",
        overlap=True,
    ),
    mutant(
        "the copy of the rows never waits",
        GATHER,
        "  wait_for_previous_kernel();\n",
        "",
        TOO_EARLY,
        "chain and True",
        overlap=True,
    ),
    mutant(
        "nothing is wrong",
        KERNEL,
        "threadIdx.x == 0",
        "0 == threadIdx.x",
        None,
        "chain",
        overlap=True,
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
