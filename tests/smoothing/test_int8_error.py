"""A group is smoothed only if that reduces its int8 error, which is measured with and without factors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.lib.planted import llama_readers, plant_outliers
from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Linear,
    calibrate_model,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.run import evaluating
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from smoothquant_kernels.smoothing.int8_error import InputSettings, int8_errors, static_scale
from tests.support.models import layers_of, make_model, token_batches

DATA = token_batches(2, length=24)


HOT = torch.ones(48)
HOT[7] = 300.0


class Two(nn.Module):
    """Two linears with their own inputs. Each input has an outlier channel, which only the weights of `second` undo.

    alpha = 1 moves all difficulty into the weights. Per token, that increases the error of `first` and reduces the
    error of `second`.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 32), nn.Linear(48, 32, bias=False)
        with torch.no_grad():
            self.second.weight /= HOT

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x * HOT) + self.second(x.flip(-2) * HOT)


def by_hand(
    linear: nn.Linear,
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    settings: InputSettings,
) -> float:
    """The same error, from the real layer without its bias."""
    plain = copy.deepcopy(linear)
    plain.bias = None
    layer = W8A8Linear.from_linear(
        plain,
        activation_scheme=settings.scheme,
        smooth=smooth,
        rotation=settings.rotation,
        x_scale=settings.scale if settings.scheme == "static" else None,
    )
    exact = F.linear(x.double(), linear.weight.detach().double())
    return float((layer(x).double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_errors_equal_those_of_the_real_layers(scheme: str, rotation: int) -> None:
    model, x = Two().eval(), torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    inputs = {"first": x * HOT, "second": x.flip(0) * HOT}
    # As if calibrated on more data than the sample.
    absmax = {n: 1.25 * t.abs().amax(0) for n, t in inputs.items()}
    groups = {n: Group((n,)) for n in inputs}
    factors = {groups[n]: absmax[n] for n in inputs}  # alpha = 1

    def settings_of(name: str, smooth: torch.Tensor | None) -> InputSettings:
        largest = float((absmax[name] if smooth is None else absmax[name] / smooth).max())
        return InputSettings(scheme, static_scale(largest, 0.9), rotation)

    with evaluating(model):
        errors = int8_errors(model, factors, settings_of, {}, lambda _: model(x), "channel")
    for name, group in groups.items():
        linear: Any = model.get_submodule(name)
        with torch.no_grad():
            naive = by_hand(linear, inputs[name], None, settings_of(name, None))
            s = absmax[name]
            smoothed = by_hand(linear, inputs[name], s, settings_of(name, s))
        # Both sides round float32 sums of 48 products. That changes an error of about 1e-3 by far less than 1e-4 of it.
        assert errors[group].naive == pytest.approx(naive, rel=1e-4)
        assert errors[group].smoothed == pytest.approx(smoothed, rel=1e-4)
        assert errors[group].helps == (smoothed <= 1.05 * naive)


def test_a_group_that_smoothing_makes_worse_is_not_smoothed() -> None:
    model = Two().eval()
    data = [
        {"x": torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(i))} for i in (1, 2)
    ]
    before = copy.deepcopy(model.state_dict())
    config = SmoothQuantConfig(alpha=1.0, rotation="none")
    smooth_lm(model, data, config=config, progress=False)
    layers = layers_of(model)
    assert layers["second"]["smoothing"] == "runtime" and layers["second"]["alpha"] == 1.0
    first = layers["first"]
    assert first["smoothing"] == "none" and first["alpha"] is None
    assert "int8 error" in first["reason"] and "if smoothed" in first["reason"]
    assert first["x_absmax"] == max(float((batch["x"] * HOT).abs().max()) for batch in data)
    assert pending_smooth(model.first) is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    quantize_model(model)
    assert model.first.inv_smooth is None and model.second.inv_smooth is not None


@pytest.mark.parametrize("settings", [{"only_where_better": False}, {"alphas": {"*": 1.0}}])
def test_explicit_settings_are_followed(settings: dict[str, Any]) -> None:
    data = [{"x": torch.randn(1, 24, 48, generator=torch.Generator().manual_seed(1))}]
    config = SmoothQuantConfig(alpha=1.0, **settings)
    model = smooth_lm(Two().eval(), data, config=config, progress=False)
    assert [layer["smoothing"] for layer in model.smoothquant_info["layers"]] == ["runtime"] * 2


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
def test_planted_outliers_are_smoothed_everywhere(scheme: str) -> None:
    model: Any = make_model("llama")
    plant_outliers(model, llama_readers(model))
    statistics = calibrate_model(model, DATA, progress=False)
    config = SmoothQuantConfig(activation_scheme=scheme, massive_activations="keep")
    smooth_lm(model, statistics, config=config)
    layers = layers_of(model)
    after_norms = [n for names in llama_readers(model).values() for n in names]
    assert after_norms and all(layers[n]["smoothing"] == "folded" for n in after_norms)
