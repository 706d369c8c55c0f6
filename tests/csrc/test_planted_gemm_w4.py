"""Defects planted in a copy of the GEMM with weights of 4 bits: its tests in the simulator catch each one."""

from __future__ import annotations

import pytest

from tests.support import mutants
from tests.support.mutants import OUT_OF_BOUNDS, RACE, WRONG_VALUES, Mutant

# In one worker of pytest-xdist with test_planted.py, because both need the same library.
pytestmark = [pytest.mark.simulator, pytest.mark.slow, pytest.mark.xdist_group("planted")]

#: A tile of an A100 with several warps along n, and its file.
TILE = "16x64x128"
SOURCE = f"csrc/gemm/instances/w4_mma_{TILE}_warps_1x4_stages_8_sm80.cu"


def w4(name: str, file: str, old: str, new: str, tests: str, symptom: str | None) -> Mutant:
    """A mutant of the kernel of one tile."""
    found = (f"gemm/w4/{file}", old, new, SOURCE, "test_gemm_w4_tiles.py")
    return Mutant(name, *found, f"{tests} and {TILE}", symptom)


MUTANTS = (
    w4(
        "the high halves have no offset",
        "unpack.cuh",
        "scale.high_step + scale.addend;",
        "scale.high_step + static_cast<uint32_t>(scale.addend);",
        "every_weight",
        WRONG_VALUES,
    ),
    w4(
        # A product and an offset of a byte then fill the sign's bit.
        "the offset is added to signed bytes",
        "unpack.cuh",
        "step + offsets) ^ kSigns;",
        "step + (offsets ^ kSigns));",
        "every_weight",
        WRONG_VALUES,
    ),
    w4(
        "steps and offsets are read beyond the last channel",
        "mma.cuh",
        "min(channel0 + channel, static_cast<uint32_t>(n_) - 1)",
        "channel0 + channel",
        "test_every_tile_of_w4 and float32",
        OUT_OF_BOUNDS,
    ),
    w4(
        "the step and the offset are those of the group before",
        "mma.cuh",
        "scales.load(range.first + done + kStages - 1);",
        "scales.load(range.first + done + kStages - 2);",
        "stages_of_w4_go_round",
        WRONG_VALUES,
    ),
    w4(
        "steps and offsets are written while others read them",
        "mma.cuh",
        "scales.store(stages + write + Stage::kScales);",
        "scales.store(stages + read + Stage::kScales);",
        "stages_of_w4_go_round",
        f"{RACE}|{WRONG_VALUES}",
    ),
    w4(
        "a lane takes the steps of its neighbor",
        "mma.cuh",
        "2 * (channel - in_warp + in_warp % 8 * kTiles + in_warp / 8)",
        "2 * channel",
        "test_every_tile_of_w4 and float32",
        WRONG_VALUES,
    ),
    w4(
        "elements past k are multiplied",
        "mma.cuh",
        "static_cast<int>(min(int64_t{kK}, p.k - k_last))",
        "kK",
        "test_every_tile_of_w4 and float32",
        f"{WRONG_VALUES}|{OUT_OF_BOUNDS}",
    ),
    # The same tests with unchanged sources must pass, so the failures above are due to the defects.
    w4(
        "nothing is wrong: w4",
        "mma.cuh",
        "  const auto load_x = ",
        "  const auto load_x = ",
        "(every_weight or go_round or (test_every_tile_of_w4 and float32))",
        None,
    ),
)


@pytest.mark.in_turn
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught(mutant: Mutant, planted_runs: mutants.Runs) -> None:
    mutants.assert_caught(mutant, planted_runs)
