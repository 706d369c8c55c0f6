"""Limits on the loss of a real model by quantization, on text that calibration did not use."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib.planted import llama_readers, plant_outliers
from smoothquant_kernels import (
    SmoothQuantConfig,
    calibrate_model,
    load_quantized,
    quantize_model,
    save_quantized,
    smooth_lm,
)
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.evaluation.text import token_windows, topics
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

pytestmark = pytest.mark.real_model
CALIBRATION_TOKENS = 2048
# Scored tokens. More would take too long here; docs/reference/accuracy.md has measurements on many more.
TOKENS = 1536


class Setting:
    """The float model, its calibration and its reference outputs, made once."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        windows = token_windows(
            topics("calibration"), tokenizer, window=512, max_tokens=CALIBRATION_TOKENS
        )
        self.statistics: ActivationStatistics = calibrate_model(
            model, [w.input_ids for w in windows], progress=False
        )
        self.reference = Reference(model)

    def quantized(self, scheme: str, **settings: Any) -> Any:
        config = SmoothQuantConfig(activation_scheme=scheme, **settings)
        smoothed = smooth_lm(copy.deepcopy(self.model), self.statistics, config=config)
        return quantize_model(smoothed)

    def increase(self, model: Any) -> float:
        """The relative increase of perplexity over the float model on the same tokens."""
        result = evaluate(
            model,
            topics("evaluation"),
            self.tokenizer,
            reference=self.reference,
            max_tokens=TOKENS,
        )
        assert result.delta_nll is not None
        return math.exp(result.delta_nll) - 1


@pytest.fixture(scope="module")
def setting(smollm2: tuple[Any, Any]) -> Setting:
    return Setting(*smollm2)


def test_smoothing_keeps_the_float_logits(setting: Setting) -> None:
    """A relative 1e-4 is guaranteed. Powers of two keep every bit."""
    ids = token_windows(topics("evaluation"), setting.tokenizer, window=256, max_tokens=256)
    with torch.no_grad():
        before = setting.model(input_ids=ids[0].input_ids).logits
        for rounding, limit in (("none", 1e-4), ("power_of_two", 0.0)):
            config = SmoothQuantConfig(smooth_rounding=rounding, only_where_better=False)
            model = smooth_lm(copy.deepcopy(setting.model), setting.statistics, config=config)
            after = model(input_ids=ids[0].input_ids).logits
            assert (after - before).abs().max() <= limit * before.abs().max()
            how = [layer["smoothing"] for layer in model.smoothquant_info["layers"]]
            assert how.count("folded") == 180 and how.count("runtime") == 30  # o_proj: GQA


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("scheme", "limit"), [("per_token", 0.015), ("static", 0.05), ("per_tensor", 0.05)]
)
def test_smoothed_schemes_stay_close_to_float32(
    setting: Setting, scheme: str, limit: float
) -> None:
    assert setting.increase(setting.quantized(scheme)) <= limit


@pytest.mark.in_turn
def test_massive_activations_ruin_naive_static_quantization(setting: Setting) -> None:
    """Without smoothing, one scale for a whole tensor about doubles the perplexity (docs/reference/accuracy.md)."""
    assert setting.increase(setting.quantized("static", smooth=False)) > 0.5


@pytest.mark.in_turn
def test_planted_outlier_channels(setting: Setting) -> None:
    """The paper's case: naive W8A8 increases perplexity by a third even per token, SmoothQuant by at most 2 %.

    3,071 tokens show a third (docs/reference/accuracy.md). The fewer tokens used here showed 32 %, so the limit is a
    quarter.
    """
    model = copy.deepcopy(setting.model)
    plant_outliers(model, llama_readers(model))
    planted = Setting(model, setting.tokenizer)
    planted.reference = setting.reference  # planting outliers does not change the function
    assert planted.increase(planted.quantized("per_token", smooth=False)) >= 1 / 4
    assert planted.increase(planted.quantized("per_token")) <= 0.02


def test_checkpoint_of_the_real_model(setting: Setting, tmp_path: Path) -> None:
    """The reloaded logits are equal bit for bit, and the linears take about a quarter of their float32 size."""
    model = setting.quantized("static")
    save_quantized(model, tmp_path / "q")
    again = load_quantized(tmp_path / "q")
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    files = sum(f.stat().st_size for f in (tmp_path / "q").glob("*.safetensors"))
    names = {layer["name"] for layer in model.smoothquant_info["layers"]}
    total = sum(p.numel() for p in setting.model.parameters())
    linears = sum(setting.model.get_submodule(n).weight.numel() for n in names)
    quantized = files - 4 * (total - linears)
    # 1 byte a weight, plus the float32 scales [N] and factors [K] of each layer: under 2 % for these sizes.
    assert 0.25 <= quantized / (4 * linears) <= 0.26
