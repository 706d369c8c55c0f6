"""The int8 cache on CPUs: float32 weights, and bits that neither threads nor levels nor other tokens change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops
from smoothquant_kernels.backends import cpu_native
from tests.support.attention import assert_close, expected, problem
from tests.support.backends import Backend, at_level
from tests.support.compare import assert_bitwise_equal

#: The columns of a part, for caches of up to 32,768 positions (csrc/cpu/attention.cpp).
PART = 512
#: A kernel with weights in float32 differs from the reference by roundings of float32 only: exp is flushed to 0 below
#: exp(-87).
FLOAT32 = {"weight": 0.0, "least": 2.0**-125}


@pytest.fixture
def on_cpu(backend: Backend) -> Backend:
    if backend.compiled:
        pytest.skip("about the CPU kernels")
    return backend


@pytest.fixture
def in_cpp(on_cpu: Backend) -> Backend:
    if on_cpu.library is None:
        pytest.skip("about the compiled CPU kernels")
    return on_cpu


def check(given: dict[str, Any], what: str = "") -> Tensor:
    y = ops.decode_attention_s8(**given)
    assert_close(y, expected(given, **FLOAT32), what)
    return y


@pytest.mark.parametrize("dim", [16, 64, 80, 100, 128, 256])
def test_weights_are_float32(on_cpu: Backend, dim: int) -> None:
    rotation = dim & -dim
    for tokens, group in ((1, 1), (1, 3), (4, 4), (8, 3)):
        for options in ({"rotation": rotation, "smooth": True}, {"static": True}, {"window": 20}):
            sizes = {"dim": dim, "tokens": tokens, "group": group, "size": 200}
            given = problem([200, 77], dtype=torch.float32, **sizes, **options)
            check(given, f"{sizes} {options}")


@pytest.mark.parametrize("length", [1, PART - 1, PART, PART + 1, 3 * PART - 5, 4 * PART])
def test_parts(on_cpu: Backend, length: int) -> None:
    """Parts of a sequence that are full, begun or empty; a window that leaves out whole parts."""
    sizes = {"batch": 1, "heads": 1, "dim": 16, "size": 4 * PART, "dtype": torch.float32}
    for tokens in (1, 3):
        for window in (0, 1, 700):
            for ring in (False, True):
                given = problem([length], **sizes, tokens=tokens, window=window, ring=ring)
                check(given, f"{tokens} {window} {ring}")
    if length == 4 * PART:
        check(problem([length + 700], **sizes, ring=True), "a ring that has wrapped around")


def test_longer_parts(on_cpu: Backend) -> None:
    """Beyond 64 parts they grow: 40,000 positions make 53 of 768, three tiles each."""
    sizes = {"batch": 1, "heads": 1, "dim": 16, "size": 40_000, "dtype": torch.float32}
    check(problem([39_000], **sizes, group=2))
    check(problem([39_000], **sizes, window=9000, rotation=16))


def test_threads_do_not_change_bits(in_cpp: Backend) -> None:
    given = problem([2000, 900, 0], batch=3, size=2048, group=3, tokens=2, dim=64, rotation=64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.decode_attention_s8(**given))
    finally:
        torch.set_num_threads(before)
    for y in found[1:]:
        assert_bitwise_equal(y, found[0])


def test_levels_do_not_change_bits(in_cpp: Backend) -> None:
    for dim, options in ((64, {"rotation": 64}), (100, {"smooth": True}), (256, {"static": True})):
        given = problem([700, 300], size=704, group=5, tokens=2, dim=dim, window=650, **options)
        given["q"] = given["q"].float()
        expected_bits = None
        for level in cpu_native.levels_here():
            with at_level(level):
                y = ops.decode_attention_s8(**given)
            expected_bits = y if expected_bits is None else expected_bits
            assert_bitwise_equal(y, expected_bits, level)


def test_other_tokens_and_sequences_do_not_change_bits(in_cpp: Backend) -> None:
    """Several tokens give what one after another gives, and a batch what each sequence gives alone."""
    for options in ({}, {"window": 300}, {"static": True}):
        given = problem([900, 513], size=1000, group=2, tokens=8, dtype=torch.float32, **options)
        together = ops.decode_attention_s8(**given)
        for t in range(8):
            one = {**given, "q": given["q"][:, :, t : t + 1], "lengths": given["lengths"] - 7 + t}
            y = ops.decode_attention_s8(**one)
            assert_bitwise_equal(y, together[:, :, t : t + 1], f"token {t}")
        for b in range(2):
            alone = {
                name: t[b : b + 1]
                if isinstance(t, Tensor) and name not in ("k_smooth", "v_smooth")
                else t
                for name, t in given.items()
            }
            assert_bitwise_equal(
                ops.decode_attention_s8(**alone), together[b : b + 1], f"sequence {b}"
            )


def test_garbage_in_tables_and_blocks(on_cpu: Backend) -> None:
    """A table in random order: entries behind the end name no block, tokens behind it hold NaN."""
    given = problem(
        [130, 64, 1, 0], batch=4, size=64, paged=4, group=3, dim=80, dtype=torch.float32
    )
    assert not bool((given["block_table"] < len(given["k_cache"])).all())
    assert bool(given["k_scale"].isnan().any())
    check(given)
