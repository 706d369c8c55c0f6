"""Defects planted in a copy of the writer of an int8 cache: tests/kernels in the simulator catch each one."""

from __future__ import annotations

import pytest

from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, WRONG_VALUES, Mutant

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

KERNEL, SOURCE = "attention/append.cuh", "csrc/attention/append.cu"
SUITE = "test_kv_append.py"
SMOKE, NO_PLACE = "smoke_kv_append", "without_a_place or blocks_that_do_not_exist"
#: Whether the neighbor in memory is another token or nobody's.
EITHER = f"{WRONG_VALUES}|{OUT_OF_BOUNDS}"


def append(
    name: str,
    old: str,
    new: str,
    tests: str = SMOKE,
    symptom: str | None = WRONG_VALUES,
    file: str = KERNEL,
) -> Mutant:
    """A mutant without the kernels for bfloat16, whose tests are left out."""
    every = "return visit_float(dtype, [&](auto type) -> AppendKernel {"
    fewer = (
        f"if (dtype == DType::kBFloat16) return nullptr;\n"
        f"  {every.replace('visit_float(', 'visit_where<is_wanted>(')}"
    )
    wanted = "constexpr bool is_wanted(DType t) { return is_float(t) && t != DType::kBFloat16; }\n"
    first = "AppendKernel find_kernel(DType dtype, bool vectors) {"
    cuts = ((SOURCE.removeprefix("csrc/"), f"{first}\n  {every}", f"{wanted}{first}\n  {fewer}"),)
    return Mutant(
        name, file, old, new, SOURCE, SUITE, f"({tests}) and not bfloat16", symptom, cuts=cuts
    )


ROUNDED = "__fadd_rn(__fmul_rn(v[e], cosine[e]), __fmul_rn(signed_other, sine[e]))"
INVERSE = "float inverse = 1.0f;"

MUTANTS = (
    append(
        "a channel past the row's end",
        "if (channel + e < end) v[e] = to_float(row[channel + e]);",
        "if (channel + e <= end) v[e] = to_float(row[channel + e]);",
        "test_every_head and 63",
        EITHER,
    ),
    append(
        "a vector past the row's end", "if (channel >= end) return;", "if (channel > end) return;",
        "test_every_head and 16", EITHER,
    ),
    append(
        "the rope rounds its first product together with the sum",
        ROUNDED,
        "__fmaf_rn(v[e], cosine[e], __fmul_rn(signed_other, sine[e]))",
        "test_rope",
    ),
    append(
        "the rope turns the other way",
        "channel + e < half ? -other[e] : other[e]",
        "channel + e < half ? other[e] : -other[e]",
    ),
    append(
        "the partner of an unaligned channel is its neighbor",
        "row[c < half ? c + half : c - half]",
        "row[c < half ? c + half : c - half + (c > half)]",
        "test_rope and 50",
    ),
    append(
        "v is turned too", "if (!values && q.cos != nullptr) {", "if (q.cos != nullptr && dim >= q.rope_dim) {"
    ),
    append(
        "the factors come after the rotation",
        "  if (q.rotation != 0) rotate<true, 1, 1>(v, q.rotation);\n",
        "",
        "order_of_the_operations",
    ),
    append(
        "the maximum misses the second half of the lanes",
        "int step = 1 << p.shift >> 1; step > 0",
        "int step = 1 << p.shift >> 2; step > 0",
    ),
    append("the maximum is that of two rows", "int step = 1 << p.shift >> 1", "int step = 1 << p.shift"),
    append(
        "a NaN is lost in the maximum", "max.NaN.f32 %0, %0, %1;", "max.f32 %0, %0, %1;", "test_edge_rows",
        file="common/reduce.cuh",
    ),
    append("static scales are applied twice", INVERSE, "float inverse = 2.0f;"),
    append("the padding is not written", "if (channel < padded) {", "if (channel < dim) {"),
    append(
        "the first position after the cache", "position < p.holding", "position <= p.holding", NO_PLACE, EITHER
    ),
    append(
        "a position before the cache", "{sequence, position, first >= 0}", "{sequence, position, true}", NO_PLACE,
        EITHER,
    ),
    append(
        "the first block after the cache", "slot.block < cache.blocks", "slot.block <= cache.blocks", NO_PLACE, EITHER
    ),
    append(
        "a block before the cache", "slot.block >= 0 &&", "slot.block >= -1 &&", NO_PLACE, EITHER
    ),
    append(
        "a ring turns a slot too late", "slot.in_block >= cache.block_size", "slot.in_block > cache.block_size",
        "ring_keeps", EITHER,
    ),
    append("every sequence has the first one's blocks", "sequence * cache.table_stride", "0", "test_blocks"),
    append("rows after the last", "number < p.rows", "number <= p.rows", "test_many_rows", EITHER),
    append(
        "rows are read 16 bytes at a time wherever they start",
        "are_rows_aligned(from.data, from.head_stride * bytes, p.cache.heads, 16)",
        "true",
        "unaligned_stride",
        "misaligned",
        file="attention/append.cu",
    ),
    append(
        "nothing is wrong", INVERSE, "float inverse = 1.00f;",
        f"{SMOKE} or {NO_PLACE} or ring_keeps or test_blocks or many_rows or stride or order_of or (edge_rows and 63)"
        " or (test_rope and 50) or (test_every_head and (63 or 16))",
        None,
    ),
)  # fmt: skip


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
