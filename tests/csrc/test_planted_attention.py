"""Defects planted in a copy of the attention to an int8 cache: tests/kernels in the simulator catch each one."""

from __future__ import annotations

import pytest

from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, RACE, UNINITIALIZED, Mutant

pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

SOURCE = "csrc/attention/instances/decode_64.cu"
SUITE = "test_decode_attention.py"
FAR = r"times the bound"
NOT_FINITE = r"NaN or Inf in other places"
WRONG = f"{FAR}|{NOT_FINITE}"
EITHER = f"{WRONG}|{OUT_OF_BOUNDS}"
#: Tests whose heads have 64 channels and whose heads of keys have 8 queries or fewer.
LENGTHS, SPLITS = "test_every_length", "many_splits and 64"
TILES = "many_tiles and narrow and 64"
EMPTY, MASKS = "every_length and 15 and 1-", "test_masks and ring"
INFINITE, SCALES = "minus_infinity", "beyond_float16"


def attention(
    name: str,
    file: str,
    old: str,
    new: str,
    tests: str = LENGTHS,
    symptom: str | None = WRONG,
    orders: tuple[tuple[int, bool], ...] = (),
) -> Mutant:
    """A mutant without the kernel for more queries, for heads of 64 channels."""
    cuts = (
        (
            "attention/instances/decode.cuh",
            "return columns == 8 ? decode_attention_kernel<kDim, 8>",
            "return columns != 0 ? decode_attention_kernel<kDim, 8>",
        ),
        (
            "attention/instances/decode.cuh",
            ": decode_attention_kernel<kDim, kWide>;",
            ": kWide != 0 ? nullptr : nullptr;",
        ),
    )  # fmt: skip
    return Mutant(
        name, f"attention/{file}", old, new, SOURCE, SUITE, tests, symptom, orders=orders, cuts=cuts
    )


TICKET = """  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    fence_gpu();
    last = atomicAdd(ticket, 1u) + 1 == static_cast<uint32_t>(active);
    fence_gpu();
    if (last) *ticket = 0;  // for the next launch: nobody else takes one in this launch
  }
"""
WEAK = tuple((seed, True) for seed in (1, 2, 3))


def ticket(name: str, new: str, symptom: str | None = WRONG, fixed: bool = False) -> Mutant:
    return attention(name, "decode.cuh", TICKET, new, SPLITS, symptom, () if fixed else WEAK)


MUTANTS = (
    attention(
        "the wait leaves one copy too many in flight", "ring.cuh", "wait_for_copies<kStages - 1>();",
        "wait_for_copies<kStages>();", symptom=f"{WRONG}|{UNINITIALIZED}|{RACE}",
    ),
    attention(
        "a token after the last", "ring.cuh", "position >= range_.last) return;", "position > range_.last) return;",
        "test_blocks and 5", EITHER,
    ),
    attention(
        "a slot of another sequence's block", "ring.cuh", "sequence_ * p_.a.cache.table_stride + quotient",
        "quotient", "test_blocks and 24", EITHER,
    ),
    attention(
        "scales of the values are the keys'", "tile.cuh", "load_scales(stage + 4 * kTileTokens, value_scale)",
        "load_scales(stage, value_scale)",
    ),
    attention("two channels change places", "tile.cuh", "0x64646464u, 0x4240", "0x64646464u, 0x4341"),
    attention(
        "the sum is not rescaled", "tile.cuh", "__fmaf_rn(sum[n], decay, tile_sum)",
        "__fadd_rn(sum[n], tile_sum)", TILES,
    ),
    attention(
        "values are rescaled by the wrong queries", "tile.cuh", "const int from = 8 * (threadIdx.x % 4);",
        "const int from = 0;", TILES,
    ),
    attention(
        "the table is read for the wrong tile", "ring.cuh", "      locate();\n    }", "    }", TILES, EITHER
    ),
    attention(
        "weights keep their unit", "tile.cuh", "__uint_as_float((254u - exponent(largest_[n])) << 23)",
        "__uint_as_float((254u - exponent(unit_before)) << 23)", SCALES,
    ),
    attention(
        "-Inf minus -Inf", "tile.cuh", "maximum == minus_infinity() ? 0.0f : maximum", "maximum", EMPTY, NOT_FINITE
    ),
    attention(
        "a hidden token's NaN counts", "tile.cuh", "(allowed >> i & 1) != 0 ? __fmul_rn(p, value_scale[i]) : 0.0f",
        "__fmul_rn(p, value_scale[i])", "not_finite_scales", NOT_FINITE,
    ),
    attention("a token of the future", "tile.cuh", "position > newest", "position > newest + 1"),
    attention(
        "the window is one token wider", "tile.cuh", "position <= newest - p.window",
        "position < newest - p.window",
    ),
    attention(
        "whole tiles hide nothing from the first token", "tile.cuh", "range.length - tokens + 1)",
        "range.length)",
    ),
    attention(
        "whole tiles know no window", "tile.cuh", "p.window > 0 ? range.length - p.window : 0", "0", TILES
    ),
    attention(
        "columns of a ring start at slot 0", "tile.cuh", "max(0, position - before)",
        "(before > 0 ? position % 80 : position)", MASKS,
    ),
    attention(
        "only scores of -Inf are no scores", "decode.cuh", "(seen >> 4 * n & 15) != 0", "false", INFINITE,
        NOT_FINITE,
    ),
    attention(
        "warps add up without a barrier", "decode.cuh", "      }\n    }\n    __syncthreads();\n  }\n}",
        "      }\n    }\n  }\n  __syncthreads();\n}", symptom=RACE,
    ),
    attention(
        "the warps' units differ", "decode.cuh", "reciprocal_or_zero(whole.sum)), sums.unit(n))",
        "reciprocal_or_zero(whole.sum)), 1.0f)",
    ),
    attention(
        "splits count alike", "decode.cuh", "__fmul_rn(load_fresh(stats + 2 * from + 1), share)",
        "load_fresh(stats + 2 * from + 1)", SPLITS,
    ),
    attention(
        "a split too few", "decode.cuh", "for (int i = 0; i < active; ++i) {\n    const int64_t from",
        "for (int i = 1; i < active; ++i) {\n    const int64_t from", SPLITS,
    ),
    attention(
        "the queries are not rotated", "queries.cuh", "  row.turn(a.rotation);\n  AbsMax absmax;",
        "  AbsMax absmax;", "test_every_head and 64",
    ),
    attention(
        "the outputs are not divided by the group", "queries.cuh",
        "__fmul_rn(row.v[0][e], inverse);\n  }\n  row", "row.v[0][e];\n  }\n  row", SPLITS,
    ),
    attention(
        "a query's head is the first of its keys'", "queries.cuh",
        "(int64_t{group.head} * p.group + head) * a.q_head_stride",
        "(int64_t{group.head} * p.group) * a.q_head_stride", "test_views",
    ),
    ticket("the ticket is kept", TICKET.replace("    if (last) *ticket = 0;", "    //"), fixed=True),
    ticket("no fences", TICKET.replace("    fence_gpu();\n", "")),
    ticket("no barrier before the ticket", TICKET.removeprefix("  __syncthreads();\n")),
    ticket("nothing is wrong", TICKET, None),
    attention(
        "nothing is wrong elsewhere", "queries.cuh", "  row.turn(a.rotation);\n  AbsMax absmax;",
        "  row.turn(a.rotation);\n  AbsMax  absmax;",
        f"{LENGTHS} or ({MASKS}) or {INFINITE} or {SCALES} or test_views or not_finite_scales or ({TILES})"
        " or (test_blocks and (5 or 24))", None,
    ),
)  # fmt: skip


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
