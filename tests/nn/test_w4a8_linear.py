"""`W4A8Linear`: its bits, its gradient, its state, and what becomes of a model of such layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W4A8Linear,
    quantize_model,
    reference,
)
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.support import cases
from tests.support.compare import assert_bitwise_equal, assert_same_buffers
from tests.support.copies import ways_to_copy
from tests.support.models import token_batches

BATCHES = token_batches(3)
CONFIG = SmoothQuantConfig(w_bit=4)
SIZES = ((1, 1), (5, 3), (128, 7), (130, 17), (300, 9))

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data ended")


def layer_of(
    k: int,
    n: int,
    scheme: str = "per_token",
    *,
    bias: bool = True,
    smooth: bool = False,
    **more: Any,
) -> W4A8Linear:
    return W4A8Linear.from_linear(
        cases.float_linear(k, n, bias),
        activation_scheme=scheme,
        smooth=cases.inverse_smooth(k) if smooth else None,
        x_scale=0.02 if scheme == "static" else None,
        **more,
    )


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k_n", SIZES, ids=str)
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_forward_equals_the_reference(k_n: tuple[int, int], scheme: str) -> None:
    k, n = k_n
    for bias, smooth, rotation in ((True, False, 0), (False, True, k & -k if k % 2 == 0 else 0)):
        rotation = min(rotation, 64)
        layer = layer_of(k, n, scheme, bias=bias, smooth=smooth, rotation=rotation)
        w_q = reference.w4_weight(layer.w_q4, layer.w_group, k)
        for dtype in cases.FLOATS:
            for m in (0, 1, 17):
                x = cases.activations(m, k, dtype) if m else torch.empty(0, k, dtype=dtype)
                x_q, x_scale = reference.quantize(
                    x,
                    layer.inv_smooth,
                    layer.x_scale,
                    "tensor" if scheme == "per_tensor" else "token",
                    rotation=rotation,
                )
                expected = reference.gemm_s8(
                    x_q, w_q, x_scale, layer.w_scale, layer.bias, out_dtype=dtype
                )
                assert_bitwise_equal(layer(x), expected, f"{dtype} {m}")
                shared = layer.quantize_input(x)
                assert_bitwise_equal(layer(shared), expected, f"{dtype} {m}, quantized before")
        assert layer(torch.zeros(2, 3, k)).shape == (2, 3, n)


def test_the_weight_represents_that_of_the_float_layer() -> None:
    """Even values: a step is at most a 15th of the range plus a unit, so the root mean square of the error is below

    (1 / 15 + 1 / 224) / sqrt(12) = 2.1 % of the range, which is sqrt(12) times that of the values: 7.1 %. Factors and
    rotations make the values less even. A normal distribution's 128 values span 5.4 root mean squares: 11.1 %.
    """
    linear = nn.Linear(256, 8)
    with torch.no_grad():
        linear.weight.copy_(torch.rand(8, 256, generator=torch.Generator().manual_seed(0)) - 0.5)
    weight = linear.weight.detach()
    for smooth, rotation, limit in (
        (None, 0, 0.071),
        (cases.inverse_smooth(256), 0, 0.111),
        (None, 64, 0.111),
        (cases.inverse_smooth(256), 64, 0.111),
    ):
        layer = W4A8Linear.from_linear(linear, smooth=smooth, rotation=rotation)
        s = torch.ones(256) if smooth is None else smooth
        error = (layer.dequantized_weight() - weight) * s
        assert error.norm() < limit * (weight * s).norm()
        assert_bitwise_equal(layer.weight * 1, layer.dequantized_weight())


def test_a_nonfinite_token_spoils_only_its_own_output() -> None:
    layer, x = layer_of(130, 6), cases.activations(5, 130)
    before = layer(x)
    for value in (torch.nan, torch.inf):
        broken = x.clone()
        broken[2, 7] = value
        after = layer(broken)
        assert not after[2].isfinite().any()
        assert_bitwise_equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_the_gradient_equals_that_of_the_float_product(scheme: str, smooth: bool) -> None:
    layer = layer_of(136, 10, scheme, smooth=smooth, rotation=8 if smooth else 0)
    x = cases.activations(6, 136).view(2, 3, 136).requires_grad_()
    weights = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(4))
    y = layer(x)
    assert_bitwise_equal(y.detach(), layer(x.detach()))
    (y * weights).sum().backward()
    float_x = x.detach().clone().requires_grad_()
    (F.linear(float_x, layer.dequantized_weight()) * weights).sum().backward()
    assert x.grad is not None and float_x.grad is not None
    # Both are sums of 10 products, possibly in another order.
    assert torch.allclose(
        x.grad, float_x.grad, rtol=1e-5, atol=1e-5 * float(float_x.grad.abs().max())
    )


# --- the module -------------------------------------------------------------------------------------------------------


def empty_like(layer: W4A8Linear, device: str = "cpu") -> W4A8Linear:
    return W4A8Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        activation_scheme=layer.activation_scheme,
        smooth=layer.inv_smooth is not None,
        rotation=layer.rotation,
        device=device,
        dtype=layer.dtype,
    )


def in_inference_mode(layer: W4A8Linear) -> W4A8Linear:
    with torch.inference_mode():
        made = copy.deepcopy(layer)
    assert not made.w_q4.is_inference() and not made.w_group.is_inference()
    return made


COPIES: dict[str, Callable[[W4A8Linear], W4A8Linear]] = {
    **ways_to_copy(empty_like),
    "inference mode": in_inference_mode,
    "half and back": lambda layer: copy.deepcopy(layer).half().bfloat16().double().float(),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same(way: str) -> None:
    x = cases.activations(4, 130)
    for scheme in ACTIVATION_SCHEMES:
        for bias, smooth, rotation in ((True, False, 0), (False, True, 2)):
            layer = layer_of(130, 5, scheme, bias=bias, smooth=smooth, rotation=rotation)
            made = COPIES[way](layer)
            assert repr(made) == repr(layer)
            assert_same_buffers(made, layer)
            assert_bitwise_equal(made(x), layer(x))


def test_the_dtype_follows_casts_and_the_state() -> None:
    layer = layer_of(6, 5).half()
    assert layer.weight.dtype == torch.float16 and layer.w_scale.dtype == torch.float32
    fresh = empty_like(layer_of(6, 5))
    fresh.load_state_dict(layer.state_dict())
    assert fresh.weight.dtype == torch.float16
    assert "activation_scheme=per_token" in repr(layer) and "W4A8Linear(in_features=6" in repr(
        layer
    )


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_another_layer_is_refused(strict: bool) -> None:
    layer = layer_of(6, 5)
    with pytest.raises(RuntimeError, match="is a float weight and this layer is quantized"):
        layer.load_state_dict(cases.float_linear(6, 5).state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        layer.load_state_dict(layer_of(300, 5).state_dict(), strict=True)


@pytest.mark.compiler
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_compile_and_export(scheme: str) -> None:
    layer = nn.Sequential(layer_of(130, 8, scheme, smooth=True, rotation=2)).eval()
    x = cases.activations(6, 130)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m")},))
    for m in (6, 3):
        assert_bitwise_equal(exported.module()(x[:m]), layer(x[:m]))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (6, 3):
        assert_bitwise_equal(compiled(x[:m]), layer(x[:m]))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "K": (lambda: W4A8Linear(0, 4), "in_features must be in"),
    "scheme": (lambda: W4A8Linear(4, 4, activation_scheme="token"), "activation_scheme must be"),
    "rotation": (lambda: W4A8Linear(12, 4, rotation=8), "divides in_features = 12"),
    "dtype": (lambda: W4A8Linear(4, 4, dtype=torch.float64), "float64"),
    "NaN": (lambda: W4A8Linear.from_linear(_with(torch.nan)), "NaN or Inf"),
    "double": (lambda: W4A8Linear.from_linear(nn.Linear(4, 4).double()), "float64"),
    "x_scale": (lambda: W4A8Linear.from_linear(nn.Linear(4, 4), x_scale=1.0), "static scheme"),
    "smooth": (lambda: W4A8Linear.from_linear(nn.Linear(4, 4), smooth=torch.zeros(4)), "positive"),
    "moments": (
        lambda: W4A8Linear.from_linear(nn.Linear(4, 4), moments=torch.eye(3)),
        "moments must be",
    ),
    "weight": (lambda: setattr(layer_of(4, 4), "weight", torch.ones(4, 4)), "cannot be replaced"),
    "granularity": (
        lambda: quantize_model(nn.Sequential(nn.Linear(4, 4)), config=CONFIG.replace(weight_granularity="tensor")),
        "scale per channel",
    ),
}  # fmt: skip


def _with(value: float) -> nn.Module:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[1, 2] = value
    return linear


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what: str) -> None:
    make, said = REFUSED[what]
    with pytest.raises(SmoothQuantError, match=said):
        make()


def test_a_wrong_input_is_refused_by_the_op() -> None:
    with pytest.raises(ValueError, match="linear_w4a8"):
        layer_of(6, 5)(torch.ones(3, 200))
    with pytest.raises(TypeError, match="float64"):
        layer_of(6, 5)(torch.ones(3, 6).double())
