"""`weight_rounding="auto"`: GPTQ for W4A8 layers, the nearest values for others, moments only where GPTQ needs them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    calibrate_model,
    make_report,
    quantize_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.modeling.record import ModelRecord
from smoothquant_kernels.nn.kinds import kind_of
from smoothquant_kernels.nn.rounding import MOMENTS
from smoothquant_kernels.report import figures
from smoothquant_kernels.search.plan_search import PlanSearch, search_plan
from tests.support.checkpoints import assert_same_state
from tests.support.models import make_model, token_batches

DATA = token_batches(6)
FOUR = SmoothQuantConfig(w_bit=4, calibration_tokens=288)
MIXED = SmoothQuantConfig(formats={"*.mlp.*": "w4a8"}, quantize_head=True, calibration_tokens=288)
WARNING = "calibration kept nothing for GPTQ of model.layers.0.self_attn.q_proj"


def made(config: SmoothQuantConfig, data: Any = DATA) -> nn.Module:
    return smooth_and_quantize(make_model("llama_gqa"), data, config, progress=False)


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    """The quantized layers whose integers differ."""
    found = set()
    for name, layer in one.named_modules():
        if kind_of(layer) is not None:
            mine, its = layer.state_dict(), other.get_submodule(name).state_dict()
            assert mine.keys() == its.keys()
            if any(not mine[k].equal(its[k]) for k in mine):
                found.add(name)
    return found


def of_mlp(model: nn.Module) -> set[str]:
    return {n for n, m in model.named_modules() if ".mlp." in n and kind_of(m) is not None}


def test_int8_keeps_no_moments_and_rounds_to_the_nearest() -> None:
    config = SmoothQuantConfig(quantize_head=True, calibration_tokens=288)
    assert calibrate_model(make_model("llama_gqa"), DATA, config, progress=False).moments == {}
    assert_same_state(made(config), made(config.replace(weight_rounding="nearest")))


def test_moments_are_those_of_the_layers_of_4_bits() -> None:
    """An int8 output head of a W4A8 model needs none, unless 4 bits are asked for by its name."""
    model = make_model("llama_gqa")
    for config, wanted in (
        (MIXED, lambda n: ".mlp." in n),
        (FOUR.replace(quantize_head=True), lambda n: n != "lm_head"),
        (FOUR.replace(quantize_head=True, formats={"lm_head": "w4a8"}), lambda n: True),
        (FOUR.replace(weight_rounding="nearest"), lambda n: False),
        (MIXED.replace(weight_rounding="gptq"), lambda n: True),
    ):
        statistics = calibrate_model(model, DATA, config, progress=False)
        assert set(statistics.moments) == set(filter(wanted, statistics.watched))
        smoothed = smooth_lm(copy.deepcopy(model), statistics, config=config, progress=False)
        kept = {n for n, m in smoothed.named_modules() if m.__dict__.get(MOMENTS) is not None}
        assert kept == set(statistics.moments)


def test_four_bits_are_rounded_by_gptq() -> None:
    auto, gptq, nearest = (
        made(FOUR.replace(weight_rounding=r)) for r in ("auto", "gptq", "nearest")
    )
    assert_same_state(auto, gptq)
    assert len(differing(auto, nearest)) == 14


def test_each_layer_of_a_mixed_model_takes_its_own_rounding() -> None:
    auto, gptq, nearest = (
        made(MIXED.replace(weight_rounding=r)) for r in ("auto", "gptq", "nearest")
    )
    four = of_mlp(auto)
    assert len(four) == 6
    assert differing(auto, nearest) == four
    others = differing(auto, gptq)
    assert others and others.isdisjoint(four)


def test_statistics_with_more_change_nothing() -> None:
    """Those of GPTQ for every layer; int8 layers do not look at them."""
    every = MIXED.replace(weight_rounding="gptq")
    statistics = calibrate_model(make_model("llama_gqa"), DATA, every, progress=False)
    assert_same_state(made(MIXED, statistics), made(MIXED))


# --- without moments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
def test_statistics_without_moments_warn_once_and_round_to_the_nearest(at_once: bool) -> None:
    plain = FOUR.replace(w_bit=8)
    statistics = calibrate_model(make_model("llama_gqa"), DATA, plain, progress=False)
    with pytest.warns(UserWarning, match=WARNING) as seen:
        if at_once:
            found = made(FOUR, statistics)
        else:  # the other way to the same: smoothed for 8 bits, quantized to 4
            found = make_model("llama_gqa")
            smooth_lm(found, statistics, config=FOUR, progress=False)
            quantize_model(found)
    assert len(seen) == 1 and "14 of 14 W4A8 layers" in str(seen[0].message)
    assert Path(seen[0].filename).name in ("test_auto_rounding.py", "convert.py")
    nearest = FOUR.replace(weight_rounding="nearest")
    assert_same_state(found, made(nearest, statistics))
    assert ModelRecord.of(found).config == nearest.to_dict()


def test_smoothing_for_8_bits_does_not_prepare_for_4() -> None:
    model = smooth_lm(make_model("llama_gqa"), DATA, config=FOUR.replace(w_bit=8), progress=False)
    with pytest.warns(UserWarning, match=WARNING):
        quantize_model(model, w_bit=4)
    assert ModelRecord.of(model).config["weight_rounding"] == "nearest"


@pytest.mark.filterwarnings("error")
def test_without_calibration_and_without_calls_the_nearest_need_no_warning() -> None:
    plain = quantize_model(make_model("llama_gqa"), w_bit=4)
    assert ModelRecord.of(plain).config["weight_rounding"] == "nearest"
    model: Any = make_model("llama_gqa")
    model.extra = nn.Linear(32, 32)  # as an expert that no token reached
    done = smooth_and_quantize(model, DATA, FOUR, progress=False)
    assert ModelRecord.of(done).config["weight_rounding"] == "auto"
    assert kind_of(done.get_submodule("extra")) is not None


# --- other users of the statistics ------------------------------------------------------------------------------------


def test_the_search_of_a_plan_tries_what_is_made() -> None:
    """The cost of 4 bits is that of GPTQ, and the cost of int8 that of the nearest values."""

    def search(rounding: str) -> PlanSearch:
        config = SmoothQuantConfig(weight_rounding=rounding, calibration_window=16)
        return search_plan(make_model("llama"), DATA, config, max_kl=1e9, progress=False)

    auto, gptq, nearest = map(search, ("auto", "gptq", "nearest"))
    assert list(auto.options) == list(gptq.options) == list(nearest.options)
    for group, tried in auto.options.items():
        four, eight, _ = (o.kl for o in tried)
        assert four == gptq.options[group][0].kl != nearest.options[group][0].kl
        assert eight == nearest.options[group][1].kl != gptq.options[group][1].kl
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="calibration kept")
        made(
            auto.config
        )  # the plan names the layers of 4 bits, so calibration keeps what they need


def test_the_report_measures_what_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "draw", lambda *a, **k: {})
    found = {}
    for rounding in ("auto", "gptq", "nearest"):
        config = MIXED.replace(weight_rounding=rounding, quantize_head=False)
        folder = tmp_path / rounding
        layers = make_report(make_model("llama_gqa"), DATA, folder, config, held=DATA)["layers"]
        found[rounding] = {layer["name"]: layer["sqnr"] for layer in layers}
    for name, sqnr in found["auto"].items():
        same = "gptq" if ".mlp." in name else "nearest"
        assert sqnr == found[same][name]
    assert found["auto"] != found["gptq"] and found["auto"] != found["nearest"]
