"""Defects planted in a copy of the streaming GEMM for weights of 4 bits: its tests in the simulator catch each one."""

from __future__ import annotations

import pytest

from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, RACE, WRONG_VALUES, Mutant

# In one worker of pytest-xdist with test_planted.py, because both need the same library.
pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

#: Keeps only the int8 and float16 kernels for 8 tokens.
KERNEL = "return w4_stream_gemm_kernel<Element<decltype(type)>, kGroups>;"
OTHERS = "type == DType::kFloat32 || type == DType::kBFloat16"
ONE_TYPE = (
    "gemm/instances/w4_stream.cuh",
    KERNEL,
    f"if constexpr ({OTHERS}) {{ return nullptr; }} else {{ {KERNEL} }}",
)


def defect(name: str, file: str, old: str, new: str, symptom: str | None) -> Mutant:
    source = "csrc/gemm/instances/w4_stream_8x16.cu"
    suite, tests = "test_gemm_w4_stream.py", "smoke and 3"
    return Mutant(
        name, f"gemm/stream/{file}", old, new, source, suite, tests, symptom, cuts=(ONE_TYPE,)
    )


STORE = "    if (inside) {\n      *reinterpret_cast<uint4*>(chunk"
MUTANTS = (
    defect(
        "words are transposed while other lanes still read them",
        "rows.cuh",
        f"    __syncwarp();\n{STORE}",
        STORE,
        RACE,
    ),
    defect(
        "the last stage of an odd number of groups is read whole",
        "ring.cuh",
        "const int end = kW4 ? p_.w_bytes : p_.k;",
        "const int end = kW4 ? p_.stages * kStage : p_.k;",
        f"{OUT_OF_BOUNDS}|{WRONG_VALUES}",
    ),
    defect(
        "steps at an odd pair are taken for those of the channel before",
        "ring.cuh",
        "return c & p_.epilogue.n;",
        "return 0;",
        f"misaligned|{WRONG_VALUES}",
    ),
    defect(
        "the words of a quantized vector lie together",
        "rows.cuh",
        "*reinterpret_cast<uint32_t*>(place + 16) = packed.y;",
        "*reinterpret_cast<uint32_t*>(place + 4) = packed.y;",
        f"{WRONG_VALUES}|{RACE}",
    ),
    # The same tests with unchanged sources must pass, so the failures above are due to the defects.
    defect("nothing is wrong", "ring.cuh", "slot_ = 0;", "slot_ = 0;", None),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
