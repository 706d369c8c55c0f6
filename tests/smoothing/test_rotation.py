"""Rotation in the driver: which layers get it, the ranges it needs, and what it buys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    calibrate_model,
    quantize_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.smoothing.calibrate import calibration_batches
from smoothquant_kernels.smoothing.rows import rotated_maxima
from tests.support.models import layers_of, logits, make_model, token_batches

BATCHES = token_batches()
LAYER = "model.layers.0."
STATIC = SmoothQuantConfig(activation_scheme="static", only_where_better=False)


def quantized(config: SmoothQuantConfig, family: str = "llama") -> Any:
    return smooth_and_quantize(make_model(family), BATCHES, config, progress=False)


def rotations(model: Any) -> dict[str, int]:
    return {n: m.rotation for n, m in model.named_modules() if isinstance(m, W8A8Linear)}


@pytest.mark.parametrize(("asked", "hidden", "inner"), [("auto", 32, 8), ("none", 0, 0), (4, 4, 4)])
def test_each_layer_is_rotated_as_far_as_its_channels_allow(
    asked: Any, hidden: int, inner: int
) -> None:
    """32 hidden channels; 88 inner ones, of which 8 is the largest power of two."""
    model = quantized(SmoothQuantConfig(rotation=asked))
    found = rotations(model)
    assert {n: g for n, g in found.items() if "down_proj" in n} == {
        f"model.layers.{i}.mlp.down_proj": inner for i in range(2)
    }
    assert all(g == hidden for n, g in found.items() if "down_proj" not in n)
    assert {n: layer.get("rotation", 0) for n, layer in layers_of(model).items()} == found


def test_a_model_without_calibration_is_rotated_too() -> None:
    model = quantize_model(make_model("llama"))
    assert set(rotations(model).values()) == {32, 8}
    assert {layer["rotation"] for layer in layers_of(model).values()} == {32, 8}
    naive = quantize_model(make_model("llama"), config=SmoothQuantConfig(smooth=False))
    assert set(rotations(naive).values()) == {0}


@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_factors_of_rotated_layers_equal_the_formula_with_root_mean_squares(scheme: str) -> None:
    """Of a group that shares its input, and of a layer alone: its factors are pending, so they can be read exactly."""
    model = make_model("llama_gqa")
    config = SmoothQuantConfig(
        alpha=0.6,
        activation_scheme=scheme,
        massive_activations="keep",
        folding="never",
        smooth_rounding="none",
        only_where_better=False,
    )
    result = smooth_lm(copy.deepcopy(model), BATCHES, config=config, progress=False)
    names = ModelView(model).linears
    batches = list(calibration_batches(BATCHES))
    prefix = "model.layers.1.self_attn."
    for group in (["q_proj", "k_proj", "v_proj"], ["o_proj"]):
        read: list[Any] = []
        with Hooks(model) as hooks, torch.no_grad():
            hooks.on_input(prefix + group[0], lambda x, read=read: read.append(x.flatten(0, -2)))
            for batch in batches:
                model(**batch)
        x = torch.cat(read).double()
        weights = torch.cat([names[prefix + n].weight for n in group]).double()
        of_x = x.square().mean(0).sqrt() if scheme == "per_token" else x.abs().amax(0)
        s = of_x**0.6 / weights.square().mean(0).sqrt() ** 0.4
        for name in group:
            found = pending_smooth(result.get_submodule(prefix + name))
            # float32 inputs of another batch shape may differ by some roundings; then the norm's own and s's.
            torch.testing.assert_close(found, s.float(), rtol=1e-5, atol=0)


def test_rotation_without_smoothing() -> None:
    model = quantized(STATIC.replace(smooth=False, rotation=16))
    assert set(rotations(model).values()) == {16, 8}
    assert all(layer["smoothing"] == "none" for layer in layers_of(model).values())


def test_layers_of_their_own() -> None:
    qkv = {f"{LAYER}self_attn.{n}_proj": 8 for n in "qkv"}
    config = SmoothQuantConfig(rotations={**qkv, "*.o_proj": "none"})
    found = rotations(quantized(config))
    assert {n for n, g in found.items() if g == 8 and "down" not in n} == qkv.keys()
    assert {n for n, g in found.items() if g == 0} == {
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    }


def test_layers_that_read_one_tensor_must_agree() -> None:
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    config = SmoothQuantConfig(rotations={f"{LAYER}self_attn.k_proj": 8})
    with pytest.raises(SmoothQuantError, match=r"read the same tensor.*rotation is 32.*8"):
        smooth_lm(model, BATCHES, config=config, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    config = SmoothQuantConfig(rotations={"*.down_projj": 8})
    with pytest.raises(SmoothQuantError, match=r"rotations: .*did you mean"):
        smooth_lm(make_model("llama"), BATCHES, config=config, progress=False)


def test_static_scales_are_those_of_rotated_inputs() -> None:
    """All tokens of the batches, through the float model that the driver leaves: its inputs are smoothed."""
    smoothed = smooth_lm(
        make_model("llama"), BATCHES, config=STATIC.replace(folding="never"), progress=False
    )
    name = f"{LAYER}mlp.down_proj"
    seen: list[torch.Tensor] = []
    hook = smoothed.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    for batch in BATCHES:
        logits(smoothed, batch)
    hook.remove()
    model = quantize_model(smoothed)
    layer = model.get_submodule(name)
    largest = float(rotated_maxima(torch.cat(seen), layer.inv_smooth, layer.rotation).max())
    assert layer.rotation == 8
    assert 0.9 * largest <= float(layer.x_scale) * 127 <= largest * (1 + 2.0**-22)
    assert layers_of(model)[name]["x_absmax"] == pytest.approx(float(layer.x_scale) * 127)


def test_a_range_holds_for_its_own_rotation_only() -> None:
    model = smooth_lm(make_model("llama"), BATCHES, config=STATIC, progress=False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SmoothQuantError, match=r"measured with rotation 32 .* asks for 16"):
        quantize_model(model, config=STATIC.replace(rotation=16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    per_token = STATIC.replace(activation_scheme="per_token", rotation=16)
    assert set(rotations(quantize_model(model, config=per_token)).values()) == {16, 8}


@pytest.mark.parametrize("kind", ["channels", "tokens", "both"])
@pytest.mark.parametrize("scheme", ["per_token", "per_tensor", "static"])
def test_smooth_and_rotate_is_nearest_to_float(scheme: str, kind: str) -> None:
    """Outlier channels are what smoothing takes, outlier tokens what a rotation spreads."""
    generator = torch.Generator().manual_seed(4)
    linear = torch.nn.Linear(256, 64, bias=False)
    torch.nn.init.normal_(linear.weight, generator=generator)
    x = torch.randn(512, 256, generator=generator)
    if kind != "tokens":
        x[:, torch.randperm(256, generator=generator)[:6]] *= 50
    if kind != "channels":
        x[torch.randperm(512, generator=generator)[:5], 77] = 3000.0

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = copy.deepcopy(linear)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return y

    exact = linear(x).detach()
    statistics = calibrate_model(Model(), [{"x": x}], progress=False)

    def error(**settings: Any) -> float:
        config = SmoothQuantConfig(
            activation_scheme=scheme,
            massive_activations="keep",
            only_where_better=False,
            **settings,
        )
        model = smooth_and_quantize(Model(), statistics, config, progress=False)
        return float((model(x) - exact).norm() / exact.norm())

    both = error()
    assert both < 1.05 * error(rotation="none")
    assert both < 1.05 * error(smooth=False, rotation=256)
    assert both < 0.5 * error(smooth=False)
