"""Outlier columns of whole models: chosen by calibration, quantized, saved, streamed, exported or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels import (
    OutlierLinear,
    SmoothQuantConfig,
    W8A8Linear,
    quantize_model,
    reference,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.modeling.record import LayerRecord, ModelRecord
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.nn.rounding import moments_of
from smoothquant_kernels.smoothing.outliers import maxima_of
from smoothquant_kernels.smoothing.smooth import relative_difference
from tests.support.checkpoints import (
    assert_same_bits,
    logits,
)
from tests.support.models import layers_of, make_model, token_batches

BATCHES = token_batches(3)
THRESHOLD = (
    2.8  # of unsmoothed inputs; a part of the channels of the layers after a norm reaches it
)
SMOOTHED = 0.7  # of smoothed ones
BALANCED = 0.35  # of those that are smoothed for the static scheme
DOWN = "model.layers.0.mlp.down_proj"
STATIC: dict[str, Any] = {"outliers": "static", "outlier_threshold": THRESHOLD}

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data ended")


def quantized(family: str = "llama_gqa", **settings: Any) -> Any:
    config = SmoothQuantConfig(**{**STATIC, **settings})
    return smooth_and_quantize(make_model(family), BATCHES, config, progress=False)


def outlier_layers(model: nn.Module) -> dict[str, OutlierLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, OutlierLinear)}


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The inputs of all linears over the calibration data, [tokens, K]."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(
            lambda _, args, n=n: found.setdefault(n, []).append(args[0].flatten(0, -2))
        )
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(parts) for n, parts in found.items()}


# --- which channels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smooth", [False, True])
def test_columns_are_the_channels_beyond_the_threshold(smooth: bool) -> None:
    settings = {"rotation": "none", "smooth": smooth, "folding": "never"}
    threshold = SMOOTHED if smooth else THRESHOLD
    model = quantized(**settings, outlier_threshold=threshold)
    seen = inputs_of(make_model("llama_gqa"))
    config = SmoothQuantConfig(**settings)
    smoothed = smooth_lm(make_model("llama_gqa"), BATCHES, config=config, progress=False)
    counts = []
    for name, info in layers_of(model).items():
        layer, s = model.get_submodule(name), smoothed.get_submodule(name)
        pending = vars(s).get("_smoothquant_pending")
        x = seen[name] if pending is None else seen[name] / pending
        near = ((x.abs().amax(0) / threshold) - 1).abs() < 1e-5  # rounding may decide
        wanted = (x.abs().amax(0) >= threshold).nonzero().flatten()
        if not len(wanted):
            assert type(layer) is W8A8Linear and "outlier_columns" not in info
            continue
        assert not near.any() and layer.columns.tolist() == wanted.tolist()
        assert info["outlier_columns"] == len(wanted)
        weight = make_model("llama_gqa").get_submodule(name).weight.detach()
        assert_same_bits(layer.w_columns, weight[:, wanted])
        counts.append(len(wanted))
    assert 2 < len(counts) < 14 and len(set(counts)) > 1


def test_folded_factors_count_too() -> None:
    """The producer has divided the input already, so columns are those of what arrives."""
    config = SmoothQuantConfig(**{**STATIC, "outlier_threshold": SMOOTHED}, rotation="none")
    smoothed = smooth_lm(make_model("llama"), BATCHES, config=config, progress=False)
    seen = inputs_of(smoothed)
    folded = [n for n, la in layers_of(smoothed).items() if la["smoothing"] == "folded"]
    weights = {n: weight_of(smoothed.get_submodule(n)).detach().clone() for n in folded}
    quantize_model(smoothed)
    found = 0
    for name in folded:
        layer: Any = smoothed.get_submodule(name)
        wanted = (seen[name].abs().amax(0) >= SMOOTHED).nonzero().flatten().tolist()
        assert (layer.columns.tolist() if wanted else []) == wanted
        if wanted:
            assert_same_bits(layer.w_columns, weights[name][:, wanted])
            found += 1
    assert found > 3


def test_layers_of_other_settings_and_formats() -> None:
    model = quantized(
        outliers="none",
        smooth=False,
        outlier_layers={"*.q_proj": "static", "*.o_proj": "dynamic", "*.k_proj": "none"},
        formats={"*.1.self_attn.o_proj": "float"},
    )
    found = {n: m.outliers for n, m in outlier_layers(model).items()}
    assert found == {
        "model.layers.0.self_attn.q_proj": "static",
        "model.layers.1.self_attn.q_proj": "static",
        "model.layers.0.self_attn.o_proj": "dynamic",
    }
    assert layers_of(model)["model.layers.0.self_attn.o_proj"]["outlier_columns"] == 0


def test_a_head_has_columns_only_by_its_own_name() -> None:
    for own, kind in (({}, W8A8Linear), ({"lm_head": "static"}, OutlierLinear)):
        model = quantized(quantize_head=True, smooth=False, outlier_layers=own)
        assert type(model.lm_head) is kind


def test_the_record_keeps_the_number_of_columns() -> None:
    record = LayerRecord("a", group=("a",), activation_scheme="per_token", outlier_columns=3)
    assert LayerRecord.from_dict(record.to_dict()) == record
    assert "outlier_columns" not in LayerRecord("a", group=("a",)).to_dict()
    model = quantized(smooth=False)
    assert ModelRecord.from_dict(ModelRecord.of(model).to_dict()) == ModelRecord.of(model)


# --- ranges and moments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["none", 8])
def test_a_static_range_is_that_of_the_other_channels(rotation: Any) -> None:
    settings = {"activation_scheme": "static", "massive_activations": "keep", "smooth": False}
    model = quantized(**settings, rotation=rotation)
    seen = inputs_of(make_model("llama_gqa"))
    found = outlier_layers(model)
    assert len(found) > 3
    for name, layer in found.items():
        rest = seen[name].index_fill(1, layer.columns, 0.0)
        largest = reference.rotate(rest, layer.rotation).abs().amax(1)
        whole = reference.rotate(seen[name], layer.rotation).abs().max()
        scale = float(layer.x_scale) * 127  # type: ignore[arg-type]
        if rotation == "none":
            assert scale == pytest.approx(float(largest.max()), rel=1e-6)
        else:  # of the tokens that calibration has kept: the first ones at least
            assert largest[:32].max() * 0.999999 <= scale <= largest.max() * 1.000001
        assert scale < whole


def test_the_static_range_of_dynamic_columns_ends_at_the_threshold() -> None:
    settings = {"activation_scheme": "static", "massive_activations": "keep", "smooth": False}
    model = quantized(**settings, rotation="none", outliers="dynamic")
    whole = {n: la["x_absmax"] for n, la in layers_of(model).items()}
    for name, layer in outlier_layers(model).items():
        wanted = min(whole[name], THRESHOLD) / 127
        assert float(layer.x_scale) == pytest.approx(wanted, rel=1e-6)  # type: ignore[arg-type]
    assert max(whole.values()) > THRESHOLD > min(whole.values())


@pytest.mark.parametrize("rotation", ["none", 8])
def test_gptq_sees_the_input_without_the_columns(rotation: Any) -> None:
    config = SmoothQuantConfig(**STATIC, weight_rounding="gptq", rotation=rotation, smooth=False)
    smoothed: Any = smooth_lm(make_model("llama_gqa"), BATCHES, config=config, progress=False)
    name = "model.layers.0.self_attn.q_proj"
    linear = copy.deepcopy(smoothed.get_submodule(name))
    columns = maxima_of(linear).columns(THRESHOLD)  # type: ignore[union-attr]
    x = inputs_of(make_model("llama_gqa"))[name].index_fill(1, columns, 0.0)
    x = reference.rotate(x, 0 if rotation == "none" else rotation)
    moments = moments_of(linear).quantized(  # type: ignore[union-attr]
        0 if rotation == "none" else rotation, None, columns
    )
    torch.testing.assert_close(moments, x.T @ x, rtol=1e-4, atol=1e-4 * float(moments.max()))
    layer = quantize_model(smoothed).get_submodule(name)
    options = {"rotation": layer.rotation, "moments": moments, "columns": columns}
    wanted = OutlierLinear.from_linear(linear, **options)
    assert len(columns) and torch.equal(layer.w_q, wanted.w_q)
    nearest = OutlierLinear.from_linear(linear, columns=columns, rotation=layer.rotation)
    assert not torch.equal(layer.w_q, nearest.w_q)


# --- the model --------------------------------------------------------------------------------------------------------


def with_outliers() -> Any:
    """A model whose norms make two channels 16 times larger than the others, without an effect on its output."""
    model: Any = make_model("llama_gqa")
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (block.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight[[3, 20]] *= 16
                for m in block.modules():
                    for reader in readers:
                        if hasattr(m, reader):
                            getattr(m, reader).weight[:, [3, 20]] /= 16
    return model


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_outlier_columns_repair_naive_quantization(mode: str) -> None:
    model = with_outliers()
    wanted = logits(model)
    naive = SmoothQuantConfig(smooth=False)
    errors = []
    for config in (naive, naive.replace(outliers=mode, outlier_threshold=8.0)):
        other = smooth_and_quantize(copy.deepcopy(model), BATCHES, config, progress=False)
        errors.append(relative_difference(logits(other), wanted))
    for name, layer in outlier_layers(other).items():
        if mode == "static":
            assert {3, 20} <= set(layer.columns.tolist()), name  # type: ignore[union-attr]
    # A dynamic layer has rounded the small weights of the two channels to a few steps of int8.
    assert errors[1] < errors[0] * (0.3 if mode == "static" else 0.7)
