"""The planted defects still fit the sources. What is planted takes minutes to build, this takes none."""

from __future__ import annotations

import pytest

from tests.csrc import test_planted, test_planted_gemm, test_planted_order
from tests.support.mutants import Mutant
from tools.build.plan import ROOT

MUTANTS = (*test_planted.MUTANTS, *test_planted_gemm.MUTANTS, *test_planted_order.MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_defect_replaces_is_there_once(mutant: Mutant) -> None:
    assert len(list(mutant.planted(ROOT / "csrc"))) == 1 + len(mutant.cuts)
