"""`W8A8Linear`: its results, its distance from the float layer, and its refusals."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from smoothquant_kernels import QuantizedActivation, SmoothQuantError, W8A8Linear, reference
from smoothquant_kernels.nn.float_linear import (
    is_float_linear,
    pending_smooth,
    set_pending_smooth,
    weight_of,
)
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES
from tests.support import cases, compare
from tests.support.compare import assert_bitwise_equal

U = 2.0**-24
SIZES = ((1, 1), (5, 1), (1, 7), (31, 17), (64, 48))


# --- the numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k_n", SIZES, ids=str)
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
def test_forward_equals_the_reference(k_n: tuple[int, int], scheme: str, granularity: str) -> None:
    k, n = k_n
    group = 16 if k % 16 == 0 else 0
    for bias, rotation in ((True, 0), (False, group)):
        for smooth in (None, cases.inverse_smooth(k)):
            linear = cases.float_linear(k, n, bias)
            layer = cases.quantized(
                linear, scheme, weight_granularity=granularity, smooth=smooth, rotation=rotation
            )
            w = linear.weight.detach() * (1.0 if smooth is None else smooth)
            w = reference.rotate_weight(w, rotation)
            w_q, w_scale = reference.quantize_weight(w, granularity)
            assert w_scale.shape == (n if granularity == "channel" else 1,)
            for dtype in cases.FLOATS:
                x = cases.activations(6, k, dtype).view(2, 3, k)
                x_q, x_scale = reference.quantize(
                    x,
                    None if smooth is None else 1 / smooth,
                    torch.tensor([0.02]) if scheme == "static" else None,
                    "tensor" if scheme == "per_tensor" else "token",
                    rotation=rotation,
                )
                b = linear.bias if bias else None
                expected = reference.gemm_s8(x_q, w_q, x_scale, w_scale, b, out_dtype=dtype)
                assert_bitwise_equal(layer(x), expected.detach(), f"{dtype}")


@pytest.mark.parametrize("k_n", [*SIZES, (300, 40)], ids=str)
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("granularity", WEIGHT_GRANULARITIES)
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_error_is_within_its_bound(
    k_n: tuple[int, int], scheme: str, granularity: str, smoothed: bool
) -> None:
    """Each operand is off by at most e = scale * (1/2 + 255 U), as test_reference.py derives. Over the K terms,

        |y - x.w - b| <= e_x sum|w'| + e_w (sum|x'| + K e_x)      x' = x / s, w' = w s

    plus the roundings of 1/s, x * (1/s), w * s (3 U each term) and of the result: int32 to float32, * w_scale,
    * x_scale + b (3 U of |acc| scales and |y|).
    """
    k, n = k_n
    linear, x = cases.float_linear(k, n), cases.activations(9, k)
    s = cases.inverse_smooth(k) if smoothed else torch.ones(k)
    x_scale = float((x / s).abs().max() / 127 * (1 + 4 * U))
    options: dict[str, Any] = {"x_scale": x_scale} if scheme == "static" else {}
    layer = cases.quantized(
        linear, scheme, weight_granularity=granularity, smooth=s if smoothed else None, **options
    )
    with torch.no_grad():
        xs, ws = (x / s).double(), (linear.weight * s).double()
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        step = 0.5 + 255 * U
        e_x = layer.quantize_input(x).x_scale.double().expand(9)[:, None] * step
        e_w = layer.w_scale.double().expand(n)[None] * step
        sum_x, sum_w = xs.abs().sum(1)[:, None], ws.abs().sum(1)[None]
        quantizing = e_x * sum_w + e_w * (sum_x + k * e_x)
        products = xs.abs() @ ws.abs().T
        rounding = 3.1 * U * products + 3.1 * U * (exact.abs() + products + quantizing)
        error = (layer(x).double() - exact).abs()
    assert bool((error <= quantizing + rounding).all())
    if k >= 300:  # the bound must not be needlessly loose
        assert float((error / quantizing).max()) > 0.005


def test_smoothing_reduces_the_error_of_outlier_channels() -> None:
    linear, x = cases.float_linear(64, 32), torch.randn(50, 64, generator=cases.generator(1))
    x[:, 7] *= 200
    smooth = reference.smoothing_factors(x.abs().amax(0), linear.weight.detach().abs().amax(0), 0.5)
    exact = F.linear(x, linear.weight, linear.bias)
    for scheme in ("per_token", "per_tensor"):
        plain = (cases.quantized(linear, scheme)(x) - exact).abs().mean()
        smoothed = (cases.quantized(linear, scheme, smooth=smooth)(x) - exact).abs().mean()
        assert bool(smoothed < 0.3 * plain)


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_conv1d_equals_the_transposed_linear(scheme: str) -> None:
    conv = Conv1D(5, 12)
    linear = cases.float_linear(12, 5)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    smooth = cases.inverse_smooth(12)
    layer = cases.quantized(conv, scheme, smooth=smooth)
    compare.assert_same_buffers(layer, cases.quantized(linear, scheme, smooth=smooth))
    assert layer.w_q.is_contiguous() and layer.in_features == 12 and layer.out_features == 5


def test_pending_factors_wait_for_the_quantizer() -> None:
    """Pending factors change neither the results nor the state of the float layer. They survive copies and casts."""
    linear, smooth = cases.float_linear(12, 5), cases.inverse_smooth(12)
    smoothed = copy.deepcopy(linear)
    set_pending_smooth(smoothed, smooth)
    x = cases.activations(7, 12)
    assert_bitwise_equal(smoothed(x), linear(x))
    assert smoothed.state_dict().keys() == linear.state_dict().keys()
    expected = cases.quantized(linear, smooth=smooth)
    compare.assert_same_buffers(cases.quantized(smoothed), expected)
    compare.assert_same_buffers(cases.quantized(copy.deepcopy(smoothed)), expected)
    again = torch.full((12,), 4.0)
    twice = cases.quantized(smoothed, smooth=again)
    compare.assert_same_buffers(twice, cases.quantized(linear, smooth=smooth * again))
    narrow = copy.deepcopy(smoothed).half()
    assert pending_smooth(narrow).dtype == torch.float32
    set_pending_smooth(smoothed, None)
    compare.assert_same_buffers(cases.quantized(smoothed), cases.quantized(linear))


def test_q_k_and_v_can_share_one_quantization() -> None:
    linears = [cases.float_linear(24, n, seed=n) for n in (24, 8, 8)]
    smooth = cases.inverse_smooth(24)
    x = cases.activations(10, 24, torch.float16).view(2, 5, 24)
    for scheme in ACTIVATION_SCHEMES:
        layers = [cases.quantized(linear, scheme, smooth=smooth) for linear in linears]
        shared = layers[0].quantize_input(x)
        assert isinstance(shared, QuantizedActivation) and shared.x_q.shape == x.shape
        for layer in layers:
            assert_bitwise_equal(layer(shared), layer(x), scheme)
            assert layer(shared).dtype == torch.float16


def test_a_nonfinite_token_spoils_only_its_own_output() -> None:
    x = cases.activations(5, 31)
    broken = x.clone()
    broken[2, 30] = torch.nan
    for scheme in ("per_token", "static"):
        layer = cases.quantized(cases.float_linear(31, 4), scheme)
        y, good = layer(broken), layer(x)
        keep = [0, 1, 3, 4]
        assert_bitwise_equal(y[keep], good[keep])
        assert not bool(y[2].isfinite().any())
    assert not bool(
        cases.quantized(cases.float_linear(31, 4), "per_tensor")(broken).isfinite().any()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_of_any_float_dtype(dtype: torch.dtype) -> None:
    linear = cases.float_linear(7, 3).to(dtype)
    layer = cases.quantized(linear)
    w_q, w_scale = reference.quantize_weight(linear.weight.detach().float())
    assert_bitwise_equal(layer.w_q, w_q)
    assert_bitwise_equal(layer.w_scale, w_scale)
    assert layer.bias is not None and layer.bias.dtype == torch.float32


def test_from_linear_copies_the_float_layer_and_keeps_its_mode() -> None:
    linear = cases.float_linear(7, 3).eval()
    before = copy.deepcopy(linear.state_dict())
    layer = cases.quantized(linear, smooth=cases.inverse_smooth(7))
    assert not layer.training and cases.quantized(linear.train()).training
    assert layer.bias is not None
    layer.bias.zero_()
    for name, value in linear.state_dict().items():
        assert_bitwise_equal(value, before[name])


def test_dequantized_weight_is_within_half_a_step() -> None:
    linear, smooth = cases.float_linear(33, 4), cases.inverse_smooth(33)
    for granularity in WEIGHT_GRANULARITIES:
        for s in (None, smooth):
            layer = cases.quantized(linear, weight_granularity=granularity, smooth=s)
            error = (layer.dequantized_weight() - linear.weight.detach()).abs()
            limit = 0.5001 * layer.w_scale.expand(4)[:, None] / (1.0 if s is None else s)
            assert bool((error <= limit).all())


@pytest.mark.parametrize("group", [2, 16])
def test_dequantized_weight_without_its_rotation(group: int) -> None:
    """Rotated again, it is within half a step of the rotated weight, plus the roundings of two rotations."""
    linear, s = cases.float_linear(48, 4), cases.inverse_smooth(48)
    layer = cases.quantized(linear, smooth=s, rotation=group)
    wanted = reference.rotate_weight(linear.weight.detach() * s, group)
    found = reference.rotate_weight(layer.dequantized_weight() * s, group)
    assert bool(((found - wanted).abs() <= 0.5001 * layer.w_scale[:, None]).all())


@pytest.mark.parametrize("rotation", [1, 3, -2, 32, 16.0, True])
def test_rotations_that_do_not_fit_are_refused(rotation: Any) -> None:
    linear = cases.float_linear(48, 4)
    for make in (
        lambda: cases.quantized(linear, rotation=rotation),
        lambda: W8A8Linear(48, 4, rotation=rotation),
    ):
        with pytest.raises(
            SmoothQuantError, match="rotation must be 0 or a power of two from 2 to 512"
        ):
            make()


# --- refusals -----------------------------------------------------------------------------------------


def spoiled(value: float) -> nn.Linear:
    linear = cases.float_linear(4, 3)
    with torch.no_grad():
        linear.weight[1, 2] = value
    return linear


LINEAR = cases.float_linear(4, 3)
ONES = torch.ones(4)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "scheme": (
        lambda: W8A8Linear(4, 3, activation_scheme="token"),
        "activation_scheme must be one of per_token, per_tensor, static; got 'token'.",
    ),
    "granularity": (
        lambda: W8A8Linear(4, 3, weight_granularity="row"),
        "weight_granularity must be channel or tensor; got 'row'.",
    ),
    "no inputs": (lambda: W8A8Linear(0, 3), "in_features must be in [1, 131071] and out_features"),
    "no outputs": (lambda: W8A8Linear(4, 0), "out_features >= 1; got 4 and 0."),
    "too long": (lambda: W8A8Linear(131_072, 1, device="meta"), "got 131072 and 1."),
    "nan": (
        lambda: cases.quantized(spoiled(torch.nan)),
        "the weight has NaN or Inf values; repair",
    ),
    "inf": (
        lambda: cases.quantized(spoiled(-torch.inf)),
        "the weight has NaN or Inf values; repair",
    ),
    "too large": (
        lambda: cases.quantized(spoiled(3e38), smooth=4 * ONES),
        "is too large for float32.",
    ),
    "double": (
        lambda: cases.quantized(cases.float_linear(4, 3).double()),
        "the weight is float64, and must be one of float16, bfloat16, float32 to be quantized: convert",
    ),
    "float8": (
        lambda: cases.quantized(cases.float_linear(4, 3).to(torch.float8_e4m3fn)),
        "the weight is float8_e4m3fn, and must be one of",
    ),
    "dtype": (lambda: W8A8Linear(4, 3, dtype=torch.int8), "dtype is int8, and must be one of"),
    "smooth shape": (lambda: cases.quantized(LINEAR, smooth=torch.ones(3)), "shape [4], got (3,)."),
    "smooth zero": (
        lambda: cases.quantized(LINEAR, smooth=0 * ONES),
        "must be positive and finite",
    ),
    "smooth nan": (
        lambda: cases.quantized(LINEAR, smooth=ONES * torch.nan),
        "reciprocals; got nan.",
    ),
    "smooth tiny": (
        lambda: cases.quantized(LINEAR, smooth=ONES * 1e-39),
        "so must be its reciprocals",
    ),
    "no x_scale": (
        lambda: cases.quantized(LINEAR, "static", x_scale=None),
        "x_scale must be given for the static scheme, and only for it; calibrate the layer first.",
    ),
    "x_scale": (
        lambda: cases.quantized(LINEAR, x_scale=0.1),
        "x_scale must be given for the static",
    ),
    "x_scale zero": (
        lambda: cases.quantized(LINEAR, "static", x_scale=0.0),
        "positive and finite, got 0",
    ),
    "x_scale nan": (
        lambda: cases.quantized(LINEAR, "static", x_scale=torch.nan),
        "finite, got nan.",
    ),
    "module": (
        lambda: cases.quantized(nn.Conv1d(4, 3, 1)),
        "expected nn.Linear or Conv1D, got Conv1d; only these can be quantized.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str) -> None:
    make, sentence = REFUSED[what]
    with pytest.raises(SmoothQuantError, match=re.escape(sentence)):
        make()


def test_a_wrong_input_is_refused_by_the_op() -> None:
    layer = cases.quantized(LINEAR)
    with pytest.raises(TypeError, match="linear_s8: x must be float16 or bfloat16 or float32"):
        layer(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=re.escape("got (2, 5) and (3, 4)")):
        layer(torch.ones(2, 5))


def test_which_modules_are_float_linears() -> None:
    assert is_float_linear(LINEAR) and is_float_linear(Conv1D(3, 4))
    assert not is_float_linear(nn.Conv1d(4, 3, 1)) and not is_float_linear(cases.quantized(LINEAR))
    assert weight_of(Conv1D(3, 4)).shape == (3, 4) == weight_of(LINEAR).shape
