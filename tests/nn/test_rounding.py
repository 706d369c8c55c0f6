"""Rounding weights in parts, and GPTQ: the values of its definition, and less error on inputs like its calibration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import (
    SmoothQuantConfig,
    calibrate_model,
    quantize_model,
    reference,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn import float_linear
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.nn.rounding import DAMPING, MOMENTS, Moments, int8_weight, round_weight
from smoothquant_kernels.report import figures
from smoothquant_kernels.report.report import make_report
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from tests.support.checkpoints import assert_same_state, refusal
from tests.support.compare import assert_bitwise_equal
from tests.support.models import logits, make_model, token_batches

GPTQ = SmoothQuantConfig(weight_rounding="gptq", calibration_tokens=288)
DATA = token_batches(6)


def correlated(tokens: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k)
    return torch.randn(tokens, k, generator=generator) @ mix


def by_definition(w: Tensor, moments: Tensor, granularity: str, damping: float) -> Tensor:
    """Column by column in float64, with the inverse of what is left of the moments, as `Equivalent to:` says."""
    w = w.double().clone()
    scale = reference.quantize_weight(w.float(), granularity)[1]
    h = moments.double() + damping * moments.diagonal().double().mean() * torch.eye(len(moments))
    columns = []
    for i in range(len(h)):
        inverse = torch.linalg.inv(h[i:, i:])
        # In float32 as the implementation: ties and values beside them would round otherwise.
        q = (w[:, i].float() * reference.inverse_scale(scale)).round().clamp(-127, 127).double()
        error = w[:, i] - q * scale.double()
        w[:, i + 1 :] -= error[:, None] * inverse[0, 1:] / inverse[0, 0]
        columns.append(q.to(torch.int8))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (17, 24), (5, 130), (8, 257)])
def test_values_are_those_of_the_definition(n: int, k: int, granularity: str) -> None:
    """Also across the border of a block of columns. float32 may round a value beside a tie to its neighbor."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    x = correlated(4 * k, k)
    w_q, w_scale = round_weight(w, x.t() @ x, granularity)
    assert_bitwise_equal(w_scale, reference.quantize_weight(w, granularity)[1])
    difference = (w_q.int() - by_definition(w, x.t() @ x, granularity, DAMPING).int()).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= max(1, 1e-3 * n * k)


def test_independent_channels_round_to_the_nearest() -> None:
    w = torch.randn(9, 140)
    moments = torch.diag(torch.rand(140) + 0.1)
    for granularity in ("channel", "tensor"):
        expected = reference.quantize_weight(w, granularity)
        for got, wanted in zip(round_weight(w, moments, granularity), expected, strict=True):
            assert_bitwise_equal(got, wanted)


def test_errors_cancel_on_inputs_like_those_seen() -> None:
    """On unseen inputs, too, and least where channels correlate most."""
    k = 192
    few = torch.randn(1000, 40, generator=torch.Generator().manual_seed(2))  # most of what varies
    x = correlated(1000, k) / 4 + few @ torch.randn(40, k)
    seen, unseen = x[:600], x[600:]
    w = torch.randn(64, k)

    def error(made: tuple[Tensor, Tensor]) -> float:
        w_q, scale = made
        return float((unseen @ (w_q.float() * scale[:, None] - w).t()).norm())

    assert error(round_weight(w, seen.t() @ seen)) < 0.8 * error(reference.quantize_weight(w))


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_fewer_tokens_than_channels(tokens: int) -> None:
    """Such moments are singular; without any, or of zeros only, the values are the nearest."""
    w, x = torch.randn(6, 40), correlated(7, 40)[:tokens]
    w_q, scale = round_weight(w, x.t() @ x)
    nearest, _ = reference.quantize_weight(w)
    assert int(w_q.min()) >= -127
    if tokens:
        errors = [float((x @ (q.float() * scale[:, None] - w).t()).norm()) for q in (w_q, nearest)]
        assert errors[0] < errors[1]
    else:
        assert torch.equal(w_q, nearest)


@pytest.mark.parametrize("rotation", [0, 8])
def test_moments_of_the_quantized_input(rotation: int) -> None:
    """Those of the raw input, smoothed and rotated as the quantizer does."""
    x, s, more = torch.randn(50, 24), torch.rand(24) + 0.5, torch.rand(24) + 0.5
    got = Moments(x.t() @ x, s).quantized(rotation, more)
    z = reference.rotate(x / s / more, rotation).double()
    expected = z.t() @ z
    # float32 sums of 50 products and of the rotation's additions, relative to the diagonal.
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * float(expected.max()))
    alone = Moments(x.t() @ x).quantized(0)
    assert_bitwise_equal(alone, x.t() @ x)


def test_layers_take_moments() -> None:
    linear = torch.nn.Linear(24, 10)
    s = torch.rand(24) + 0.5
    x = correlated(60, 24)
    z = reference.rotate(x / s, 8)
    layer = W8A8Linear.from_linear(linear, smooth=s, rotation=8, moments=z.t() @ z)
    w = reference.rotate_weight(linear.weight.detach() * s, 8)
    w_q, w_scale = round_weight(w, z.t() @ z)
    assert_bitwise_equal(layer.w_q, w_q)
    assert_bitwise_equal(layer.w_scale, w_scale)
    for wrong in (torch.eye(23), torch.full((24, 24), torch.nan)):
        said = refusal(lambda wrong=wrong: W8A8Linear.from_linear(linear, moments=wrong))
        assert "moments must be finite and of shape [24, 24]; got [" in said


# --- the driver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ["auto", "none"])
@pytest.mark.parametrize("folding", ["auto", "never"])
def test_the_driver_rounds_on_the_inputs_that_it_quantizes(rotation: str, folding: str) -> None:
    """Every layer's int8 weight is that of the moments of its own smoothed and rotated input."""
    config = GPTQ.replace(rotation=rotation, folding=folding)
    model = make_model("llama_gqa")
    smoothed = smooth_lm(copy.deepcopy(model), DATA, config=config, progress=False)
    done = quantize_model(copy.deepcopy(smoothed))
    nearest = quantize_model(
        copy.deepcopy(smoothed), config=config.replace(weight_rounding="nearest")
    )
    other = 0
    for name, linear in ModelView(smoothed).linears.items():
        found: Moments = linear.__dict__[MOMENTS]
        layer: Any = done.get_submodule(name)
        expected = W8A8Linear.from_linear(
            linear, rotation=layer.rotation, moments=found.quantized(layer.rotation)
        )
        assert_bitwise_equal(layer.w_q, expected.w_q, name)
        assert MOMENTS not in layer.__dict__
        other += not torch.equal(layer.w_q, nearest.get_submodule(name).w_q)
    assert other == len(ModelView(smoothed).linears)
    name = "model.layers.1.mlp.down_proj"
    inputs: list[Tensor] = []
    with Hooks(smoothed) as hooks, torch.no_grad():
        hooks.on_input(name, lambda x: inputs.append(x.flatten(0, -2)))
        for ids in DATA:
            smoothed(input_ids=ids)
    x, linear, layer = torch.cat(inputs), smoothed.get_submodule(name), done.get_submodule(name)
    pending = pending_smooth(linear)
    z = reference.rotate(x if pending is None else x / pending, layer.rotation)
    got = linear.__dict__[MOMENTS].quantized(layer.rotation)
    # Folding rounds the input once more, and float32 adds the products of 288 tokens in another order.
    torch.testing.assert_close(got, z.t() @ z, rtol=0, atol=1e-5 * float(got.diagonal().max()))


def test_gptq_lowers_the_error_on_text_like_the_calibrations() -> None:
    model = make_model("llama")
    exact = logits(model, DATA[0])
    errors = []
    for rounding in ("nearest", "gptq"):
        config = SmoothQuantConfig(weight_rounding=rounding)
        made = smooth_and_quantize(copy.deepcopy(model), DATA, config, progress=False)
        errors.append(float((logits(made, DATA[0]) - exact).norm()))
    assert errors[1] < errors[0]


def test_the_report_rounds_weights_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ helps on the calibration's own tokens; the naive layers are rounded to the nearest values in both."""
    monkeypatch.setattr(figures, "draw", lambda *a, **k: {})  # they take most of the time
    model, found = make_model("llama"), []
    for rounding in ("nearest", "gptq"):
        config = SmoothQuantConfig(weight_rounding=rounding)
        found.append(make_report(model, DATA, tmp_path / rounding, config, held=DATA)["layers"])
    nearest, gptq = found
    assert [la["sqnr_naive"] for la in nearest] == [la["sqnr_naive"] for la in gptq]
    gains = [b["sqnr"] - a["sqnr"] for a, b in zip(nearest, gptq, strict=True)]
    assert sum(gains) > 0 and all(gain != 0 for gain in gains)


def test_saved_and_merged_statistics_round_alike(tmp_path: Any) -> None:
    model = make_model("llama")
    whole = calibrate_model(model, DATA, GPTQ, progress=False)
    loaded = ActivationStatistics.load(whole.save(tmp_path / "statistics"))
    made = [
        quantize_model(smooth_lm(copy.deepcopy(model), s, config=GPTQ, progress=False))
        for s in (whole, loaded)
    ]
    assert_same_state(*made)
    parts = [calibrate_model(model, d, GPTQ, progress=False) for d in (DATA[:2], DATA[2:])]
    before = {n: m.clone() for n, m in parts[0].moments.items()}
    first = copy.deepcopy(parts[0])
    first.merge(parts[1])
    for name, moments in before.items():
        assert_bitwise_equal(first.moments[name], moments + parts[1].moments[name], name)


def test_what_gptq_needs_is_said() -> None:
    model = make_model("llama")
    plain = calibrate_model(model, DATA[:1], progress=False)
    said = refusal(lambda: smooth_lm(model, plain, config=GPTQ, progress=False))
    assert "without weight_rounding='gptq'" in said and "calibrate with the same" in said
    said = refusal(lambda: quantize_model(make_model("llama"), config=GPTQ))
    assert "run smooth_lm with the same weight_rounding" in said


def test_a_layer_never_called_rounds_to_the_nearest() -> None:
    """As an expert does that no token reached."""
    model = make_model("llama")
    name = "model.layers.1.mlp.down_proj"
    statistics = calibrate_model(model, DATA, GPTQ, progress=False)
    for part in (statistics.absmax, statistics.moments):
        del part[name]  # type: ignore[attr-defined]
    made = quantize_model(smooth_lm(copy.deepcopy(model), statistics, config=GPTQ, progress=False))
    layer: Any = made.get_submodule(name)
    expected = W8A8Linear.from_linear(model.get_submodule(name), rotation=layer.rotation)
    assert_bitwise_equal(layer.w_q, expected.w_q)


# --- guards -----------------------------------------------------------------------------------------------------------


def test_autocast_and_the_default_dtype_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    plain = calibrate_model(model, DATA, GPTQ, progress=False)
    expected = quantize_model(smooth_lm(copy.deepcopy(model), plain, config=GPTQ, progress=False))
    made = smooth_lm(copy.deepcopy(model), plain, config=GPTQ, progress=False)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            quantize_model(made)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(made, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = calibrate_model(model, DATA[:1], GPTQ, progress=False)
    assert {m.dtype for m in cast.moments.values()} == {torch.float32}


def test_smoothing_again_forgets_what_an_earlier_call_kept() -> None:
    """A model that was only measured may be smoothed; its earlier moments do not fit the new factors."""
    model = make_model("llama")
    smooth_lm(model, DATA, config=GPTQ.replace(smooth=False), progress=False)
    smooth_lm(model, DATA, config=GPTQ.replace(weight_rounding="nearest"), progress=False)
    assert "run smooth_lm with the same" in refusal(lambda: quantize_model(model, config=GPTQ))


def test_layers_never_called_may_be_quantized_alone() -> None:
    """The others were quantized by an earlier call."""
    model: Any = make_model("llama")
    model.extra = torch.nn.Linear(32, 32)
    smooth_lm(model, DATA, config=GPTQ, progress=False)
    quantize_model(model, config=GPTQ.replace(skip=("extra",)))
    quantize_model(model, config=GPTQ)
    assert isinstance(model.extra, W8A8Linear)


def test_products_that_overflow_name_the_layer() -> None:
    model: Any = make_model("llama")
    with torch.no_grad():
        block = model.model.layers[0]
        block.input_layernorm.weight *= 1e19
        for name in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(name).weight *= 1e-19
    said = refusal(lambda: calibrate_model(model, DATA, GPTQ, progress=False))
    assert "layer model.layers.0.self_attn.q_proj" in said and "overflow float32" in said


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_large_weight_is_rounded_in_parts_to_the_same_bits(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 32, generator=generator).bfloat16()
    smooth = torch.rand(32, generator=generator) + 0.5
    whole = int8_weight(weight, smooth, 16, granularity)
    monkeypatch.setattr(float_linear, "_PART", 32 * 7)
    assert len(float_linear.in_parts(weight)) == 8
    parts = int8_weight(weight, smooth, 16, granularity)
    expected = reference.quantize_weight(
        reference.rotate_weight(weight.float() * smooth, 16), granularity
    )
    for found in (whole, parts):
        assert all(map(torch.equal, found, expected))
