"""The specification: properties that hold for every input, and comparison with independent exact arithmetic."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from smoothquant_kernels import reference
from tests.support import cases
from tests.support.compare import assert_bitwise_equal, libm_fma

PROPERTY = settings(max_examples=150, deadline=None)
U = 2.0**-24  # unit roundoff of float32
TINY = reference.MIN_SCALE


def random_bits(n: int, seed: int) -> Tensor:
    """Float32 numbers of every exponent, including NaN and Inf."""
    g = cases.generator(seed)
    return torch.randint(-(2**31), 2**31, (n,), generator=g).to(torch.int32).view(torch.float32)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
ordinary = st.floats(-1e4, 1e4, width=32)
rows_of_finite = st.lists(finite, min_size=1, max_size=40)


def row(values: list[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


# --- quantize -------------------------------------------------------------------------------------


def test_every_tie_goes_to_the_even_integer() -> None:
    halves = torch.arange(-126, 126).float() + 0.5
    expected = torch.tensor([round(h) for h in halves.tolist()])  # Python rounds half to even
    assert torch.equal(reference.round_to_int8(halves).long(), expected)
    assert reference.round_to_int8(torch.tensor([0.5, 1.5, 2.5, -0.5])).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("step", [-1, 1])
def test_next_to_a_tie_rounds_to_nearest(step: int) -> None:
    halves = torch.arange(-126, 126).float() + 0.5
    beside = torch.nextafter(halves, torch.full_like(halves, step * math.inf))
    expected = torch.tensor([round(h) for h in beside.tolist()])
    assert torch.equal(reference.round_to_int8(beside).long(), expected)


def test_values_out_of_range_saturate_and_nan_becomes_zero() -> None:
    x = torch.tensor([127.4, 127.5, 128.0, 1e30, math.inf, -127.5, -1e30, -math.inf, math.nan])
    assert reference.round_to_int8(x).tolist() == [127] * 5 + [-127] * 3 + [0]


@PROPERTY
@given(rows_of_finite, st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=40, max_size=40))
@example([0.0], [1.0] * 40)
@example([3.4e38, 1e-38], [1.0] * 40)
@example([127 * TINY], [1.0] * 40)
@example([127 * TINY / 2, 1e-45], [1.0] * 40)
def test_the_dynamic_error_is_at_most_half_a_step(
    values: list[float], inverses: list[float]
) -> None:
    x, inv_smooth = row(values), torch.tensor(inverses[: len(values)], dtype=torch.float32)
    x_q, x_scale = reference.quantize(x, inv_smooth)
    v, scale = x * inv_smooth, float(x_scale[0])
    if not bool(v.isfinite().all()):  # the product overflowed float32
        assert not math.isfinite(scale) and not x_q.any()
        return
    error = (v.double() - x_q.double() * scale).abs().max()
    if scale == 0.0:  # 127 * scale is below 127 * 2^-126
        assert not x_q.any() and error <= 127 * TINY
        return
    # t = fl(v * fl(1/scale)) = v/scale * (1 + d1)(1 + d2), |d| <= U, all normal; |v/scale| <= 127 (1 + U).
    # So |t - v/scale| <= 127 * 2 U plus terms in U^2; x_q = rint(t) is within 1/2 of t: 1/2 + 255 U steps.
    assert error <= scale * (0.5 + 255 * U)
    assert int(x_q.abs().max()) == 127  # the largest value maps to the end of the range


@PROPERTY
@given(rows_of_finite, st.floats(2.0**-100, 2.0**100, width=32))
def test_static_values_saturate_or_err_by_at_most_half_a_step(
    values: list[float], scale: float
) -> None:
    x = row(values)
    x_q, x_scale = reference.quantize(x, scale=torch.tensor([scale]))
    assert x_scale.tolist() == [scale]
    inside = x.double().abs() <= 127 * scale
    error = (x.double() - x_q.double() * scale).abs()
    # As above. |x| far below the scale may underflow in x * (1/scale), but rounds to 0 anyway.
    assert bool((error[inside] <= scale * (0.5 + 255 * U)).all())
    assert torch.equal(x_q[~inside].float(), 127 * x[~inside].sign())


@PROPERTY
@given(st.lists(ordinary, min_size=1, max_size=40), st.integers(-60, 60))
def test_power_of_two_scaling_moves_only_the_scale(values: list[float], exponent: int) -> None:
    x, factor = row(values), 2.0**exponent
    x = torch.where(x.abs() < 2.0**-30, torch.zeros_like(x), x)  # so that no product is subnormal
    x_q, x_scale = reference.quantize(x)
    scaled_q, scaled_scale = reference.quantize(x * factor)
    assert_bitwise_equal(scaled_q, x_q)
    assert_bitwise_equal(scaled_scale, x_scale * factor)
    undone = reference.quantize(x * factor, torch.full((len(values),), 1 / factor))
    assert_bitwise_equal(undone[0], x_q)
    assert_bitwise_equal(undone[1], x_scale)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_quantize_against_numpy(dtype: torch.dtype) -> None:
    k = 65
    x = torch.cat([cases.rows(cases.FINITE_ROWS, k, dtype), cases.activations(20, k, dtype)])
    inv_smooth = cases.inverse_smooth(k)
    x_q, x_scale = reference.quantize(x, inv_smooth)
    with np.errstate(over="ignore", invalid="ignore"):
        v = x.float().numpy() * inv_smooth.numpy()
        scale = np.abs(v).max(-1) / np.float32(127)
        scale = np.where(scale < np.float32(TINY), np.float32(0), scale)
        usable = (scale > 0) & np.isfinite(scale)
        inverse = np.where(usable, np.float32(1) / np.where(usable, scale, 1), np.float32(0))
        t = np.rint(v * inverse[:, None].astype(np.float32))
    expected = np.clip(np.nan_to_num(t), -127, 127).astype(np.int8)
    assert_bitwise_equal(x_scale, torch.from_numpy(scale.astype(np.float32)))
    assert_bitwise_equal(x_q, torch.from_numpy(expected))


def test_a_constant_row_is_127_everywhere_and_a_zero_row_is_zero() -> None:
    x = cases.rows(cases.FINITE_ROWS, 9, torch.float32)
    x_q, x_scale = reference.quantize(x)
    found = {n: (x_q[i].tolist(), float(x_scale[i])) for i, n in enumerate(cases.FINITE_ROWS)}
    assert found["zero"] == found["minus_zero"] == ([0] * 9, 0.0)
    assert found["constant"] == ([127] * 9, float(np.float32(3.25) / np.float32(127)))
    assert found["negative_constant"][0] == [-127] * 9
    assert found["largest"][0] == [127] * 9 and math.isfinite(found["largest"][1])
    assert found["subnormal"] == found["scale_subnormal"] == ([0] * 9, 0.0)
    assert found["scale_smallest"][0] == [127] * 9 and found["scale_smallest"][1] >= TINY


@pytest.mark.parametrize("scheme", ["token", "static"])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_a_nonfinite_token_makes_only_its_own_output_nonfinite(
    dtype: torch.dtype, scheme: str
) -> None:
    k, n = 37, 5
    good = cases.activations(2 * len(cases.NONFINITE_ROWS) + 1, k, dtype)
    mixed = good.clone()
    mixed[1::2] = cases.rows(cases.NONFINITE_ROWS, k, dtype)
    w_q, w_scale = reference.quantize_weight(torch.randn(n, k, generator=cases.generator(3)))
    options = cases.quantize_options(scheme)

    def layer(x: Tensor) -> Tensor:
        x_q, x_scale = reference.quantize(x, **options)  # type: ignore[arg-type]
        return reference.gemm_s8(x_q, w_q, x_scale, w_scale, torch.ones(n), out_dtype=dtype)

    assert_bitwise_equal(layer(mixed)[::2], layer(good)[::2])
    assert bool(layer(good).isfinite().all())
    for name, y in zip(cases.NONFINITE_ROWS, layer(mixed)[1::2], strict=True):
        assert not bool(y.isfinite().any()), f"{name} gave {y.tolist()}"


@pytest.mark.parametrize("name", cases.NONFINITE_ROWS)
def test_with_one_dynamic_scale_a_nonfinite_token_spoils_all(name: str) -> None:
    x = cases.activations(4, 19)
    x[2] = cases.NONFINITE_ROWS[name](19, x.dtype)
    x_q, x_scale = reference.quantize(x, granularity="tensor")
    y = reference.gemm_s8(x_q, cases.random_int8(3, 19), x_scale, torch.ones(1))
    assert not bool(y.isfinite().any())


@pytest.mark.parametrize(
    "shape", [(0, 8), (1, 8), (17, 8), (5, 1), (5, 7), (2, 0, 3), (2, 3, 4), (6,)]
)
@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_shapes(shape: tuple[int, ...], scheme: str) -> None:
    x = cases.activations(math.prod(shape[:-1]), shape[-1]).reshape(shape)
    x_q, x_scale = reference.quantize(x, **cases.quantize_options(scheme))  # type: ignore[arg-type]
    m = math.prod(shape[:-1])
    assert x_q.shape == x.shape and x_q.dtype == torch.int8 and x_q.is_contiguous()
    assert x_scale.shape == (1 if scheme == "tensor" else m,) and x_scale.dtype == torch.float32


@pytest.mark.parametrize("k_multiple", [1, 7, 16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (3, 16), (2, 3, 21), (2, 0, 3), (6,)])
@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_padding_of_k(shape: tuple[int, ...], k_multiple: int, scheme: str) -> None:
    *leading, k = shape
    x = cases.activations(math.prod(leading), k).reshape(shape)
    options: dict[str, Any] = cases.quantize_options(scheme)
    plain, scale = reference.quantize(x, **options)
    x_q, x_scale = reference.quantize(x, **options, k_multiple=k_multiple)
    assert x_q.shape == (*leading, math.ceil(k / k_multiple) * k_multiple)
    assert x_q.dtype == torch.int8 and x_q.is_contiguous()
    assert_bitwise_equal(x_q[..., :k], plain)
    assert not x_q[..., k:].any()
    assert_bitwise_equal(x_scale, scale)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-39, math.nan, math.inf])
def test_a_static_scale_without_a_reciprocal_gives_zeros(scale: float) -> None:
    x_q, x_scale = reference.quantize(torch.ones(2, 3), scale=torch.tensor([scale]))
    assert not x_q.any()
    assert_bitwise_equal(x_scale, torch.full((2,), scale))


def test_a_transposed_weight_quantizes_to_a_contiguous_one() -> None:
    w_q, _ = reference.quantize_weight(torch.randn(6, 4).t())
    assert w_q.is_contiguous()


# --- fma and gemm ---------------------------------------------------------------------------------


def test_fma_equals_libm_on_random_bits() -> None:
    a, b, c = (random_bits(30_000, seed) for seed in (1, 2, 3))
    assert_bitwise_equal(reference.fma(a, b, c), libm_fma(a, b, c))


def test_fma_equals_libm_near_cancellation() -> None:
    g = cases.generator(4)
    a, b = random_bits(40_000, 5), random_bits(40_000, 6)
    distance = torch.exp2(-torch.randint(1, 60, a.shape, generator=g).double())
    c = (-(a.double() * b.double()) * (1 + torch.randn(a.shape, generator=g) * distance)).float()
    fused = reference.fma(a, b, c)
    assert_bitwise_equal(fused, libm_fma(a, b, c))
    usable = fused.isfinite() & (fused != 0)
    assert int((fused != (a * b + c))[usable].sum()) > 1000, (
        "the inputs must distinguish fused from unfused"
    )


def test_fma_does_not_round_twice() -> None:
    # 97 * 172961 = 2^24 + 1, so a * b = 1 + 2^-24: a tie, which c alone decides.
    a, b = torch.tensor(97.0), torch.tensor(172961.0 * 2**-24)
    for sign, expected in ((1, 1 + 2**-23), (-1, 1.0)):
        c = torch.tensor(sign * 2.0**-60)
        assert reference.fma(a, b, c).item() == expected
    assert (a.double() * b.double() + 2.0**-60).float().item() == 1.0, "float64 rounds twice here"


@pytest.mark.parametrize("shape", cases.GEMM_SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gemm_against_integers(shape: tuple[int, int, int], with_bias: bool) -> None:
    op = cases.gemm_operands(*shape)
    exact = op.x_q.numpy().astype(np.int64) @ op.w_q.numpy().astype(np.int64).T
    y = torch.from_numpy(exact.astype(np.float32)) * op.w_scale
    column = op.x_scale[:, None]
    y = libm_fma(y, column, op.bias) if with_bias else y * column
    bias = op.bias if with_bias else None
    for dtype in cases.FLOATS:
        found = reference.gemm_s8(*op[:4], bias, out_dtype=dtype)
        assert_bitwise_equal(found, y.to(dtype), str(dtype))
    found = reference.gemm_s8(*op[:4], bias, op.residual, torch.float32)
    assert_bitwise_equal(found, y + op.residual, "with a residual")


def test_the_weight_scale_comes_first() -> None:
    op = cases.gemm_operands(50, 40, 64)
    acc = (op.x_q.double() @ op.w_q.double().T).float()
    column = op.x_scale[:, None]
    first, other, joint = (
        acc * op.w_scale * column,
        acc * column * op.w_scale,
        acc * (op.w_scale * column),
    )
    assert not torch.equal(first, other) and not torch.equal(first, joint), (
        "the inputs must show the order"
    )
    assert_bitwise_equal(reference.gemm_s8(*op[:4], out_dtype=torch.float32), first)


@pytest.mark.parametrize(("x", "w"), [(127, 127), (-128, -128), (-128, 127)])
def test_the_largest_k_cannot_overflow(x: int, w: int) -> None:
    assert reference.MAX_K * 2**14 <= 2**31 - 1 < (reference.MAX_K + 1) * 2**14
    k = reference.MAX_K
    x_q, w_q = (torch.full((1, k), v, dtype=torch.int8) for v in (x, w))
    y = reference.gemm_s8(x_q, w_q, torch.ones(1), torch.ones(1), out_dtype=torch.float32)
    assert y.item() == float(np.float32(x * w * k))


def test_a_sum_of_zero_is_plus_zero() -> None:
    x_q, w_q = torch.zeros(1, 1, dtype=torch.int8), torch.full((1, 1), -5, dtype=torch.int8)
    y = reference.gemm_s8(x_q, w_q, torch.ones(1), torch.ones(1), out_dtype=torch.float32)
    assert_bitwise_equal(y, torch.zeros(1, 1))


def test_requant_equals_gemm_relu_quantize() -> None:
    op = cases.gemm_operands(9, 8, 33)
    scale = torch.tensor([0.01])
    y = reference.gemm_s8(*op[:4], op.bias, out_dtype=torch.float32)
    for relu in (False, True):
        expected = reference.quantize(torch.relu(y) if relu else y, scale=scale)[0]
        found = reference.gemm_s8_requant(*op[:4], scale, op.bias, relu)
        assert_bitwise_equal(found, expected)
        assert int(found.min()) == (0 if relu else -127) and int(found.max()) == 127


# --- norms, activations, smoothing ------------------------------------------------------------------


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).abs() / exact.abs().clamp_min(1e-30)).max())


def test_rms_norm_matches_the_formula_within_three_roundings() -> None:
    x, w = cases.activations(6, 65), cases.inverse_smooth(65)
    x64 = x.double()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    assert relative_error(reference.rms_norm(x, w, 1e-5), exact) <= 3.01 * U


def test_layer_norm_matches_the_formula() -> None:
    x, w, b = cases.activations(6, 65), cases.inverse_smooth(65), cases.inverse_smooth(65, 5)
    exact = torch.nn.functional.layer_norm(x.double(), (65,), w.double(), b.double(), 1e-5)
    # x - mean cancels, so the error scales with x: U * (|x| + |mean|) * rstd * w, plus the roundings of the result.
    rstd = 1 / (x.double().var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    slack = 2 * U * x.abs().amax(-1, keepdim=True) * rstd * w + 4 * U * (exact.abs() + b)
    found = reference.layer_norm(x, w, b, 1e-5).double()
    assert bool(((found - exact).abs() <= slack).all())


def test_the_residual_is_rounded_to_the_activations_type() -> None:
    x, r = cases.activations(3, 5, torch.float16), cases.activations(3, 5, torch.float16, seed=1)
    assert_bitwise_equal(reference.add_residual(x, r), (x.double() + r.double()).half())


@pytest.mark.parametrize("kind", [*reference.ACTIVATIONS, *reference.FUSED_KINDS])
def test_activations_are_rounded_once_and_gated_in_float32(kind: str) -> None:
    t = torch.linspace(-6, 6, 1000)
    phi = [0.5 * (1 + math.erf(v / math.sqrt(2))) for v in t.tolist()]
    c = math.sqrt(2 / math.pi)
    exact = {
        "relu": [max(v, 0.0) for v in t.tolist()],
        "gelu": [v * p for v, p in zip(t.tolist(), phi, strict=True)],
        "gelu_tanh": [0.5 * v * (1 + math.tanh(c * (v + 0.044715 * v**3))) for v in t.tolist()],
        "silu": [v / (1 + math.exp(-v)) for v in t.tolist()],
    }[kind.removesuffix("_mul")]
    value = torch.tensor(exact, dtype=torch.float64)
    up = torch.linspace(-2, 3, 1000)
    if kind in reference.FUSED_KINDS:
        found = reference.activation(torch.cat([t, up]), kind)
        assert_bitwise_equal(found, reference.activation(up, kind.removesuffix("_mul"), t))
    else:
        found = reference.activation(t, kind)
        up = torch.ones_like(up)
        assert_bitwise_equal(reference.activation(up, kind, t), found)
    error = (found.double() - value * up.double()).abs()
    assert bool((error <= 2.01 * U * (value * up.double()).abs() + 1e-15).all())


positive = st.floats(2.0**-20, 2.0**20, width=32)


@PROPERTY
@given(positive, positive, st.floats(0, 1))
@example(3.0, 7.0, 0.0)
@example(3.0, 7.0, 1.0)
def test_smoothing_factors_match_the_formula(x: float, w: float, alpha: float) -> None:
    found = reference.smoothing_factors(torch.tensor([x]), torch.tensor([w]), alpha)
    exact = math.pow(x, alpha) / math.pow(w, 1 - alpha)
    assert abs(found.item() - exact) <= 1.01 * U * exact
    if alpha == 1:
        assert found.item() == x
    if alpha == 0:
        assert found.item() == float(np.float32(1 / w))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_and_extreme_channels_get_factor_one(alpha: float) -> None:
    x = torch.tensor([0.0, 1.0, 0.0, math.inf, math.nan, 1.0, 4.0])
    w = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, math.nan, 4.0])
    found = reference.smoothing_factors(x, w, alpha)
    assert bool(((found > 0) & found.isfinite() & (1 / found).isfinite()).all())
    dead = [0, 1, 2] + ([3, 4] if alpha > 0 else []) + ([5] if alpha < 1 else [])
    assert found[dead].tolist() == [1.0] * len(dead)
    assert found[6].item() == 4.0 ** (2 * alpha - 1)
    tiny, huge = torch.tensor([1e-40]), torch.tensor([3e38])
    assert reference.smoothing_factors(tiny, huge, 1.0).item() == 1.0
    assert reference.smoothing_factors(huge, tiny, 0.5).isfinite().item()
