"""Lists that C++ and Python both hold: each new dtype and producer is in all of them, in the same order."""

from __future__ import annotations

import re

from benchmarks.lib import producers
from smoothquant_kernels import reference
from tests.support import c_gemm, c_interface
from tools.build.plan import ROOT


def rows(file: str, begin: str, end: str, row: str) -> list[str]:
    """What `row` finds in the part of a file of csrc from `begin` to `end`."""
    text = (ROOT / "csrc" / file).read_text()
    assert text.count(begin) == 1
    return re.findall(row, text.partition(begin)[2].partition(end)[0])


def test_producers() -> None:
    names = rows(
        "include/sqk/quantize.h", "#define SQK_PRODUCERS(X)", "\n\n", r'X\(k\w+, "(\w+)"\)'
    )
    assert names == list(c_interface.PRODUCERS)


def test_kinds_of_activation_functions() -> None:
    kinds = rows("torch/quantize_call.h", "constexpr Kind kKinds[] = {", "};", r'\{"(\w+)"')
    assert kinds == [*reference.ACTIVATIONS, *reference.FUSED_KINDS]
    assert list(producers.ACTIVATIONS) == list(reference.ACTIVATIONS)


def test_dtypes() -> None:
    names = rows("include/sqk/dtype.h", "#define SQK_DTYPES(X)", "\n\n", r'"(\w+)"')
    assert [f"torch.{name}" for name in names] == list(map(str, c_gemm.DTYPES))
    assert list(c_gemm.DTYPES.values()) == list(range(len(names)))
