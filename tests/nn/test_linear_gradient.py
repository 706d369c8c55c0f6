"""The gradient of an int8 layer is that of the float product with its dequantized weight."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from smoothquant_kernels import quantize_model
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.support import cases
from tests.support.models import make_model, token_batches

K, N = 24, 10


def both_gradients(scheme: str, dtype: torch.dtype, smooth: bool) -> tuple[torch.Tensor, ...]:
    layer = cases.quantized(
        cases.float_linear(K, N).to(dtype),
        scheme,
        smooth=cases.inverse_smooth(K) if smooth else None,
        rotation=8 if smooth else 0,
    )
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    weights = torch.randn(2, 3, N, generator=torch.Generator().manual_seed(4)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where an operation has no gradient
        (layer(x) * weights).sum().backward()
    float_x = x.detach().clone().requires_grad_()
    (F.linear(float_x, layer.dequantized_weight().to(dtype)) * weights).sum().backward()
    assert x.grad is not None and float_x.grad is not None
    return x.grad, float_x.grad


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_the_gradient_equals_that_of_the_float_product(scheme: str, smooth: bool) -> None:
    found, expected = both_gradients(scheme, torch.float32, smooth)
    assert found.dtype == torch.float32
    # Both are sums of 10 products, possibly in another order.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_gradient_in_half_precision() -> None:
    found, expected = both_gradients("per_token", torch.bfloat16, False)
    assert found.dtype == torch.bfloat16
    assert (found - expected).float().norm() < 0.01 * expected.float().norm()


def test_a_prompt_is_trained_through_an_int8_model() -> None:
    """The gradient of a prompt passes all layers, not only the residual connections."""
    model = make_model("llama")
    prompt = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(5))
    grads = []
    for made in (model, quantize_model(copy.deepcopy(model))):
        x = prompt.clone().requires_grad_()
        made(inputs_embeds=x, labels=token_batches(1, 6)[0][:1]).loss.backward()
        grads.append(x.grad)
    assert (grads[1] - grads[0]).norm() < 0.05 * grads[0].norm()


def test_compile_and_activation_checkpointing() -> None:
    layer = cases.quantized(cases.float_linear(K, N), "per_token")
    grads = []
    ways = (
        layer,
        torch.compile(layer, backend="aot_eager", fullgraph=True),
        lambda x: checkpoint(layer, x, use_reentrant=False),
    )
    for call in ways:
        x = torch.ones(4, K, requires_grad=True)
        call(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_without_gradients_nothing_is_recorded() -> None:
    layer = cases.quantized(cases.float_linear(K, N), "per_token")
    x = torch.ones(4, K, requires_grad=True)
    assert not layer(x.detach()).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
