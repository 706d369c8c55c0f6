"""Defects planted in a copy of the kernels for experts: tests/kernels in the simulator catch each one."""

from __future__ import annotations

import pytest

from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, WRONG_VALUES, WROTE_OUTSIDE, Mutant

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

TILE = "csrc/gemm/instances/grouped_mma_16x64x128_warps_1x4_stages_6.cu"
COMBINE = "csrc/gemm/grouped/combine.cu"
SUITE = "test_grouped_c_entry.py"
SMOKE, RANGE = "smoke_grouped", "out_of_range"
#: What the defect reads instead may end with its memory.
EITHER = f"{WRONG_VALUES}|{OUT_OF_BOUNDS}"


def grouped(
    file: str,
    name: str,
    old: str,
    new: str,
    tests: str = SMOKE,
    symptom: str | None = WRONG_VALUES,
    orders: tuple[tuple[int, bool], ...] = (),
) -> Mutant:
    """A mutant of the smallest tile."""
    return Mutant(
        name, f"gemm/grouped/{file}", old, new, TILE, SUITE, tests, symptom, orders=orders
    )


def combine(name: str, old: str, new: str, symptom: str | None = WRONG_VALUES) -> Mutant:
    tests = "smoke_combine or keeps_its_sign"
    return Mutant(name, "gemm/grouped/combine.cu", old, new, COMBINE, SUITE, tests, symptom)


MUTANTS = (
    grouped(
        "mma.cuh", "a tile reaches into the next expert's rows", "found.expert, found.last), acc",
        "found.expert, p.experts.m), acc", orders=((1, False), (2, False), (3, False)),
    ),
    grouped(
        "epilogue.cuh", "every expert has the first one's scales", "own.w_scale += int64_t{expert} * whole.n;", ""
    ),
    grouped(
        "epilogue.cuh", "every expert has the first one's bias", "own.bias += int64_t{expert} * whole.n;",
        "own.bias += 0;",
    ),
    grouped(
        "epilogue.cuh", "scales of an odd expert are read in pairs",
        "epilogue.plain && (p.n % 2 == 0 || p.experts == 1)", "epilogue.plain", "test_odd_channels", "misaligned",
    ),
    grouped("mma.cuh", "every expert has the first one's weights", "found.expert * p.w_q_expert_stride", "0"),
    grouped("mma.cuh", "rows are ignored", "return p.rows == nullptr ? row", "return true ? row", symptom=EITHER),
    grouped(
        "mma.cuh", "rows are not clamped", "min(max(p.rows[row], 0), p.last_x_row)", "p.rows[row]",
        RANGE, OUT_OF_BOUNDS,
    ),
    grouped(
        "experts.cuh", "offsets are not clamped to the end", "min(max(rows.offsets[part - 1], 0), rows.m)",
        "max(rows.offsets[part - 1], 0)", RANGE, f"{OUT_OF_BOUNDS}|{WROTE_OUTSIDE}",
    ),
    grouped(
        "experts.cuh", "rows after the last expert are left out",
        "rows.experts + 2, lane", "rows.experts + 1, lane",
    ),
    grouped(
        "mma.cuh", "rows of no expert are not cleared",
        "store_zeros<kM, kN, Tile::kThreads>(p.epilogue, row0, found.last, channel0);", "",
    ),
    grouped(
        "epilogue.cuh", "zeros reach past the last row", "if (row >= last || channel >= e.n) continue;",
        "if (channel >= e.n) continue;", symptom=f"{EITHER}|{WROTE_OUTSIDE}",
    ),
    grouped(
        "epilogue.cuh", "zeros end with the last whole 16 bytes", "j < step && channel + j < e.n",
        "j < step && channel + step <= e.n",
    ),
    grouped(
        "experts.cuh", "lanes forget the offsets of the lanes before",
        "if (lane >= step) most = max(most, other);", "", "descending or any_number",
    ),
    grouped("mma.cuh", "nothing is wrong", "if (found.tiles == 0) return;", "if (found.tiles < 1) return;",
            f"{SMOKE} or {RANGE} or descending or test_odd_channels", None),
    combine("the first product is added to zero", "sum[e] = -0.0f;", "sum[e] = 0.0f;"),
    combine(
        "products are rounded", "__fmaf_rn(weight, to_float(packed.element[e]), sum[e])",
        "__fadd_rn(__fmul_rn(weight, to_float(packed.element[e])), sum[e])",
    ),
    combine(
        "positions are not clamped", "min(max(position[choice], 0), p.last_row)", "position[choice]", OUT_OF_BOUNDS
    ),
    combine(
        "a piece of a row is taken as whole", "kVectors && channel + kVec<T> <= n", "kVectors",
        f"{EITHER}|{WROTE_OUTSIDE}",
    ),
    combine(
        "rows are read 16 bytes at a time wherever they start",
        "are_rows_aligned(params.y, params.y_stride * bytes, params.y_rows, 16)", "true", "misaligned",
    ),
    combine("no sum is wrong", "const int64_t token = blockIdx.x;", "const int64_t token = (blockIdx.x);", None),
)  # fmt: skip


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
