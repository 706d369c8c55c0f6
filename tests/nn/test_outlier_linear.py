"""`OutlierLinear`: the bits of its two products, its columns, and its refusals."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from smoothquant_kernels import OutlierLinear, SmoothQuantError, W8A8Linear, reference
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.float_linear import set_pending_smooth
from smoothquant_kernels.nn.quantized_linear import QuantizedLinear
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES
from tests.support import cases
from tests.support.checkpoints import refusal
from tests.support.compare import assert_bitwise_equal

#: K, N and the columns: none, at both edges, in the middle, all.
SHAPES: list[tuple[int, int, list[int]]] = [
    (1, 1, []),
    (1, 3, [0]),
    (5, 1, [4]),
    (31, 17, [0, 7, 8, 30]),
    (48, 33, []),
    (48, 33, [47]),
    (64, 17, [0, 15, 16, 63]),
    (64, 17, list(range(64))),
]


def made(
    k: int, n: int, columns: list[int] | None, scheme: str = "per_token", **options: Any
) -> tuple[Any, OutlierLinear]:
    """A float layer, and the quantized one; columns None: dynamic."""
    linear = cases.float_linear(k, n, bias=options.pop("bias", True))
    if scheme == "static":
        options.setdefault("x_scale", 0.02)
    layer = OutlierLinear.from_linear(
        linear,
        outliers="dynamic" if columns is None else "static",
        columns=columns,
        activation_scheme=scheme,
        **options,
    )
    return linear, layer


def expected_output(
    linear: Any,
    layer: OutlierLinear,
    x: Tensor,
    columns: list[int],
    w_q: Tensor,
    w_scale: Tensor,
    inverse: Tensor | None,
    w_columns: Tensor,
) -> Tensor:
    """The definition, from the reference and a float product, with the weights of the test."""
    scheme = layer.activation_scheme
    x_q, x_scale = reference.quantize(
        x,
        inverse,
        torch.tensor([0.02]) if scheme == "static" else None,
        "tensor" if scheme == "per_tensor" else "token",
        rotation=layer.rotation,
    )
    residual = F.linear(x[..., columns], w_columns.to(x.dtype)) if columns else None
    bias = None if linear.bias is None else linear.bias.detach()
    return reference.gemm_s8(x_q, w_q, x_scale, w_scale, bias, residual, out_dtype=x.dtype)


def settings(k: int) -> Iterator[dict[str, Any]]:
    """Every granularity with and without bias, factors and rotation."""
    group = k & -k
    for granularity, bias, smooth, rotation in itertools.product(
        WEIGHT_GRANULARITIES, (True, False), (None, cases.inverse_smooth(k)), {0, group}
    ):
        if rotation != 1:
            yield {
                "weight_granularity": granularity,
                "bias": bias,
                "smooth": smooth,
                "rotation": rotation,
            }


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-{len(s[2])}")
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_static_equals_the_reference(shape: tuple[int, int, list[int]], scheme: str) -> None:
    k, n, columns = shape
    for options in settings(k):
        linear, layer = made(k, n, columns, scheme, **options)
        weight = linear.weight.detach()
        s = torch.ones(k) if options["smooth"] is None else options["smooth"]
        inverse = 1 / s
        w = weight * s
        w[:, columns] = 0.0
        inverse[columns] = 0.0
        w = reference.rotate_weight(w, options["rotation"])
        w_q, w_scale = reference.quantize_weight(w, options["weight_granularity"])
        for dtype in cases.FLOATS:
            x = cases.activations(6, k, dtype).view(2, 3, k)
            args = (linear, layer, x, columns, w_q, w_scale, inverse, weight[:, columns])
            assert_bitwise_equal(layer(x), expected_output(*args), f"{options} {dtype}")


@pytest.mark.parametrize("k_n", [(1, 1), (31, 17), (64, 33)], ids=str)
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_dynamic_equals_the_reference(k_n: tuple[int, int], scheme: str) -> None:
    k, n = k_n
    for options in settings(k):
        linear, layer = made(k, n, None, scheme, threshold=2.5, **options)
        plain = cases.quantized(
            linear, scheme, **{key: v for key, v in options.items() if key != "bias"}
        )
        s = torch.ones(k) if options["smooth"] is None else options["smooth"]
        for dtype in cases.FLOATS:
            x = cases.activations(6, k, dtype).view(2, 3, k)
            large = (x.float() * (1 / s)).abs() >= 2.5
            columns = large.view(6, k).any(0).nonzero().view(-1).tolist()
            assert layer.find_columns(x).tolist() == columns
            inside = x.clone()
            inside[..., columns] = 0.0
            w_columns = plain.dequantized_weight()[:, columns]
            inverse = None if options["smooth"] is None else 1 / s
            args = (linear, layer, inside, [], plain.w_q, plain.w_scale, inverse, w_columns)
            if columns:
                residual = F.linear(x[..., columns], w_columns.to(dtype))
                rows, scale = reference.quantize(
                    inside,
                    inverse,
                    torch.tensor([0.02]) if scheme == "static" else None,
                    "tensor" if scheme == "per_tensor" else "token",
                    rotation=options["rotation"],
                )
                bias = None if linear.bias is None else linear.bias.detach()
                wanted = reference.gemm_s8(
                    rows, plain.w_q, scale, plain.w_scale, bias, residual, out_dtype=dtype
                )
            else:
                wanted = expected_output(*args)
            assert_bitwise_equal(layer(x), wanted, f"{options} {dtype}")


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_whole_numbers_are_exact(mode: str) -> None:
    """Operands whose scales are 1, and whose sums every type holds: the layer is the float one, outliers included."""
    k, n, columns = 24, 9, [0, 11, 23]
    g = cases.generator(1)
    linear = torch.nn.Linear(k, n)
    with torch.no_grad():
        linear.weight.copy_(torch.randint(-2, 3, (n, k), generator=g))
        linear.bias.copy_(torch.randint(-5, 6, (n,), generator=g))
        linear.weight[:, 1] = 127.0  # the scale of a channel is 1
    x = torch.randint(-1, 2, (7, k), generator=g).float()
    x[:, 1] = 0.0
    x[:, 2] = 127.0  # and that of a token
    linear.weight.data[:, 2] = 1.0
    x[2, 0], x[5, 11], x[:, 23] = 400.0, -300.0, 200.0
    options = {"columns": columns} if mode == "static" else {"threshold": 128.0}
    layer = OutlierLinear.from_linear(linear, outliers=mode, **options)
    assert layer.find_columns(x).tolist() == columns
    for dtype in (torch.float16, torch.float32):  # float16 holds whole numbers up to 2048
        exact = F.linear(x, linear.weight, linear.bias).detach()
        assert float(exact.abs().max()) < 2048
        assert_bitwise_equal(layer(x.to(dtype)), exact.to(dtype))


def test_without_columns_a_static_layer_is_a_w8a8_layer() -> None:
    x = cases.activations(5, 24, torch.bfloat16)
    for smooth in (None, cases.inverse_smooth(24)):
        linear, layer = made(24, 7, [], smooth=smooth, rotation=8)
        assert_bitwise_equal(layer(x), W8A8Linear.from_linear(linear, smooth=smooth, rotation=8)(x))


def test_all_columns_give_the_float_layer() -> None:
    for scheme in ACTIVATION_SCHEMES:
        linear, layer = made(16, 7, list(range(16)), scheme, rotation=16)
        assert not layer.w_q.any() and not layer.w_scale.any()
        x = cases.activations(5, 16)
        # The order of bias and product differs, and each sum is rounded once more.
        wanted = F.linear(x, linear.weight).double() + linear.bias.double()
        assert bool(((layer(x) - wanted).abs() <= 2.0**-23 * wanted.abs()).all())


def test_outliers_cost_no_accuracy() -> None:
    """With the columns in float, the error is that of int8 for the other channels, however large the outliers are."""
    linear, layer = made(64, 32, [3, 40])
    dynamic = OutlierLinear.from_linear(linear, outliers="dynamic", threshold=20.0)
    plain = W8A8Linear.from_linear(linear)
    x = torch.randn(50, 64, generator=cases.generator(4))
    without = (layer(x) - linear(x)).abs().max()
    for factor in (1.0, 100.0, 10000.0):
        large = x.clone()
        large[:, [3, 40]] *= factor
        # The float product and the float layer round sums of that size to 24 bits, in different orders.
        rounding = 64 * 2.0**-24 * float(large.abs().max())
        assert (layer(large) - linear(large)).abs().max() <= without + rounding
    large = x.clone()
    large[:, [3, 40]] *= 100
    assert dynamic.find_columns(large).tolist() == [3, 40]
    naive = (plain(large) - linear(large)).abs().mean()
    # int8 rounds the weights of a dynamic layer's columns, too.
    assert (dynamic(large) - linear(large)).abs().mean() < naive / 3
    assert (layer(large) - linear(large)).abs().mean() < naive / 20


@pytest.mark.parametrize("columns", [[0, 5], None], ids=["static", "dynamic"])
@pytest.mark.parametrize("rotation", [0, 8])
@pytest.mark.parametrize("at", [5, 6], ids=["outlier column", "other channel"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spoil_their_token_alone(
    columns: list[int] | None, rotation: int, at: int, value: float
) -> None:
    _, layer = made(16, 7, columns, rotation=rotation)
    x = torch.randn(4, 16, generator=cases.generator(2)).clamp(-3, 3)
    x[:, 5] *= 50
    before = layer(x)
    x[2, at] = value
    y = layer(x)
    assert not bool(y[2].isfinite().any())
    for row in (0, 1, 3):
        if columns is not None:
            assert_bitwise_equal(y[row], before[row])
        else:  # an infinite channel is an outlier of the whole call
            assert bool(y[row].isfinite().all())


def test_a_static_scale_keeps_nan() -> None:
    _, layer = made(16, 7, [5], "static")
    x = torch.randn(3, 16, generator=cases.generator(2))
    x[1, 5] = math.nan
    y = layer(x)
    assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("columns", [[1, 7], None], ids=["static", "dynamic"])
def test_no_tokens_views_and_zeros(columns: list[int] | None) -> None:
    _, layer = made(8, 5, columns)
    assert layer(torch.empty(0, 8)).shape == (0, 5)
    assert layer(torch.empty(2, 0, 8, dtype=torch.float16)).shape == (2, 0, 5)
    assert_bitwise_equal(layer(torch.zeros(2, 8)), layer.bias.expand(2, 5).clone())  # type: ignore[union-attr]
    x = cases.activations(8, 17)
    for view in (x.t(), x[:, 3:11], x[::2, 3:11], x.view(2, 4, 17)[..., 9:], x[3, :8]):
        if view.shape[-1] == 8:
            assert_bitwise_equal(layer(view), layer(view.contiguous()))


def test_conv1d_and_pending_factors() -> None:
    smooth, x = cases.inverse_smooth(12), cases.activations(4, 12)
    linear, layer = made(12, 5, [3, 11], smooth=smooth)
    conv = Conv1D(5, 12)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.t())
        conv.bias.copy_(linear.bias)
    set_pending_smooth(linear, smooth)
    for source, options in ((linear, {}), (conv, {"smooth": smooth})):
        other = OutlierLinear.from_linear(source, columns=[11, 3], **options)
        assert_bitwise_equal(other(x), layer(x))
        assert_bitwise_equal(other.w_columns, layer.w_columns)


def test_the_weight_that_a_layer_represents() -> None:
    for rotation, smooth in itertools.product((0, 8), (None, cases.inverse_smooth(24))):
        linear, layer = made(24, 7, [0, 9, 23], smooth=smooth, rotation=rotation)
        w = layer.dequantized_weight()
        assert_bitwise_equal(w[:, [0, 9, 23]], linear.weight.detach()[:, [0, 9, 23]])
        # A step of int8, for rotated channels of all rows together.
        s = torch.ones(24) if smooth is None else smooth
        step = layer.w_scale[:, None] * max(rotation, 1) * (1 / s)
        assert bool(((w - linear.weight).abs() <= 0.51 * step).all())
        assert_bitwise_equal(layer.weight + 0, w)
        dynamic = OutlierLinear.from_linear(
            linear, outliers="dynamic", smooth=smooth, rotation=rotation
        )
        plain = W8A8Linear.from_linear(linear, smooth=smooth, rotation=rotation)
        assert_bitwise_equal(dynamic.dequantized_weight(), plain.dequantized_weight())


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_rounded_operands_explain_the_output(mode: str, scheme: str) -> None:
    """The product of the rounded input and the rounded weight is the output, up to float32 roundings.

    With a rotation, a static layer adds in each column the product of two rounding errors: half a step of the input,
    and half a step of each of the weights that are rotated together.
    """
    columns = [0, 9, 23] if mode == "static" else None
    for rotation in (0, 8):
        options = {"threshold": 5.0, "rotation": rotation, "smooth": cases.inverse_smooth(24)}
        options |= {"x_scale": 10.0} if scheme == "static" else {}  # nothing saturates
        linear, layer = made(24, 7, columns, scheme, **options)
        kind: Any = kinds.kind_of(layer)
        x = cases.activations(6, 24).view(2, 3, 24)
        rounded, found = kind.rounded_input(layer, x), layer.find_columns(x)
        assert len(found)
        if columns or not rotation:
            assert_bitwise_equal(rounded[..., found], x[..., found], "in float")
        x_scale = QuantizedLinear.quantize_input(layer, x.index_fill(-1, found, 0.0)).x_scale
        twice = len(columns or []) * rotation * 0.26 * float(x_scale.max()) * layer.w_scale.double()
        y = F.linear(rounded.double(), kind.rounded_weight(layer).double(), linear.bias.double())
        size = rounded.abs().double() @ kind.rounded_weight(layer).abs().double().T + 1
        assert bool(((layer(x) - y).abs() <= 2.0**-19 * size + twice).all())


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_weight(mode: str, dtype: torch.dtype) -> None:
    columns = [0, 9, 23] if mode == "static" else None
    _, layer = made(24, 10, columns, rotation=8, smooth=cases.inverse_smooth(24), threshold=5.0)
    layer.to(dtype)
    x = cases.activations(6, 24, dtype).view(2, 3, 24).requires_grad_()
    weights = torch.randn(2, 3, 10, generator=cases.generator(4)).to(dtype)
    assert len(layer.find_columns(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where an operation has no gradient
        y = layer(x)
        (y * weights).sum().backward()
    assert_bitwise_equal(y.detach(), layer(x.detach()))
    wanted = weights.double() @ layer.dequantized_weight().double()
    assert x.grad is not None and x.grad.dtype == dtype
    # Sums of 10 products, then a sum of two parts, one of which is zero.
    size = weights.double().abs() @ layer.dequantized_weight().double().abs()
    assert bool(((x.grad.double() - wanted).abs() <= 13 * torch.finfo(dtype).eps * size).all())


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"columns": None}, "columns must be given for static outliers"),
        ({"outliers": "dynamic", "columns": [1]}, "and only for them"),
        ({"columns": [1, 1]}, "repeated"),
        ({"columns": [0, 12]}, "a channel outside [0, 11]"),
        ({"columns": [-1]}, "a channel outside [0, 11]"),
        ({"columns": [[1]]}, "whole numbers in one dimension; got torch.int64 [1, 1]"),
        ({"columns": [1.5]}, "whole numbers in one dimension; got torch.float32 [1]"),
        ({"columns": torch.tensor([True])}, "whole numbers in one dimension; got torch.bool [1]"),
        ({"columns": [1], "threshold": 0.0}, "threshold must be positive and finite; got 0.0"),
        ({"columns": [1], "threshold": math.nan}, "threshold must be positive and finite"),
        ({"columns": [1], "outliers": "all"}, "columns must be given for static outliers"),
        ({"columns": [1], "weight_granularity": "row"}, "must be channel or tensor; got 'row'"),
        ({"columns": [1], "rotation": 3}, "rotation must be 0 or a power of two"),
        ({"columns": [1], "activation_scheme": "static"}, "x_scale must be given"),
        ({"columns": [1], "smooth": torch.zeros(12)}, "smooth must be positive and finite"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    assert said in refusal(lambda: OutlierLinear.from_linear(cases.float_linear(12, 5), **options))


def test_the_constructor_refuses() -> None:
    assert "outliers must be static or dynamic" in refusal(
        lambda: OutlierLinear(4, 2, outliers="none")
    )
    assert "columns must be in [0, 4]" in refusal(lambda: OutlierLinear(4, 2, columns=5))
    assert "columns must be 0 for dynamic" in refusal(
        lambda: OutlierLinear(4, 2, outliers="dynamic", columns=1)
    )


def test_an_activation_that_is_quantized_already_is_refused() -> None:
    linear, layer = made(12, 5, [1])
    shared = W8A8Linear.from_linear(linear).quantize_input(cases.activations(3, 12))
    assert "cannot share an activation" in refusal(lambda: layer(shared))
    assert "cannot share an activation" in refusal(
        lambda: layer.quantize_input(cases.activations(3, 12))
    )
    with pytest.raises(SmoothQuantError, match="cannot be replaced"):
        layer.weight = torch.zeros(5, 12)
