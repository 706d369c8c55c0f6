"""Smoothing keeps the model's function, uses the factors of the formula and records what it did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.lib.planted import plant_outliers
from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    calibrate_model,
    quantize_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.smoothing.calibrate import calibration_batches, collect_statistics
from smoothquant_kernels.smoothing.fold import norm_offsets, round_to_power_of_two
from tests.support.models import CONFIGS, layers_of, logits, make_model, token_batches

IDS = token_batches(1, length=40)[0]


def smoothed(model: nn.Module, **options: Any) -> nn.Module:
    """A copy with every group smoothed. By default the factors are powers of two, so that outputs are bit-identical."""
    config = SmoothQuantConfig(
        **{"smooth_rounding": "power_of_two", "only_where_better": False, **options}
    )
    return smooth_lm(copy.deepcopy(model), token_batches(), config=config, progress=False)


@pytest.mark.parametrize("family", CONFIGS)
def test_powers_of_two_change_no_bit(family: str) -> None:
    model = make_model(family)
    result = smoothed(model)
    assert torch.equal(logits(result, IDS), logits(model, IDS))
    assert result.smoothquant_info["verification"] == {"relative_change": 0.0, "bit_exact": True}
    changed = [n for n, layer in layers_of(result).items() if layer["smoothing"] != "none"]
    assert len(changed) == len(ModelView(model).linears)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bloom_post", "gpt_neox"])
def test_exact_factors_keep_the_function(family: str) -> None:
    """With unrounded factors every smoothed product is rounded once more, which adds about 1e-7 each."""
    model = make_model(family)
    before, after = logits(model, IDS), logits(smoothed(model, smooth_rounding="none"), IDS)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_every_bit(dtype: torch.dtype) -> None:
    """Folding the unrounded factors into bfloat16 norm weights would change each channel by up to 0.4 %."""
    model = make_model("opt", dtype=dtype)
    assert torch.equal(logits(smoothed(model), IDS), logits(model, IDS))


def test_factors_equal_the_formula() -> None:
    """s by its definition equals s read back from the weights (folded) and from inv_smooth (run time)."""
    model = make_model("llama_gqa")
    result = smoothed(model, alpha=0.7, smooth_rounding="none", rotation="none")
    names = ModelView(model).linears
    batches = calibration_batches(token_batches())
    absmax = collect_statistics(model, names, batches, progress=False).absmax
    prefix = "model.layers.1."
    group = [f"{prefix}self_attn.{n}_proj" for n in "qkv"]
    columns = torch.stack([model.get_submodule(n).weight.abs().amax(0) for n in group]).amax(0)
    s = absmax[group[0]] ** 0.7 / columns**0.3
    norms = [m.get_submodule(f"{prefix}input_layernorm").weight for m in (model, result)]
    torch.testing.assert_close(norms[0] / norms[1], s, rtol=1e-5, atol=0)
    for name in group:
        ratio = result.get_submodule(name).weight / model.get_submodule(name).weight
        torch.testing.assert_close(ratio, s.expand_as(ratio), rtol=1e-5, atol=0)
        assert layers_of(result)[name]["smoothing"] == "folded"
        expected = (absmax[name] / s).max().item()
        assert layers_of(result)[name]["x_absmax"] == pytest.approx(expected, rel=1e-5)

    out = f"{prefix}self_attn.o_proj"
    s_out = absmax[out] ** 0.7 / model.get_submodule(out).weight.abs().amax(0) ** 0.3
    layer = result.get_submodule(out)
    assert layers_of(result)[out]["smoothing"] == "runtime"
    assert torch.equal(layer.weight, model.get_submodule(out).weight)
    torch.testing.assert_close(pending_smooth(layer), s_out, rtol=1e-5, atol=0)


def test_power_of_two_rounding() -> None:
    s = torch.tensor([1.0, 1.41, 1.42, 0.71, 0.70, 3e-30, 5e30])
    result = round_to_power_of_two(s)
    mantissa, _ = torch.frexp(result)
    assert (mantissa == 0.5).all()
    assert result[:5].tolist() == [1.0, 1.0, 2.0, 0.5 if s[3] < 2**-0.5 else 1.0, 0.5]
    assert ((result / s).log2().abs() <= 0.5 + 1e-6).all()


def test_alpha_zero_equalizes_the_weight_columns() -> None:
    """With alpha = 0, s = 1 / max|W_j|, so all columns of the smoothed weight have the same maximum."""
    model = make_model("llama")
    settings = {"smooth_rounding": "none", "folding": "never", "weight_norm": "max"}
    result = smoothed(model, alpha=0.0, **settings)
    layer = result.get_submodule("model.layers.0.mlp.down_proj")
    weight = layer.weight * pending_smooth(layer)
    torch.testing.assert_close(weight.abs().amax(0), torch.ones(weight.shape[1]))


def test_folding_never_divides_everywhere() -> None:
    result = smoothed(make_model("opt"), folding="never")
    assert {layer["smoothing"] for layer in layers_of(result).values()} == {"runtime"}
    assert torch.equal(logits(result, IDS), logits(make_model("opt"), IDS))


class OnePlusNorm(nn.Module):
    """Gemma's norm: (1 + weight) * y."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class SquareNorm(OnePlusNorm):
    """A norm that scales neither with its weight nor with 1 + weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight**2


def test_norm_parametrizations_are_distinguished() -> None:
    factor = 2.0 ** torch.arange(-8, 8).float().mul(0.5).round()
    assert norm_offsets(nn.LayerNorm(16), factor, 1e-5) == {}
    assert norm_offsets(nn.LayerNorm(16, bias=False), factor, 1e-5) == {}
    assert norm_offsets(OnePlusNorm(), factor, 1e-5) == {"weight": 1.0}
    assert norm_offsets(SquareNorm(), factor, 1e-5) is None
    module = OnePlusNorm()
    norm_offsets(module, factor, 1e-5)
    assert torch.equal(module.weight, OnePlusNorm().weight)


def test_a_fold_that_changes_the_model_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the search chose a wrong producer, verification makes only its group divide at run time."""
    from smoothquant_kernels.modeling.groups import Group, find_groups
    from smoothquant_kernels.smoothing import smooth

    def wrong_groups(*args: Any, **options: Any) -> list[Group]:
        found = find_groups(*args, **options)
        wrong = "model.layers.0.mlp.gate_proj"  # a SiLU follows, which is not homogeneous
        return [
            Group(g.linears, wrong) if g.linears == ("model.layers.0.mlp.down_proj",) else g
            for g in found
        ]

    monkeypatch.setattr(smooth, "find_groups", wrong_groups)
    model = make_model("llama")
    result = smoothed(model)
    bad = layers_of(result).pop("model.layers.0.mlp.down_proj")
    assert bad["smoothing"] == "runtime" and "would change the model" in bad["reason"]
    others = [layer for n, layer in layers_of(result).items() if n != bad["name"]]
    assert {layer["smoothing"] for layer in others} == {"folded"}
    assert torch.equal(logits(result, IDS), logits(model, IDS))


def test_folds_that_rounding_forbids_use_powers_of_two() -> None:
    """No fold by unrounded factors keeps every bit, so a tolerance of 0 refuses them all."""
    model = make_model("opt")
    options = {"smooth_rounding": "auto", "verify_tolerance": 0.0}
    result = smoothed(model, **options)
    assert {layer["smoothing"] for layer in layers_of(result).values()} >= {"folded"}
    assert torch.equal(logits(result, IDS), logits(model, IDS))
    norm = "model.decoder.layers.0.self_attn_layer_norm.weight"
    ratio = result.get_parameter(norm) / model.get_parameter(norm)
    assert (torch.frexp(ratio).mantissa == 0.5).all() and (ratio != 1).any()
    # If the formula's factors are demanded, they are kept and divide at run time.
    exact = smoothed(model, smooth_rounding="none", verify_tolerance=0.0)
    assert {layer["smoothing"] for layer in layers_of(exact).values()} == {"runtime"}
    assert torch.equal(logits(exact, IDS), logits(model, IDS))


def test_a_tied_linear_is_quantized_but_not_smoothed() -> None:
    model = make_model("llama")
    first, second = (model.model.layers[i].mlp.down_proj for i in (0, 1))
    second.weight = first.weight
    before = logits(model, IDS)
    result = smoothed(model)
    assert torch.equal(logits(result, IDS), before)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"):
        assert layers_of(result)[name]["smoothing"] == "none"
        assert "its weight is also" in layers_of(result)[name]["reason"]
    quantize_model(result)
    assert isinstance(result.model.layers[1].mlp.down_proj, W8A8Linear)


def test_a_layer_with_two_names_is_replaced_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    model = quantize_model(Twice())
    assert isinstance(model.first, W8A8Linear) and model.second is model.first


# --- quantization ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gpt_neox", "gpt2", "qwen3"])
@pytest.mark.parametrize("scheme", ["per_token", "per_tensor", "static"])
def test_every_linear_but_the_head_is_int8(family: str, scheme: str) -> None:
    model = make_model(family)
    expected = logits(model, IDS)
    config = SmoothQuantConfig(activation_scheme=scheme, alpha=0.5)
    names = set(ModelView(model).linears)
    result = smooth_and_quantize(model, token_batches(), config, progress=False)
    assert result is model
    quantized = {n for n, m in model.named_modules() if isinstance(m, W8A8Linear)}
    assert quantized == names == set(layers_of(model))
    assert {layer["activation_scheme"] for layer in layers_of(model).values()} == {scheme}
    assert [s["reason"] for s in model.smoothquant_info["skipped"]] == [
        "output head: stays in float"
    ]
    # int8 rounds each operand by at most 1/254 of its range. A wrong scale or layout causes far more than 20 %.
    error = (logits(model, IDS) - expected).norm() / expected.norm()
    assert 0 < error < 0.2


@pytest.mark.parametrize("scheme", ["per_token", "per_tensor", "static"])
def test_planted_outliers_break_naive_and_not_smoothed(scheme: str) -> None:
    """The paper's case: outlier channels that the weights undo (section 3.1)."""
    model = make_model("opt")
    norms = {}
    for i in (0, 1):
        prefix = f"model.decoder.layers.{i}."
        norms[prefix + "self_attn_layer_norm"] = [f"{prefix}self_attn.{n}_proj" for n in "qkv"]
        norms[prefix + "final_layer_norm"] = [prefix + "fc1"]
    clean = logits(model, IDS)
    plant_outliers(model, norms)
    torch.testing.assert_close(logits(model, IDS), clean, rtol=1e-3, atol=1e-3)

    def error(smooth: bool) -> float:
        config = SmoothQuantConfig(activation_scheme=scheme, alpha=0.5, smooth=smooth)
        m = smooth_and_quantize(copy.deepcopy(model), token_batches(), config, progress=False)
        return float((logits(m, IDS) - clean).norm() / clean.norm())

    assert error(smooth=True) < 0.5 * error(smooth=False)


@pytest.mark.parametrize(("smooth", "rotation"), [(True, 32), (False, 0)])
def test_quantize_without_smoothing(smooth: bool, rotation: int) -> None:
    """Rotated, as it needs no calibration; or naive W8A8."""
    model = make_model("llama")
    reference = copy.deepcopy(model)
    quantize_model(model, w_bit=8, a_bit=8, config=SmoothQuantConfig(smooth=smooth))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    plain = W8A8Linear.from_linear(
        reference.get_submodule("model.layers.0.mlp.up_proj"), rotation=rotation
    )
    assert layer.rotation == rotation
    assert torch.equal(layer.w_q, plain.w_q) and layer.inv_smooth is None
    assert {layer["smoothing"] for layer in layers_of(model).values()} == {"none"}


def test_both_calls_return_the_model() -> None:
    model = make_model("llama")
    assert smooth_lm(model, token_batches(), alpha=0.5) is model
    assert model.smoothquant_info["config"]["alpha"] == 0.5
    assert quantize_model(model, w_bit=8, a_bit=8) is model


def test_static_scale_is_the_smoothed_maximum_over_127() -> None:
    model = make_model("llama")
    smooth_lm(model, token_batches(), progress=False)
    expected = {n: layer["x_absmax"] / 127 for n, layer in layers_of(model).items()}
    quantize_model(model, config=SmoothQuantConfig(activation_scheme="static"))
    for name, scale in expected.items():
        assert model.get_submodule(name).x_scale.item() == pytest.approx(scale, rel=1e-6)


def test_skip_patterns_and_second_quantization() -> None:
    model = make_model("llama")
    config = SmoothQuantConfig(skip=("*.down_proj", "*layers.0*q_proj"))
    smooth_and_quantize(model, token_batches(), config, progress=False)
    kept = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kept == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
        "lm_head",
    }
    with pytest.raises(SmoothQuantError, match="quantized already"):
        quantize_model(model)


@pytest.mark.parametrize("call", ["smooth", "quantize"])
def test_a_nan_weight_is_named_and_nothing_is_changed(call: str) -> None:
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SmoothQuantError, match=r"weight of layer model\.layers\.1\.mlp\.up_proj"):
        if call == "smooth":
            smooth_lm(model, token_batches(), progress=False)
        else:
            quantize_model(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in before.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: smooth_lm(m, token_batches(), alpha=1.5), r"alpha must be a number in \[0, 1\]"),
        (lambda m: smooth_lm(m, []), "calibration data is empty"),
        (lambda m: quantize_model(m, w_bit=3), "w_bit must be 4 or 8"),
        (lambda m: quantize_model(m, a_bit=16), "a_bit must be 8"),
        (
            lambda m: quantize_model(m, config=SmoothQuantConfig(activation_scheme="static")),
            "run smooth_lm on calibration data first",
        ),
        (lambda m: smooth_lm(nn.Sequential(nn.ReLU()), token_batches()), "no linear layer"),
        (lambda m: quantize_model(m, config=SmoothQuantConfig(skip=("*",))), "were skipped"),
    ],
)
def test_wrong_requests_are_refused(call: Any, message: str) -> None:
    model = make_model("llama")
    with pytest.raises(SmoothQuantError, match=message):
        call(model)
    assert torch.equal(logits(model, IDS), logits(make_model("llama"), IDS))


@pytest.mark.parametrize("rotation", ["auto", "none"])
@pytest.mark.parametrize("scheme", ["per_tensor", "static"])
def test_massive_activations_are_found_and_quantized_per_token(scheme: str, rotation: str) -> None:
    """Token 9 drives the input of one down_proj far beyond what any other token reaches."""
    model = make_model("llama")
    name = "model.layers.1.mlp.down_proj"
    batches = [ids.masked_fill(ids == 9, 8) for ids in token_batches()]
    batches[1][0, 5] = 9

    def massive(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (x,) = args
        here = x.shape[:2] == batches[1].shape and torch.equal(current[0], batches[1])
        factor = torch.ones(x.shape[:2])
        factor[0, 5] = 1000.0 if here else 1.0
        return (x * factor[..., None],)

    current: list[torch.Tensor] = [batches[0]]
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: current.__setitem__(0, kwargs["input_ids"]), with_kwargs=True
    )
    handle = model.get_submodule(name).register_forward_pre_hook(massive)
    statistics = calibrate_model(model, batches, progress=False)
    handle.remove()
    config = SmoothQuantConfig(activation_scheme=scheme, rotation=rotation)
    smooth_and_quantize(model, statistics, config, progress=False)
    found = {
        n for n, layer in layers_of(model).items() if layer["activation_scheme"] == "per_token"
    }
    # Smoothed and rotated tokens of a tiny random model differ more.
    assert found == {name} or (
        rotation == "auto" and found == {name, "model.layers.0.mlp.down_proj"}
    )
    peak = layers_of(model)[name][
        "x_peak"
    ]  # of rotated inputs: the whole token is large, in all channels
    assert peak > 50 and (peak == statistics.peak(name)) == (rotation == "none")
    layer = model.get_submodule(name)
    assert layer.activation_scheme == "per_token" and layer.x_scale is None
    assert model.get_submodule("model.layers.1.mlp.up_proj").activation_scheme == scheme
