"""The cost of each layer at the model's output, as it is exported and if it divided at run time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.nn import functional as F

from smoothquant_kernels import SmoothQuantConfig, W8A8Linear, calibrate_model, smooth_lm
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.search.costs import layer_costs
from smoothquant_kernels.search.sensitivity import record
from smoothquant_kernels.smoothing.factors import group_factors
from tests.support.models import LLAMA_LIKE, token_batches

BATCHES = token_batches()
ONLY = SmoothQuantConfig(
    folding="only", rotation="none", only_where_better=False, massive_activations="keep"
)


@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_costs_are_those_of_the_layers_alone(scheme: str) -> None:
    torch.manual_seed(0)
    config = transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0)
    model = transformers.Phi3ForCausalLM(config).eval()
    settings = ONLY.replace(activation_scheme=scheme)
    statistics = calibrate_model(model, BATCHES, settings, progress=False)
    smoothed = smooth_lm(copy.deepcopy(model), statistics, config=settings, progress=False)
    before = {n: t.clone() for n, t in smoothed.state_dict().items()}
    inputs = [{"input_ids": batch} for batch in BATCHES]
    costs = layer_costs(smoothed, statistics, inputs, settings)
    assert all(t.equal(before[n]) for n, t in smoothed.state_dict().items())
    layers = {layer["name"]: layer for layer in smoothed.smoothquant_info["layers"]}
    assert costs.keys() == layers.keys() and len(costs) == 8

    def cost(name: str, absmax: float, smooth: torch.Tensor | None = None) -> float:
        recording = record(smoothed, [Group((name,))], inputs)
        linear, x = smoothed.get_submodule(name), recording.x[name]
        scale = absmax / 127 if scheme == "static" else None
        new = W8A8Linear.from_linear(linear, activation_scheme=scheme, smooth=smooth, x_scale=scale)
        with torch.no_grad():
            return recording.cost(name, new(x) - F.linear(x, linear.weight))

    for name, layer in layers.items():
        assert costs[name].kl == cost(name, layer["x_absmax"]) > 0
        if layer["smoothing"] == "folded":
            assert costs[name].divided is None
            continue
        alpha = settings.alpha_of(layer["x_peak"], name, rotated=False)
        smooth = group_factors(model, Group((name,)), statistics, alpha, ("max", "max"), settings)
        assert costs[name].divided == cost(name, statistics.range_of(name, smooth), smooth) > 0
        assert costs[name].divided != costs[name].kl
