"""What quantization may cost a real model, on text that calibration never saw."""

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
TOKENS = (
    1536  # scored; few, for the time it takes: docs/accuracy.md has the measurements on many more
)


class Setting:
    """The float model, its calibration and its answers, made once."""

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

    def rise(self, model: Any) -> float:
        """Relative rise of perplexity over the float model's, on the same tokens."""
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
    """1e-4 relative is what is promised; powers of two keep every bit."""
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


@pytest.mark.parametrize(
    ("scheme", "limit"), [("per_token", 0.015), ("static", 0.05), ("per_tensor", 0.05)]
)
def test_smoothed_schemes_stay_close_to_float32(
    setting: Setting, scheme: str, limit: float
) -> None:
    assert setting.rise(setting.quantized(scheme)) <= limit


def test_naive_static_is_ruined_by_massive_activations(setting: Setting) -> None:
    """What smoothing is for: without it one scale for the tensor about doubles the perplexity (docs/accuracy.md)."""
    assert setting.rise(setting.quantized("static", smooth=False)) > 0.5


def test_planted_outlier_channels(setting: Setting) -> None:
    """The paper's own situation: naive W8A8 rises by a third even per token, SmoothQuant stays within 2 %.

    A third is what 3,071 tokens show (docs/accuracy.md); on the fewer ones read here it was 32 %, hence a quarter.
    """
    model = copy.deepcopy(setting.model)
    plant_outliers(model, llama_readers(model))
    planted = Setting(model, setting.tokenizer)
    planted.reference = setting.reference  # the function did not change
    assert planted.rise(planted.quantized("per_token", smooth=False)) >= 1 / 4
    assert planted.rise(planted.quantized("per_token")) <= 0.02


def test_checkpoint_of_the_real_model(setting: Setting, tmp_path: Path) -> None:
    """Reloaded logits are the same bits; the linears take about a quarter of float32."""
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
    # 1 byte a weight, and float32 scales [N] and factors [K] of each layer: under 2 % for these sizes
    assert 0.25 <= quantized / (4 * linears) <= 0.26
