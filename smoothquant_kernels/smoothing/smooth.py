"""Smoothing a float model: calibrated factors are folded where a check proves that exact, else divided at run time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.calibration import ATTRIBUTE as KV_CALIBRATION
from smoothquant_kernels.kv_cache.calibration import calibration_of
from smoothquant_kernels.modeling.changes import Changes, widened
from smoothquant_kernels.modeling.float_layers import stays_in_float
from smoothquant_kernels.modeling.groups import Group, find_groups
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.record import (
    How,
    LayerRecord,
    ModelRecord,
    Reason,
    Verification,
    layers_within,
    skipped_layers,
)
from smoothquant_kernels.modeling.run import Batch, evaluating, output_tensor, run
from smoothquant_kernels.modeling.view import ModelView, check_present
from smoothquant_kernels.nn.float_linear import MAXIMA, is_float_linear, is_smoothed, weight_of
from smoothquant_kernels.nn.float_types import check_float_type
from smoothquant_kernels.nn.kinds import count_quantized
from smoothquant_kernels.nn.rounding import MOMENTS, Moments
from smoothquant_kernels.smoothing.calibrate import CalibrationData, calibrate_view
from smoothquant_kernels.smoothing.experts.convert import (
    are_smoothed,
    check_finite_experts,
    factors_of,
    smooth_experts,
)
from smoothquant_kernels.smoothing.factors import Plan, smoothable_linears
from smoothquant_kernels.smoothing.outliers import maxima_in
from smoothquant_kernels.smoothing.patterns import check_patterns
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

#: The tolerance in units of `rounding_noise`. Folding rounds the producer's parameters, the readers' weights and every
#: partial sum anew.
ROUNDINGS = 8


# --- the driver -------------------------------------------------------------------------------------------------------


def relative_difference(output: Tensor, before: Tensor) -> float:
    """The largest change over the largest finite value. Equal infinities and NaNs count as no change."""
    a, b = widened(output), widened(before)
    same = (a == b) | (a.isnan() & b.isnan())
    largest = b.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp_min(1e-30)
    return float(torch.where(same, 0.0, (a - b).abs()).max() / largest)


def smooth_lm(
    model: nn.Module,
    calibration_data: CalibrationData | ActivationStatistics,
    alpha: float | None = None,
    *,
    config: SmoothQuantConfig | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> nn.Module:
    """Smooths a float model in place: its function stays the same; outlier channels move from activations to weights.

    Args:
        model: a Hugging Face model, or any module whose forward takes the batches' entries by name.
        calibration_data: an iterable of token-id tensors [T] or [B, T], of dicts of tensors, or of strings; or the
            result of `calibrate_model` on this model or a copy of it.
        alpha: migration strength in [0, 1]; None takes the configuration's.
        config: all other settings; the default is the best measured configuration (docs/reference/accuracy.md).
        tokenizer: turns strings into token ids.
        progress: whether to show a progress bar.

    Returns:
        The model. `model.smoothquant_info` records how each linear was smoothed.

    Raises:
        SmoothQuantError: no linears, no data, NaN or Inf in weights or activations (the message names the layer), alpha
            outside [0, 1], or the model is smoothed already. After any exception, even an interrupt, the model
            computes the same bits as before.

    Memory: until the call returns, it also holds a copy of the weights that are folded by factors other than powers of
    two. By default, only float32 models have such factors.

    Equivalent to:
        for each group of linears that read one tensor x:
            s = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
            x, w = x / s, w * s

    Source: SmoothQuant (Xiao et al., 2022), sections 3.2 and 4.
    """
    config = config or SmoothQuantConfig()
    if alpha is not None:
        config = config.replace(alpha=alpha)
    with Changes() as changes:
        view = ModelView(model, config.float_pattern, config.quantize_head)
        smooth_into(view, calibration_data, config, changes, tokenizer=tokenizer, progress=progress)
    return model


def smooth_into(
    view: ModelView,
    calibration_data: CalibrationData | ActivationStatistics,
    config: SmoothQuantConfig,
    changes: Changes,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    sample: Batch | None = None,
    run_sample: Callable[[Batch], Any] | None = None,
) -> None:
    """Runs `smooth_lm` as a part of a larger change.

    Args:
        sample: the calibration sample with all that `run_sample` needs.
        run_sample: runs the model on `sample` or on a part of it. Both are needed if the model's own forward knows the
            layers' inputs for the whole sample only, or gives the layers other inputs than calibration saw.
    """
    model = view.model
    refuse_smoothed(model)
    check_patterns(model, config)
    linears, skipped = dict(view.linears), dict(view.skipped)
    check_finite_weights(linears)
    check_finite_experts(view.experts)
    if isinstance(calibration_data, ActivationStatistics):
        statistics = dataclasses.replace(
            calibration_data,
            absmax=dict(calibration_data.absmax),
            square_sums=dict(calibration_data.square_sums),
        )
    else:
        statistics = calibrate_view(
            view, calibration_data, config, tokenizer=tokenizer, progress=progress
        )
    of_experts = statistics
    statistics = dataclasses.replace(
        statistics, absmax={n: t for n, t in statistics.absmax.items() if n in linears}
    )
    small = statistics.sample
    found = stays_in_float(view, linears, small, part=run_sample is not None)
    linears = {name: linear for name, linear in linears.items() if name not in found}
    skipped |= found
    heads = [name for name in linears if name in view.int8_heads]
    if lacking := [name for name in heads if name not in statistics.watched]:
        raise SmoothQuantError(
            f"the statistics were collected without quantize_head=True, which needs the input of {lacking[0]}: "
            "calibrate with the same quantize_head."
        )
    # Statistics may come from a file or from another rank's device.
    for name in statistics.absmax.keys() & linears.keys():
        device = weight_of(linears[name]).device
        for tensors in (statistics.absmax, statistics.square_sums):
            if name in tensors:  # earlier releases' files have no squares
                tensors[name] = tensors[name].to(device)
    reached = statistics.absmax.keys() & linears.keys()
    if config.weight_rounding == "gptq" and not reached <= statistics.moments.keys():
        raise SmoothQuantError(
            "the statistics were collected without weight_rounding='gptq', which needs more of the calibration data: "
            "calibrate with the same weight_rounding."
        )
    smoothable = smoothable_linears(view, linears, statistics) if config.smooth else []
    groups = find_groups(
        view, smoothable, small, fold=config.folding != "never", narrower=not config.divides
    )
    if config.smooth:
        groups += [Group((n,), reason=Reason.HEAD()) for n in heads if n in statistics.absmax]
    plan = Plan(model, groups, statistics, config, heads)
    with evaluating(model):
        whole = (sample or small, run_sample or functools.partial(run, model))
        plan.search_for_w4(*whole)
        errors = plan.leave_out_what_does_not_gain(*whole)
        before = output_tensor(run(model, small)).clone()
        tolerance = config.verify_tolerance
        if tolerance is None:
            tolerance = ROUNDINGS * rounding_noise(model, plan.foldable(), small, before)

        def difference() -> float:
            return relative_difference(output_tensor(run(model, small)), before)

        outcomes = plan.apply(lambda: difference() <= tolerance, changes)
        change = difference()
    left = {n: why for n, (_, why) in outcomes.items() if Reason.of(why) is Reason.NOT_DIVIDED}
    if left and config.folding == "required":
        name, why = next(iter(left.items()))
        raise SmoothQuantError(
            f"{name} ({len(left)} of {len(linears)} layers) would stay unsmoothed, which folding='required' forbids: "
            f"{why}; pass folding='only', or name these layers in skip."
        )
    for name, linear in linears.items():
        if name in statistics.moments and plan.settings(name).rounding_of(name) == "gptq":
            moments = Moments(statistics.moments[name], plan.smooth.get(name))
            changes.set_attribute(linear, MOMENTS, moments)
        elif MOMENTS in linear.__dict__:  # of an earlier call that only measured
            changes.set_attribute(linear, MOMENTS, None)
        maxima = maxima_in(statistics, name, plan.smooth.get(name), plan.settings(name))
        if maxima is not None or MAXIMA in linear.__dict__:
            changes.set_attribute(linear, MAXIMA, maxima)
    if not change <= tolerance:
        raise SmoothQuantError(
            f"the model's output differs by {change:.1e} relative from one call to the next, more than "
            f"{tolerance:.1e}: smoothing can only be checked on a model that gives the same output twice."
        )
    experts = smooth_experts(view.experts, of_experts, config, changes)
    if calibration_of(model) is not None:  # of values that factors may have been folded into
        changes.set_attribute(model, KV_CALIBRATION, None)
    ModelRecord(
        config=config.to_dict(),
        layers=_describe(view, linears, groups, statistics, plan, outcomes | errors, config),
        skipped=skipped_layers(skipped),
        experts=experts,
        verification=Verification.of(change),
        calibration_tokens=statistics.tokens,
    ).attach(model, changes)


def refuse_smoothed(model: nn.Module) -> None:
    """Raises SmoothQuantError if any part of the model is smoothed or quantized.

    Smoothed weights already hold factors that the formula cannot see. Smoothing needs float layers.
    """
    if quantized := count_quantized(model):
        raise SmoothQuantError(
            f"the model is quantized already ({quantized}), and smoothing needs float layers: load the "
            "original float model again; to keep some layers in float, name them in skip."
        )
    layers = layers_within(model)
    smoothed, total = sum(layer.smoothing != "none" for layer in layers), len(layers)
    if not smoothed:  # the model may be a part of a smoothed one
        marks = [
            is_smoothed(m) or are_smoothed(m)
            for m in model.modules()
            if is_float_linear(m) or factors_of(m) is not None
        ]
        smoothed, total = sum(marks), len(marks)
    if smoothed:
        raise SmoothQuantError(
            f"the model is smoothed already ({smoothed} of {total} layers): load the original float model again "
            "to smooth it with other settings, or call quantize_model to go on with these."
        )


def rounding_noise(
    model: nn.Module, groups: Sequence[Group], batch: Batch, output: Tensor
) -> float:
    """How far the model's output moves if the inputs of the groups' linears are rounded once more.

    Even exact arithmetic, once rounded, can move the output that far. Each of two runs moves every element by one unit
    of its type's precision, up or down at random. The larger change counts.
    """
    found = [0.0]
    for seed in range(2 if groups else 0):
        generator = torch.Generator().manual_seed(seed)

        def jitter(x: Tensor, generator: torch.Generator = generator) -> Tensor:
            signs = torch.randint(0, 2, x.shape, generator=generator).to(x.device, x.dtype) * 2 - 1
            return x * (1 + torch.finfo(x.dtype).eps * signs)

        with Hooks(model) as hooks:
            for group in groups:
                for name in group.linears:
                    hooks.on_input(name, jitter)
            found.append(relative_difference(output_tensor(run(model, batch)), output))
    return max(found)


def check_finite_weights(linears: Mapping[str, nn.Module]) -> None:
    """Raises SmoothQuantError naming the first layer whose weight or bias holds NaN or Inf, or has no data."""
    for name, module in linears.items():
        check_present(module, name)
        if weight_of(module).dtype != torch.float64:  # float64 can be smoothed, not quantized
            check_float_type(weight_of(module).dtype, f"the weight of layer {name}")
        for what, parameter in module.named_parameters(recurse=False):
            if not bool(parameter.detach().isfinite().all()):
                raise SmoothQuantError(
                    f"the {what} of layer {name} has NaN or Inf values; repair or reload the checkpoint."
                )


def _describe(
    view: ModelView,
    linears: Mapping[str, nn.Module],
    groups: Sequence[Group],
    statistics: ActivationStatistics,
    plan: Plan,
    outcomes: Mapping[str, tuple[How, str]],
    config: SmoothQuantConfig,
) -> tuple[LayerRecord, ...]:
    """Returns one record per linear. Its `x_absmax`, the largest input seen as it is quantized, sets the scale."""
    layers = []
    group_of = {name: group for group in groups for name in group.linears}
    for name, module in linears.items():
        how: How = "none"
        if name in outcomes:
            how, why = outcomes[name]
        elif name not in view.int8_heads and (others := view.shared.get(f"{name}.weight")):
            why = Reason.WEIGHT_SHARED(others[0])
        elif name not in statistics.absmax:
            why = Reason.NEVER_CALLED()
        else:
            why = Reason.SMOOTHING_OFF()
        alpha: float | None = None
        members: tuple[str, ...] = (name,)
        if (group := group_of.get(name)) and how != "none":
            members = group.linears
            alpha = plan.alphas[name]
        n, k = weight_of(module).shape
        seen = name in statistics.absmax
        rotation = plan.rotations[name] if seen else config.rotation_of(k, name)
        layers.append(
            LayerRecord(
                name,
                smoothing=how,
                reason=why,
                alpha=alpha,
                group=members,
                norms=plan.norms.get(name) if alpha is not None else None,
                in_features=k,
                out_features=n,
                rotation=rotation,
                x_absmax=statistics.range_of(name, plan.smooth.get(name), rotation)
                if seen
                else None,
                x_peak=plan.peaks.get(name),
            )
        )
    return tuple(layers)
