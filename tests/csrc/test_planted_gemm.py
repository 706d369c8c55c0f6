"""Defects planted in a copy of the GEMMs: tests/kernels in the simulator, or its checks, catch each one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, RACE, WRONG_VALUES, WROTE_OUTSIDE, Mutant

# In one worker of pytest-xdist with test_planted.py, because both need the same library.
pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

INSTANCES = "csrc/gemm/instances"
STREAM, LAUNCH = f"{INSTANCES}/stream_8x16.cu", "csrc/gemm/launch.cu"
OPS, ENTRY, LINEAR = "test_gemm.py", "test_gemm_c_entry.py", "test_linear_op.py"

#: Tiles of an A100, with the arguments in the names of their files. The first one stores pairs of channels, the second
#: one groups of 32.
PAIRS = ("32x64x128", "warps_1x4_stages_6")
GROUPS = ("64x64x128", "warps_2x2_stages_4")
#: The one with a gated kernel.
LARGEST = ("128x128x64", "warps_2x2_stages_5")
#: Keeps only the int8 and float16 kernels among the streaming kernels for 8 tokens.
KERNEL = "return stream_gemm_kernel<Element<decltype(type)>, kGroups>;"
OTHERS = "type == DType::kFloat32 || type == DType::kBFloat16"
ONE_TYPE = (
    (
        "gemm/instances/stream.cuh",
        KERNEL,
        f"if constexpr ({OTHERS}) {{ return nullptr; }} else {{ {KERNEL} }}",
    ),
)


def mma_source(tile: tuple[str, str]) -> str:
    return f"{INSTANCES}/mma_{'_'.join(tile)}_sm80.cu"


def mma(
    name: str,
    file: str,
    old: str,
    new: str,
    suite: str,
    tests: str,
    symptom: str | None,
    tile: tuple[str, str] = PAIRS,
) -> Mutant:
    """A mutant of the mma.sync kernel of one tile."""
    tests = f"{tests} and {tile[0]}"
    return Mutant(name, f"gemm/{file}", old, new, mma_source(tile), suite, tests, symptom)


def without_tickets(name: str, old: str, new: str, symptom: str | None) -> Mutant:
    """A mutant of the mma.sync kernel, on streams that have no tickets."""
    found = mma(name, "mma/kernel.cuh", old, new, ENTRY, "need_not_be_cleared", symptom)
    return replace(found, cuts=(("common/tickets.h", "kTickets = 640", "kTickets = 0"),))


def stream(
    name: str, file: str, old: str, new: str, suite: str, tests: str, symptom: str | None
) -> Mutant:
    """A mutant of the streaming kernels."""
    return Mutant(name, f"gemm/{file}", old, new, STREAM, suite, tests, symptom, cuts=ONE_TYPE)


def gated(name: str, file: str, old: str, new: str, symptom: str | None) -> Mutant:
    """A mutant of the gated kernel of the largest mma.sync tile."""
    source = f"{INSTANCES}/gated_{mma_source(LARGEST).rpartition('/')[2]}"
    suite, tests = "test_gated_c_entry.py", "every_gated_tile and 128x128x64"
    return Mutant(name, f"gemm/{file}", old, new, source, suite, tests, symptom)


MUTANTS = (
    mma(
        "the product is rounded before the bias is added",
        "epilogue/params.cuh",
        "return __fmaf_rn(__fmul_rn(__int2float_rn(acc), w_scale), x_scale, bias);",
        "return __fadd_rn(__fmul_rn(__fmul_rn(__int2float_rn(acc), w_scale), x_scale), bias);",
        OPS,
        "smoke_gemm",
        WRONG_VALUES,
    ),
    mma(
        "tokens 8 to 15 have the scales of tokens 0 to 7",
        "epilogue/tokens.cuh",
        "min(token0 + g + 8 * h, e.m - 1)",
        "min(token0 + g, e.m - 1)",
        OPS,
        "smoke_gemm",
        WRONG_VALUES,
    ),
    mma(
        "whole pairs are stored past the last channel",
        "epilogue/tokens.cuh",
        "const bool whole = e.wide && channel + 2 <= e.columns;",
        "const bool whole = e.wide;",
        ENTRY,
        "test_every_tile and float16",
        f"{WROTE_OUTSIDE}|{OUT_OF_BOUNDS}",
    ),
    mma(
        "odd channels have the bias of even ones",
        "epilogue/tokens.cuh",
        "pairs.w_scale[j].y, x_scale[h], pairs.bias[j].y",
        "pairs.w_scale[j].y, x_scale[h], pairs.bias[j].x",
        OPS,
        "smoke_gemm",
        WRONG_VALUES,
        GROUPS,
    ),
    mma(
        "the last bytes of k are left out",
        "mma/kernel.cuh",
        "const int valid = static_cast<int>(min(int64_t{kK}, k - k_last));",
        "const int valid = static_cast<int>(min(int64_t{kK}, k - k_last)) / 16 * 16;",
        OPS,
        "smoke_gemm",
        WRONG_VALUES,
    ),
    mma(
        "bytes past k are counted",
        "mma/kernel.cuh",
        "const int bytes = max(0, min(16, valid - 16 * piece_));",
        "const int bytes = valid > 16 * piece_ ? 16 : 0;",
        ENTRY,
        "test_every_tile and float16",
        f"{WRONG_VALUES}|{OUT_OF_BOUNDS}",
    ),
    mma(
        # Any block may come last, depending on the simulator's threads.
        "a tile's last block adds its own sums as well",
        "mma/kernel.cuh",
        "if (other == split) continue;",
        "",
        OPS,
        "smoke_gemm",
        WRONG_VALUES,
    ),
    mma(
        "the last block does not reset its ticket",
        "mma/kernel.cuh",
        "if (last) p.tickets[tile] = 0;",
        "",
        ENTRY,
        "need_not_be_cleared",
        WRONG_VALUES,
    ),
    # Where the stream has no tickets, those in the workspace are cleared.
    without_tickets(
        "the tickets in the workspace are not cleared",
        "cudaMemsetAsync(p.tickets, 0, counters, stream)",
        "cudaSuccess",
        WRONG_VALUES,
    ),
    without_tickets("nothing is wrong: no tickets", "int4* partials;", "int4* partials;", None),
    mma(
        "a tile is read before its copies have arrived",
        "mma/kernel.cuh",
        "one barrier for both.\n        wait_for_copies<kStages - 2>();",
        "one barrier for both.\n        wait_for_copies<kStages - 1>();",
        OPS,
        "stages_go_round",
        f"{WRONG_VALUES}|{RACE}",
    ),
    mma(
        "a stage is filled while others still read it",
        "mma/kernel.cuh",
        "wait_for_copies<kStages - 2>();\n        __syncthreads();",
        "wait_for_copies<kStages - 2>();",
        OPS,
        "stages_go_round",
        RACE,
    ),
    stream(
        "a stage is read before its copies have arrived",
        "stream/ring.cuh",
        "wait_for_copies<kStreamStages - 1>();",
        "wait_for_copies<kStreamStages>();",
        OPS,
        "stages_go_round and stream",
        WRONG_VALUES,
    ),
    stream(
        "a row's maximum is that of its first warp",
        "stream/rows.cuh",
        "const int count = per_tensor ? p_.epilogue.m * parts_ : parts_;",
        "const int count = per_tensor ? p_.epilogue.m * parts_ : 1;",
        LINEAR,
        "long_rows and 5120 and float16 and not bfloat16",
        WRONG_VALUES,
    ),
    gated(
        "the product of gate and up is not rounded",
        "epilogue/gated.cuh",
        "const float2 rounded = __half22float2(__floats2half2_rn(a, b));",
        "const float2 rounded = make_float2(a, b);",
        WRONG_VALUES,
    ),
    gated(
        "a NaN marks no row",
        "epilogue/gated_tokens.cuh",
        "if (nonfinite && token < e.m) raise_y_scale(e, token, kLargestBits);",
        "",
        WRONG_VALUES,
    ),
    gated(
        "each group of channels has the factors of the first",
        "epilogue/gated_tokens.cuh",
        "factors.load(e, first + 2 * t);",
        "factors.load(e, 2 * t);",
        WRONG_VALUES,
    ),
    Mutant(
        "y_scale is not cleared",
        "gemm/launch.cu",
        "cudaMemsetAsync(params.y_scale, 0, sizeof(float) * params.m, stream)",
        "cudaSuccess",
        LAUNCH,
        "test_gated_c_entry.py",
        "every_gated_tile and 8x16",
        WRONG_VALUES,
    ),
    Mutant(
        "a per-tensor scale is taken for one per token",
        "gemm/launch.cu",
        "gemm.x_per_token = quantizer.scheme != Scheme::kPerTensor;",
        "gemm.x_per_token = 1;",
        LAUNCH,
        LINEAR,
        "smoke_linear",
        f"{OUT_OF_BOUNDS}|{WRONG_VALUES}",
    ),
    gated(
        "nothing is wrong: gated",
        "splits.h",
        "if (splits <= 1) return 0;",
        "if (splits <= 1) return 0;",
        None,
    ),
    # The same tests with unchanged sources must pass, so the failures above are due to the defects.
    mma(
        "nothing is wrong: mma",
        "splits.h",
        "if (splits <= 1) return 0;",
        "if (splits <= 1) return 0;",
        ENTRY,
        "((test_every_tile and float16) or need_not_be_cleared)",
        None,
    ),
    stream(
        "nothing is wrong: stream",
        "splits.h",
        "if (splits <= 1) return 0;",
        "if (splits <= 1) return 0;",
        LINEAR,
        "(smoke_linear or (long_rows and 5120)) and float16 and not bfloat16",
        None,
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
