"""Models with outlier columns: saved, loaded, streamed, inspected, exported or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoothquant_kernels import (
    ActivationStatistics,
    SmoothQuantConfig,
    calibrate_model,
    load_quantized,
    make_report,
    optimize_for_inference,
    quantize_model,
    quantize_streamed,
    register_transformers,
    save_quantized,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.checkpoint.compressed_tensors.export import exportable
from smoothquant_kernels.evaluation.models import load_model
from smoothquant_kernels.fusion.record import fusion_info
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from smoothquant_kernels.smoothing.smooth import relative_difference
from tests.smoothing.test_outliers import (
    BALANCED,
    BATCHES,
    SMOOTHED,
    STATIC,
    outlier_layers,
    quantized,
)
from tests.support.checkpoints import (
    WEIGHTS,
    assert_same_bits,
    assert_same_state,
    auto,
    logits,
    manifest_of,
    refusal,
    rewrite,
)
from tests.support.command_line import Result
from tests.support.models import layers_of, make_model

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data ended")


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *(("llama_gqa", scheme) for scheme in ACTIVATION_SCHEMES),
        ("gpt2", "static"),
        ("opt", "static"),
    ],
)
def test_a_saved_model_loads_with_the_same_bits(
    family: str, scheme: str, mode: str, tmp_path: Path
) -> None:
    model = quantized(family, activation_scheme=scheme, outliers=mode, outlier_threshold=BALANCED)
    assert outlier_layers(model)
    folder = save_quantized(model, tmp_path / "saved")
    loaded = load_quantized(folder)
    assert_same_state(loaded, model)
    assert_same_bits(logits(loaded), logits(model))
    assert loaded.smoothquant_info == model.smoothquant_info
    assert_same_bits(logits(copy.deepcopy(model)), logits(model))


def test_from_pretrained_and_other_types(tmp_path: Path) -> None:
    register_transformers()
    model = quantized(outlier_threshold=SMOOTHED)
    folder = save_quantized(model, tmp_path / "saved")
    for dtype in (torch.float32, torch.float16):
        loaded = auto(folder, dtype=dtype)
        wanted = copy.deepcopy(model).to(dtype)
        for name, layer in outlier_layers(loaded).items():
            other: Any = wanted.get_submodule(name)
            assert layer.w_columns.dtype == layer.dtype == dtype  # type: ignore[union-attr]
            assert_same_bits(layer.w_columns, other.w_columns)
            x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
            assert_same_bits(layer(x.to(dtype)), other(x.to(dtype)))
        if dtype == torch.float32:  # a cast of a model also rounds its rotary frequencies
            assert_same_bits(logits(loaded), logits(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_a_streamed_model_has_the_same_bits(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = tmp_path / "float"
    make_model("llama_gqa", dtype=dtype).save_pretrained(source)
    threshold = BALANCED if scheme == "static" else SMOOTHED
    settings = {**STATIC, "outlier_threshold": threshold, "activation_scheme": scheme}
    config = SmoothQuantConfig(**settings, verify_tolerance=0.1)
    streamed = quantize_streamed(source, tmp_path / "streamed", BATCHES, config, progress=False)
    model = load_model(source, dtype=dtype)
    smooth_and_quantize(model, BATCHES, config, progress=False)
    saved = save_quantized(model, tmp_path / "saved")
    assert manifest_of(streamed)["modules"] == manifest_of(saved)["modules"]
    loaded = load_quantized(streamed)
    assert len(outlier_layers(loaded)) > 3
    assert_same_bits(logits(loaded), logits(model))


def damaged(folder: Path, change: Any) -> str:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    rewrite(folder, lambda values: None)
    return refusal(lambda: load_quantized(folder))


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    model = quantized(smooth=False)
    name, layer = max(outlier_layers(model).items(), key=lambda item: len(item[1].columns))
    folder = save_quantized(model, tmp_path / "saved")
    key = f"{name}.columns"
    assert len(layer.columns) > 1  # type: ignore[arg-type]

    def first(value: int) -> Any:
        return lambda tensors: tensors[key].__setitem__(0, value)

    for value, said in ((32, "outside [0, 31]"), (31, "repeated or not in ascending")):
        text = damaged(folder, first(value))
        assert text.startswith(f"{key} has") and said in text
    (folder / WEIGHTS).unlink()
    save_quantized(model, folder, overwrite=True)
    rewrite(folder, lambda values: values["modules"][name].update(columns=33))
    assert f"the arguments of {name} are not understood" in refusal(lambda: load_quantized(folder))


def test_inspect_and_the_report_take_the_layers(tmp_path: Path) -> None:
    model = quantized(smooth=False)
    folder = save_quantized(model, tmp_path / "saved")
    seen = json.loads(Result("inspect", folder, "--json").out)
    counts = {la["name"]: la.get("columns") for la in seen["layers"]}
    for name, layer in outlier_layers(model).items():
        assert counts[name] == len(layer.columns)  # type: ignore[arg-type]
    total = sum(group.get("outlier_columns", 0) for group in seen["groups"])
    assert total == sum(count for count in counts.values() if count)
    assert {g.get("format") for g in seen["groups"]} == {None, "w8a8, static outliers"}
    pytest.importorskip("matplotlib")
    config = SmoothQuantConfig(**STATIC)
    document = make_report(
        make_model("llama_gqa"), BATCHES, tmp_path / "report", config, held=BATCHES[:1]
    )
    assert all(layer["sqnr"] > 15 for layer in document["layers"])


def test_fusion_leaves_the_layers_alone() -> None:
    """q, k and v share one quantization only where all are W8A8 layers."""
    model = quantized("llama", outlier_layers={"*.0.*": "none"}, smooth=False)
    names = set(outlier_layers(model))
    assert names and all(".1." in name for name in names)
    before = logits(model)
    optimize_for_inference(model)
    info = {layer.name: layer for layer in fusion_info(model)}
    for name in names:
        assert info[name].reason == "it is a OutlierLinear" and not info[name].merged
        assert "forward" not in vars(model.get_submodule(name))
    assert len(info["model.layers.0.self_attn.q_proj"].merged) == 3
    assert relative_difference(logits(model), before) < 0.1
    both = quantized(outliers="dynamic", outlier_layers={"*.down_proj": "none"})
    before = logits(both)
    optimize_for_inference(both)
    assert relative_difference(logits(both), before) < 0.1


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_static_outliers_need_a_calibration() -> None:
    config = SmoothQuantConfig(**STATIC)
    assert "outliers='static' needs the maxima" in refusal(
        lambda: quantize_model(make_model("llama_gqa"), config=config)
    )
    smoothed = smooth_lm(make_model("llama_gqa"), BATCHES, progress=False)
    text = refusal(lambda: quantize_model(smoothed, config=config))
    assert "run smooth_lm with the same `outliers`" in text
    assert not outlier_layers(smoothed)
    # Without calibration, calls can find their own.
    dynamic = quantize_model(make_model("llama_gqa"), config=config.replace(outliers="dynamic"))
    assert len(outlier_layers(dynamic)) == 14


def test_another_threshold_when_quantizing() -> None:
    counts = []
    for threshold in (2.5, 3.0):
        config = SmoothQuantConfig(**{**STATIC, "outlier_threshold": 9.0}, smooth=False)
        smoothed = smooth_lm(make_model("llama_gqa"), BATCHES, config=config, progress=False)
        model = quantize_model(smoothed, config=config.replace(outlier_threshold=threshold))
        wanted = quantized(outlier_threshold=threshold, smooth=False)
        assert_same_bits(logits(model), logits(wanted))
        counts.append(sum(la.get("outlier_columns", 0) for la in layers_of(model).values()))
    assert counts[0] > counts[1] > 0


def test_a_static_rotated_range_needs_kept_tokens(tmp_path: Path) -> None:
    config = SmoothQuantConfig(**{**STATIC, "outlier_threshold": SMOOTHED})
    smoothed = smooth_lm(make_model("llama_gqa"), BATCHES, config=config, progress=False)
    static = config.replace(activation_scheme="static")
    text = refusal(lambda: quantize_model(smoothed, config=static))
    assert "comes from tokens that calibration keeps" in text
    statistics = calibrate_model(make_model("llama_gqa"), BATCHES, static, progress=False)
    read = ActivationStatistics.load(statistics.save(tmp_path / "statistics"))
    models = [
        smooth_and_quantize(make_model("llama_gqa"), data, static, progress=False)
        for data in (BATCHES, read)
    ]
    assert_same_bits(*map(logits, models))


def test_other_formats_are_refused(tmp_path: Path) -> None:
    model = quantized(folding="only", rotation="none", smooth=False)
    name = next(iter(outlier_layers(model)))
    text = refusal(lambda: save_quantized(model, tmp_path / "other", format="compressed-tensors"))
    assert "are of another kind" in text and name in text and "outlier columns" in text
    assert not (tmp_path / "other").exists()
    config = SmoothQuantConfig(rotation="none", folding="only")
    for settings, said in (
        ({"outliers": "dynamic"}, "ask for dynamic ones: pass outliers='none'"),
        ({"outlier_layers": {"*.q_proj": "static"}}, "ask for static ones for *.q_proj"),
    ):
        assert said in refusal(lambda s=settings: exportable(config.replace(**s)))
    exportable(config.replace(outlier_layers={"*.q_proj": "none"}))
