"""Replacing the float linears of a model with quantized layers."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import Tensor, nn

from smoothquant_kernels.checkpoint.ties import keep_heads_apart
from smoothquant_kernels.checkpoint.transformers_hook import quantizers
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fusion.optimize import optimize_for_inference
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.float_layers import stays_in_float
from smoothquant_kernels.modeling.record import LayerRecord, ModelRecord, Reason, skipped_layers
from smoothquant_kernels.modeling.sample_inputs import runnable_batch
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.attached import move_attached
from smoothquant_kernels.nn.float_linear import is_smoothed, weight_of
from smoothquant_kernels.nn.float_types import check_float_types
from smoothquant_kernels.nn.rounding import moments_of
from smoothquant_kernels.smoothing.calibrate import CalibrationData
from smoothquant_kernels.smoothing.experts.convert import check_finite_experts, quantize_experts
from smoothquant_kernels.smoothing.int8_error import static_scale
from smoothquant_kernels.smoothing.outliers import check_maxima, maxima_of
from smoothquant_kernels.smoothing.patterns import check_patterns
from smoothquant_kernels.smoothing.smooth import check_finite_weights, smooth_into
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from smoothquant_kernels.storage.safetensors import align_tensors


def quantize_model(
    model: nn.Module,
    w_bit: int | None = None,
    a_bit: int | None = None,
    *,
    config: SmoothQuantConfig | None = None,
    optimize: bool = False,
) -> nn.Module:
    """Quantizes every linear of a model in place, smoothed before or not.

    Args:
        model: the result of `smooth_lm`; or any float model, which is then only rotated, without calibration.
        w_bit, a_bit: bits of weights (8, or 4 for W4A8) and activations (8). None takes those of the configuration.
        config: schemes and patterns to skip. The default is the configuration that the model was smoothed with, else
            the package's. The static scheme needs the ranges that `smooth_lm` measured (`smooth=False` only measures).
            ``"auto"`` rounds W4A8 layers to the nearest values if `smooth_lm` kept nothing for GPTQ, and warns if it
            was called without these layers' format.
        optimize: also call `optimize_for_inference`, as the last step.

    Returns:
        The model. Its output head stays in float unless the configuration has `quantize_head`.
        `model.smoothquant_info` lists every layer.

    Raises:
        SmoothQuantError: other bits, no linears, NaN or Inf in a weight (the message names the layer), no
            ranges for the static scheme, no moments for GPTQ, or the reasons of `optimize_for_inference`. After any
            exception the model is unchanged.

    Memory: the int8 layers and the float ones, which are freed once all int8 layers exist. Streaming needs less
    (docs/guides/streaming.md).

    Equivalent to:
        for name, linear in model.named_modules():
            model.set_submodule(name, W8A8Linear.from_linear(linear, activation_scheme=...))

    Source: SmoothQuant (Xiao et al., 2022), section 4 and table 2.
    """
    if config is None:
        config = SmoothQuantConfig.from_dict(ModelRecord.of(model).config)
    bits = {"w_bit": w_bit, "a_bit": a_bit}
    config = config.replace(**{name: n for name, n in bits.items() if n is not None})
    with Changes() as changes:
        _quantize_into(
            ModelView(model, config.float_pattern, config.quantize_head), config, changes
        )
        if optimize:
            optimize_for_inference(model)
    return model


def _quantize_into(view: ModelView, config: SmoothQuantConfig, changes: Changes) -> None:
    """Runs `quantize_model` as a part of a larger change. All layers are made before the first one is replaced."""
    model, record = view.model, ModelRecord.of(view.model)
    check_patterns(model, config)
    stay = {layer.name for layer in record.skipped if layer.found_by_running}
    linears = {name: linear for name, linear in view.linears.items() if name not in stay}
    skipped = dict(view.skipped)
    check_float_types(linears)
    check_finite_weights(linears)
    check_finite_experts(view.experts)
    described = record.described
    for name, linear in linears.items():
        if name not in described and is_smoothed(linear):
            raise SmoothQuantError(
                f"layer {name} was smoothed as a part of another model, which knows its settings and ranges: call "
                "quantize_model with the very model that smooth_lm was given."
            )
    if unknown := linears.keys() - described.keys():
        found = stays_in_float(view, [n for n in linears if n in unknown], runnable_batch(model))
        linears = {name: linear for name, linear in linears.items() if name not in found}
        skipped |= found
    layers = {
        name: described.get(name, LayerRecord(name, reason=Reason.NOT_SMOOTHED()))
        for name in linears
    }
    own = {n: config.for_head(n) if n in view.int8_heads else config for n in linears}
    schemes = {name: own[name].scheme_of(layer.x_peak, name) for name, layer in layers.items()}
    rotations = {n: config.rotation_of(weight_of(m).shape[1], n) for n, m in linears.items()}
    static = {name: layers[name].x_absmax for name in linears if schemes[name] == "static"}
    missing = [name for name, absmax in static.items() if absmax is None]
    if missing:
        raise SmoothQuantError(
            f"the static scheme needs a calibrated range for {missing[0]} ({len(missing)} of {len(linears)} layers "
            "have none): run smooth_lm on calibration data first (smooth=False only measures), or skip them."
        )
    for name in static:
        if layers[name].rotation != rotations[name]:
            raise SmoothQuantError(
                f"the range of {name} was measured with rotation {layers[name].rotation} and the configuration asks "
                f"for {rotations[name]}: pass the same `rotation` to smooth_lm and quantize_model."
            )
    reached = {name: layer.x_absmax is not None for name, layer in layers.items()}
    by_gptq = [n for n in linears if own[n].rounding_of(n) == "gptq"]
    lacking = [n for n in by_gptq if reached[n] and moments_of(linears[n]) is None]
    uncalibrated = record.calibration_tokens is None
    if config.weight_rounding == "gptq" and (lacking or uncalibrated):
        raise SmoothQuantError(
            "weight_rounding='gptq' needs what calibration keeps for it: run smooth_lm with the same "
            "weight_rounding first, or pass weight_rounding='nearest'."
        )
    if lacking:
        warnings.warn(
            f"calibration kept nothing for GPTQ of {lacking[0]} ({len(lacking)} of {len(by_gptq)} W4A8 layers), so "
            "these weights are rounded to the nearest values and lose accuracy: calibrate with the same w_bit and "
            "formats, or pass weight_rounding='nearest' if that is wanted.",
            stacklevel=3,
        )
    if lacking or (by_gptq and uncalibrated):  # "auto", all alike, and the record says so
        config = config.replace(weight_rounding="nearest")
        own = {name: c.replace(weight_rounding="nearest") for name, c in own.items()}
    check_maxima(linears, own, reached, schemes, rotations)
    made: dict[str, nn.Module] = {}
    # Layers quantized by an earlier call, which left other layers in float.
    earlier = [layer for name, layer in described.items() if _is_quantized(model, name)]
    for name, linear in linears.items():
        new = quantize_linear(
            name, linear, schemes[name], static.get(name), own[name], rotation=rotations[name]
        )
        made[name] = new
        move_attached(linear, new)
        layers[name] = dataclasses.replace(layers[name], **kinds.shown(new))
    before = {layer.name: layer.reason for layer in record.skipped if layer.name not in made}
    experts = {record.name: record for record in record.experts}
    for name, of_float in view.experts.items():
        made[name], experts[name] = quantize_experts(name, of_float, config)
    for name, new in made.items():
        changes.replace_module(model, name, new)
    for module, attribute, ties in keep_heads_apart(model):
        changes.set_attribute(module, attribute, ties)
    dataclasses.replace(
        record,
        config=config.to_dict(),
        layers=(*earlier, *layers.values()),
        skipped=skipped_layers(before | skipped),
        experts=tuple(experts.values()),
    ).attach(model, changes)
    for owner, attribute, value in quantizers(model):
        changes.set_attribute(owner, attribute, value)
    align_tensors(model)


def quantize_linear(
    name: str,
    linear: nn.Module,
    scheme: str,
    x_absmax: float | None,
    config: SmoothQuantConfig,
    *,
    rotation: int,
    smooth: Tensor | None = None,
) -> nn.Module:
    """Makes the quantized layer for the float layer `name`, of the kind that accepts it, and changes nothing else.

    Args:
        scheme: the layer's activation scheme.
        x_absmax: the calibrated range of the smoothed and rotated input, which only the static scheme needs.
        config: all other settings.
        rotation: the size of the groups of channels that the quantizer rotates; 0 for none.
        smooth: [K] factors to apply in addition to those that are pending at the layer (`pending_smooth`).

    Returns:
        The layer.

    Raises:
        SmoothQuantError: the kind refuses the weight or the factors.
    """
    columns = None
    if config.outliers_of(name) == "static":
        maxima = maxima_of(linear)
        if maxima is not None:
            columns = maxima.columns(config.outlier_threshold, smooth).to(weight_of(linear).device)
        if maxima is None or columns is None or not len(columns):  # an int8 layer like others
            layers = {**config.outlier_layers, name: "none"}
            columns, config = None, config.replace(outlier_layers=layers)
        elif scheme == "static":
            x_absmax = maxima.range_without(columns, rotation, smooth)
    x_scale = None
    if scheme == "static":
        assert x_absmax is not None
        if config.outliers_of(name) == "dynamic" and not rotation:
            x_absmax = min(x_absmax, config.outlier_threshold)  # no call leaves more to int8
        x_scale = static_scale(x_absmax, config.clip_of(name))
    found = moments_of(linear) if config.rounding_of(name) == "gptq" else None
    moments = None if found is None else found.quantized(rotation, smooth, columns)
    settings = kinds.Settings(
        scheme,
        config.weight_granularity,
        rotation,
        x_scale,
        smooth,
        moments,
        columns=columns,
        threshold=float(config.outlier_threshold),
    )
    made: nn.Module = kinds.choose(name, linear, config).from_linear(linear, settings)
    return made


def _is_quantized(model: nn.Module, name: str) -> bool:
    try:
        return kinds.is_quantized(model.get_submodule(name))
    except AttributeError:
        return False


def smooth_and_quantize(
    model: nn.Module,
    calibration_data: CalibrationData | ActivationStatistics,
    config: SmoothQuantConfig | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    optimize: bool = False,
) -> nn.Module:
    """Calibrates, smooths and quantizes a model in place, in one call.

    Args:
        model, calibration_data, tokenizer, progress: as in `smooth_lm`.
        config: all other settings; `SmoothQuantConfig()` by default.
        optimize: also call `optimize_for_inference`, as the last step.

    Returns:
        The quantized model, with `model.smoothquant_info`.

    Raises:
        SmoothQuantError: as in `smooth_lm` and `quantize_model`. After any exception the model is unchanged.

    Equivalent to:
        quantize_model(smooth_lm(model, calibration_data, config=config, tokenizer=tokenizer), config=config)

    Source: SmoothQuant (Xiao et al., 2022).
    """
    config = config or SmoothQuantConfig()
    view = ModelView(model, config.float_pattern, config.quantize_head)
    check_float_types(view.linears)  # fail before the slow smoothing
    with Changes() as changes:
        smooth_into(view, calibration_data, config, changes, tokenizer=tokenizer, progress=progress)
        _quantize_into(view, config, changes)
        if optimize:
            optimize_for_inference(model)
    return model
