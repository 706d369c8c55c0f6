"""The planted defects still fit the sources. What is planted takes minutes to build, this takes none."""

from __future__ import annotations

import pytest

from tests.csrc import (
    test_cpu_kernels,
    test_overlap,
    test_planted,
    test_planted_append,
    test_planted_attention,
    test_planted_gemm,
    test_planted_grouped,
    test_planted_grouped_stream,
    test_planted_order,
)
from tests.support.mutants import Mutant
from tools.build.plan import ROOT

MUTANTS = (
    *test_planted.MUTANTS,
    *test_planted_append.MUTANTS,
    *test_planted_attention.MUTANTS,
    *test_planted_gemm.MUTANTS,
    *test_planted_grouped.MUTANTS,
    *test_planted_grouped_stream.MUTANTS,
    *test_planted_order.MUTANTS,
    *test_overlap.MUTANTS,
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_defect_replaces_is_there_once(mutant: Mutant) -> None:
    assert len(list(mutant.planted(ROOT / "csrc"))) == 1 + len(mutant.cuts)


@pytest.mark.parametrize("name", test_cpu_kernels.MUTANTS)
def test_what_a_defect_of_the_cpu_kernels_replaces_is_there_once(name: str) -> None:
    mutant = test_cpu_kernels.MUTANTS[name]
    changed, text = mutant.planted(ROOT / "csrc")
    assert text != changed.read_text()
