"""Hooks, attributes and other attachments of a linear: they move to the int8 layer, or the layer stays in float."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    calibrate_model,
    quantize_model,
    smooth_and_quantize,
)
from tests.support.compare import assert_bitwise_equal
from tests.support.models import skip_reasons

K = 16
X = torch.randn(8, K, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """Two linears, one of which gets an attachment."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(self.norm(x))))
        return y


# --- attachments that move ------------------------------------------------------------------------------------


def scaled_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 0.25


def shifted_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 3.0,)


def by_keyword(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> Any:
    return (args[0] * 2.0, *args[1:]), kwargs


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda m: m.register_forward_hook(scaled_output),
    "input": lambda m: m.register_forward_pre_hook(shifted_input),
    "input with keywords": lambda m: m.register_forward_pre_hook(by_keyword, with_kwargs=True),
    "output with keywords": lambda m: m.register_forward_hook(
        lambda m, args, kwargs, y: y - 1.0, with_kwargs=True
    ),
    "always": lambda m: m.register_forward_hook(scaled_output, always_call=True),
    "first": lambda m: m.register_forward_pre_hook(shifted_input, prepend=True),
}


@pytest.mark.parametrize("smooth", [True, False], ids=["smoothed", "alone"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_forward_hook_moves_to_the_int8_layer(hook: str, smooth: bool) -> None:
    model, plain = Two().eval(), Two().eval()
    handle = HOOKS[hook](model.b)
    before = model(X)
    if smooth:
        smooth_and_quantize(model, [{"x": X}], progress=False)
    else:
        quantize_model(model)
    assert isinstance(model.b, W8A8Linear) and "b" not in skip_reasons(model)
    # int8 rounds each of 16 products by at most 1/254 of the largest. The hooks change the result far more.
    assert (model(X) - before).abs().max() < 0.1 * (before - plain(X)).abs().max()
    hooked = model(X)
    handle.remove()
    x = torch.tanh(model.a(model.norm(X)))
    assert_bitwise_equal(model(X), model.b.forward(x))
    assert not torch.equal(model(X), hooked)


def test_calibration_measures_inputs_after_their_hooks() -> None:
    model = Two().eval()
    model.b.register_forward_pre_hook(shifted_input)
    statistics = calibrate_model(model, [{"x": X}], progress=False)
    seen = torch.tanh(model.a(model.norm(X))) + 3.0
    assert_bitwise_equal(statistics.absmax["b"], seen.detach().abs().amax(0))


def test_attributes_move_to_the_int8_layer() -> None:
    model = Two().eval()
    tag = object()
    model.b.tag, model.b._is_hf_initialized = tag, True  # type: ignore[assignment]
    quantize_model(model)
    moved: Any = model.b
    assert isinstance(moved, W8A8Linear) and moved.tag is tag and moved._is_hf_initialized is True
    assert not hasattr(model.a, "tag")


def test_a_failed_quantization_keeps_the_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Two().eval()
    handle = model.a.register_forward_hook(scaled_output)
    before, layers = model(X), (model.a, model.b)
    make = W8A8Linear.from_linear

    def failing(linear: nn.Module, **options: Any) -> W8A8Linear:
        if linear is layers[1]:
            raise RuntimeError("no memory")
        return make(linear, **options)

    monkeypatch.setattr(W8A8Linear, "from_linear", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        quantize_model(model)
    assert (model.a, model.b) == layers
    assert_bitwise_equal(model(X), before)
    handle.remove()
    assert not torch.equal(model(X), before)


# --- attachments that keep a layer in float -------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def replaced_forward(linear: nn.Linear) -> None:
    old = linear.forward
    linear.forward = lambda input: 3 * old(input)  # type: ignore[method-assign]


def old_weight_norm(linear: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(linear)


def frozen_weight(linear: nn.Linear) -> None:
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight  # type: ignore[assignment]


KEEPS_FLOAT: dict[str, tuple[Callable[[nn.Linear], object], str]] = {
    "forward": (replaced_forward, "its forward was replaced on the instance"),
    "parametrization": (
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        "it has a module of its own, parametrizations",
    ),
    "spectral norm": (
        nn.utils.parametrizations.spectral_norm,
        "it has a module of its own, parametrizations",
    ),
    "weight norm": (old_weight_norm, "it has a parameter of its own, weight_g"),
    "old spectral norm": (nn.utils.spectral_norm, "it has a parameter of its own, weight_orig"),
    "pruning": (
        lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
        "it has a parameter of its own, weight_orig",
    ),
    "pruned bias": (
        lambda m: prune.l1_unstructured(m, "bias", amount=0.5),
        "it has a parameter of its own, bias_orig",
    ),
    "parameter": (
        lambda m: m.register_parameter("lora_A", nn.Parameter(torch.zeros(2, K))),
        "it has a parameter of its own, lora_A",
    ),
    "buffer": (
        lambda m: m.register_buffer("mask", torch.ones(K)),
        "it has a buffer of its own, mask",
    ),
    "module": (
        lambda m: m.add_module("adapter", nn.Linear(K, K)),
        "it has a module of its own, adapter",
    ),
    "weight": (frozen_weight, "its weight is not a parameter"),
    "backward hook": (
        lambda m: m.register_full_backward_hook(lambda *_: None),
        "it has backward hooks, and an int8 layer has no gradient",
    ),
    "backward pre-hook": (
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
        "it has backward hooks, and an int8 layer has no gradient",
    ),
    "gradient hook": (
        lambda m: m.weight.register_hook(lambda g: g),
        "its weight has a gradient hook, and an int8 layer has no gradient",
    ),
    "state hook": (
        lambda m: m.register_state_dict_post_hook(lambda *_: None),
        "it has hooks on its state dict, which name the float weight",
    ),
    "state pre-hook": (
        lambda m: m.register_state_dict_pre_hook(lambda *_: None),
        "it has hooks on its state dict, which name the float weight",
    ),
    "load hook": (
        lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
        "it has hooks on its state dict, which name the float weight",
    ),
    "tensor": (
        lambda m: setattr(m, "scale", torch.ones(1)),
        "it has a tensor of its own, scale",
    ),
    "bound method": (
        lambda m: setattr(m, "original", functools.partial(m.forward)),
        "its attribute original is bound to the float layer",
    ),
    "name": (
        lambda m: setattr(m, "dtype", "mine"),
        "its attribute dtype means something else for an int8 layer",
    ),
}


@pytest.mark.parametrize("what", KEEPS_FLOAT)
def test_an_attachment_that_cannot_move_keeps_the_layer_in_float(what: str) -> None:
    attach, reason = KEEPS_FLOAT[what]
    model = Two().eval()
    attach(model.a)
    before = model(X)
    config = SmoothQuantConfig(folding="never")
    smooth_and_quantize(model, [{"x": X}], config, progress=False)
    assert isinstance(model.a, nn.Linear) and isinstance(model.b, W8A8Linear)
    assert (
        skip_reasons(model)["a"].startswith(f"{reason}")
        and "stays in float" in skip_reasons(model)["a"]
    )
    x = model.a(model.norm(X))
    assert_bitwise_equal(model.b(torch.tanh(x)), model(X))
    assert (model(X) - before).abs().max() < 0.05 * before.abs().max()  # only b's int8 rounding


def test_a_model_without_a_quantizable_linear_is_refused() -> None:
    model = Two().eval()
    for linear in (model.a, model.b):
        replaced_forward(linear)
    with pytest.raises(SmoothQuantError, match="no linear layer to quantize in Two"):
        quantize_model(model)
