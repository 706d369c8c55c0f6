"""The rotation of the specification: a Hadamard matrix per group, in stages whose order is fixed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from smoothquant_kernels.ops.rotate import rotated, rotated_weight
from tests.support import cases
from tests.support.compare import assert_all_bitwise_equal, assert_bitwise_equal

GROUPS = (2, 4, 8, 16, 64, 256, 512)
U = 2.0**-24


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix in float64: entry (i, j) is -1 where i and j have an odd number of common bits."""
    i = np.arange(size)
    common = i[:, None] & i[None]
    odd = np.array([[bin(int(c)).count("1") % 2 for c in row] for row in common])
    return torch.from_numpy(1.0 - 2.0 * odd)


@pytest.mark.parametrize("group", GROUPS)
def test_the_matrix_is_that_of_hadamard_for_each_group(group: int) -> None:
    v = torch.randint(-1000, 1001, (5, 3 * group), generator=cases.generator(1)).float()
    expected = (v.double().unflatten(-1, (3, group)) @ hadamard(group)).flatten(-2)
    assert_bitwise_equal(reference.rotate(v, group), expected.float())  # integers: no sum rounds


@pytest.mark.parametrize("group", GROUPS)
def test_the_stages_in_numpy(group: int) -> None:
    """Every sum and difference is rounded to float32, neighbors first."""
    v = torch.randn(4, 2 * group, generator=cases.generator(2)) * torch.logspace(-9, 9, 2 * group)
    expected = v.numpy().copy()
    h = 1
    while h < group:
        for i in range(expected.shape[1]):
            if i % (2 * h) < h:
                a, b = expected[:, i].copy(), expected[:, i + h].copy()
                expected[:, i], expected[:, i + h] = a + b, a - b
        h *= 2
    assert_bitwise_equal(reference.rotate(v, group), torch.from_numpy(expected))
    reversed_order = v.view(4, 2, *[2] * int(math.log2(group)))
    for dim in range(2, reversed_order.dim()):  # the other order of stages rounds differently
        a, b = reversed_order.unbind(dim)
        reversed_order = torch.stack([a + b, a - b], dim)
    if group > 2:
        assert not torch.equal(reversed_order.reshape(v.shape), reference.rotate(v, group))


@pytest.mark.parametrize("group", GROUPS)
def test_a_rotated_product_is_the_product(group: int) -> None:
    """Each stage rounds once: log2(g) U of the sum of |terms| for either operand, with the growth of the norm."""
    x, w = (torch.randn(7, 3 * group, generator=cases.generator(s)) for s in (3, 4))
    found = reference.rotate(x, group).double() @ reference.rotate_weight(w, group).double().T
    exact = x.double() @ w.double().T
    stages = math.log2(group)
    # |rotate(x)| <= group |x| and |rotate_weight(w)| <= |w| in the 1-norm of a group, so sqrt(group) in the 2-norm.
    bound = 2.1 * stages * U * x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)[None]
    assert bool(((found - exact).abs() <= bound * math.sqrt(group)).all())
    assert_bitwise_equal(reference.rotate_weight(w, 0), w)


@pytest.mark.parametrize("shape", [(0, 512), (1, 512), (3, 5, 1536), (700, 512)], ids=str)
@pytest.mark.parametrize("group", [0, *GROUPS])
def test_the_fast_form_has_the_same_bits(shape: tuple[int, ...], group: int) -> None:
    v = torch.randn(shape, generator=cases.generator(7)) * 10
    before = v.clone()
    for x in (v, v.transpose(0, -2), v.flip(-1)):
        assert_bitwise_equal(rotated(x, group), reference.rotate(x, group))
        assert_bitwise_equal(rotated_weight(x, group), reference.rotate_weight(x, group))
    assert_bitwise_equal(v, before)


def test_zero_leaves_the_values_alone() -> None:
    v = cases.activations(3, 7)
    assert reference.rotate(v, 0) is v


@pytest.mark.parametrize("group", [2, 64])
@pytest.mark.parametrize("scheme", cases.SCHEMES)
@pytest.mark.parametrize("smoothed", [False, True])
def test_quantize_rotates_what_it_smoothed(group: int, scheme: str, smoothed: bool) -> None:
    x = cases.activations(9, 192, torch.bfloat16)
    inv_smooth = cases.inverse_smooth(192) if smoothed else None
    options: dict[str, Any] = cases.quantize_options(scheme, 0.9)
    found = reference.quantize(x, inv_smooth, **options, k_multiple=80, rotation=group)
    v = x.float() if inv_smooth is None else x.float() * inv_smooth
    rotated = reference.quantize(reference.rotate(v, group), **options, k_multiple=80)
    assert_all_bitwise_equal(found, rotated)
    assert found[0].shape == (9, 240) and not found[0][:, 192:].any()
    assert not torch.equal(found[0], reference.quantize(x, inv_smooth, **options, k_multiple=80)[0])


@pytest.mark.parametrize("scheme", ["token", "static"])
@pytest.mark.parametrize("name", cases.NONFINITE_ROWS)
def test_a_nonfinite_value_makes_its_token_nonfinite_alone(name: str, scheme: str) -> None:
    x = cases.activations(5, 64)
    options: dict[str, Any] = cases.quantize_options(scheme)
    good_q, good_scale = reference.quantize(x, **options, rotation=16)
    x[2] = cases.NONFINITE_ROWS[name](64, x.dtype)
    x_q, x_scale = reference.quantize(x, **options, rotation=16)
    others = [0, 1, 3, 4]
    assert_bitwise_equal(x_q[others], good_q[others])
    assert_bitwise_equal(x_scale[others], good_scale[others])
    assert not bool(x_scale[2].isfinite())


def test_a_sum_that_overflows_makes_its_token_nonfinite() -> None:
    x = torch.ones(3, 8)
    x[1] = torch.finfo(torch.float32).max
    x_q, x_scale = reference.quantize(x, rotation=8)
    assert x_scale.isfinite().tolist() == [True, False, True] and not x_q[1].any()


def test_an_outlier_is_spread_over_its_group() -> None:
    x = torch.randn(20, 128, generator=cases.generator(5))
    x[:, 40] = 300.0
    w = torch.randn(16, 128, generator=cases.generator(6))
    exact = x.double() @ w.double().T

    def error(group: int) -> float:
        x_q, x_scale = reference.quantize(x, rotation=group)
        w_q, w_scale = reference.quantize_weight(reference.rotate_weight(w, group))
        y = reference.gemm_s8(x_q, w_q, x_scale, w_scale, out_dtype=torch.float32)
        return float((y - exact).norm() / exact.norm())

    # The step falls from 300 / 127 to (300 + 3 sqrt(64)) / sqrt(64) / 127 in the units of x: by 7.4. The error of the
    # weights, which stays, is a third of what remains.
    assert error(64) < 0.3 * error(0)


@pytest.mark.parametrize("rotation", [1, -2, 3, 24, 1024, 32])
def test_the_allowed_groups(rotation: int) -> None:
    x = torch.ones(2, 2048 + 16)
    with pytest.raises(ValueError, match=r"power of two from 2 to 512 that divides K = 2064, got"):
        ops.quantize(x, rotation=rotation)
    with pytest.raises(ValueError, match="rotation must be 0"):
        ops.act_quantize(x.repeat(1, 2), "silu_mul", rotation=rotation)
