"""Smoothing a float model: factors from calibration, folded where that is proved exact, else divided at run time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels._float_types import check_float_type
from smoothquant_kernels._readers import read_elsewhere
from smoothquant_kernels.calibrate import ActivationStatistics, CalibrationData, calibrate_model
from smoothquant_kernels.config import SmoothQuantConfig, first_match
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.fold import (
    Smoothing,
    divide_at_run_time,
    fold_verified,
    round_to_power_of_two,
)
from smoothquant_kernels.groups import Group, find_groups, runs_within
from smoothquant_kernels.linear import weight_of
from smoothquant_kernels.modules import (
    check_present,
    evaluating,
    output_tensor,
    partition_linears,
    run,
    shared_parameters,
)
from smoothquant_kernels.reference import smoothing_factors

_FOLDS_AT_ONCE = 16  # verified together; their parameters are kept until then,
_FOLD_BYTES = 1 << 26  # at most so many bytes of them, or those of one group
INFO = "smoothquant_info"


# --- factors ----------------------------------------------------------------------------------------------------------


def group_alpha(group: Group, peak: float, config: SmoothQuantConfig) -> float:
    """The migration strength of a group; raises SmoothQuantError if the configuration gives its linears several."""
    first, *others = group.linears
    alpha = config.alpha_of(peak, first)
    own = first_match(config.alphas, first)
    # without settings of their own they all take the default of the first one's scheme
    for other in others:
        if first_match(config.alphas, other) != own:
            raise SmoothQuantError(
                f"{first} and {other} read the same tensor, so they share their smoothing factors, but alpha is "
                f"{alpha} for the first and {config.alpha_of(peak, other)} for the second; give all of "
                f"{', '.join(group.linears)} the same."
            )
    return alpha


def weight_absmax(model: nn.Module, group: Group) -> Tensor:
    """[K] float32: the largest |w| of each input channel over all linears of the group."""
    columns = [
        weight_of(model.get_submodule(n)).detach().abs().amax(0).float() for n in group.linears
    ]
    return torch.stack(columns).amax(0)


def group_factors(
    x_absmax: Tensor, w_absmax: Tensor, alpha: float, dtype: torch.dtype, config: SmoothQuantConfig
) -> Tensor:
    """s [K] float32 of a group of linears whose weights have this dtype."""
    smooth = smoothing_factors(x_absmax, w_absmax, alpha)
    rounding = config.smooth_rounding
    if rounding == "auto":
        rounding = "none" if dtype == torch.float32 else "power_of_two"
    return round_to_power_of_two(smooth) if rounding == "power_of_two" else smooth


def smoothable_linears(
    model: nn.Module, linears: Iterable[str], statistics: ActivationStatistics
) -> list[str]:
    """Those that calibration has seen and whose weight is theirs alone."""
    shared = shared_parameters(model)
    return [n for n in linears if n in statistics.absmax and f"{n}.weight" not in shared]


# --- the driver -------------------------------------------------------------------------------------------------------


def relative_difference(output: Tensor, before: Tensor) -> float:
    return float(
        (output.float() - before.float()).abs().max() / before.float().abs().max().clamp_min(1e-30)
    )


def smooth_lm(
    model: nn.Module,
    calibration_data: CalibrationData | ActivationStatistics,
    alpha: float | None = None,
    *,
    config: SmoothQuantConfig | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> nn.Module:
    """Smooths a float model in place: the function stays, the activations' outlier channels move into the weights.

    Args:
        model: a Hugging Face model, or any module whose forward takes the batches' entries by name.
        calibration_data: an iterable of token-id tensors [T] or [B, T], of dicts of tensors, or of strings; or
            what `calibrate_model` measured on this model or a copy of it.
        alpha: migration strength in [0, 1]; None takes the configuration's.
        config: everything else; the default is the best measured one (docs/accuracy.md).
        tokenizer: turns strings into token ids.
        progress: show a progress bar.

    Returns:
        The model, with `model.smoothquant_info` saying what was done to each linear.

    Raises:
        SmoothQuantError: no linears, no data, NaN or Inf in weights or activations (the layer is named), alpha outside
            [0, 1], or the float model's output moved by more than `config.verify_tolerance`. The checks of data and
            weights come before the first change to the model.

    Equivalent to:
        for each group of linears that read one tensor x:
            s = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
            x, w = x / s, w * s

    Source: SmoothQuant (Xiao et al., 2022), sections 3.2 and 4.
    """
    config = config or SmoothQuantConfig()
    if alpha is not None:
        config = config.replace(alpha=alpha)
    linears, skipped = partition_linears(model, config.skip)
    check_finite_weights(linears)
    if isinstance(calibration_data, ActivationStatistics):
        statistics = dataclasses.replace(calibration_data, absmax=dict(calibration_data.absmax))
    else:
        statistics = calibrate_model(
            model, calibration_data, config, tokenizer=tokenizer, progress=progress
        )
    small = statistics.sample
    for name, reason in read_elsewhere(model, linears, small).items():
        del linears[name]
        skipped[name] = reason
    peaks = {name: statistics.peak(name) for name in statistics.absmax}
    # they may come from a file or from another rank's device
    for name in statistics.absmax.keys() & linears.keys():
        device = weight_of(linears[name]).device
        statistics.absmax[name] = statistics.absmax[name].to(device)
    shared = shared_parameters(model)
    smoothable = smoothable_linears(model, linears, statistics) if config.smooth else []
    groups = find_groups(model, smoothable, small, folding=config.folding)
    with evaluating(model):
        before = output_tensor(run(model, small)).clone()
        tolerance = max(config.verify_tolerance, _rounding(before.dtype))

        def difference() -> float:
            return relative_difference(output_tensor(run(model, small)), before)

        outcomes = _apply(
            model, groups, statistics, peaks, config, lambda: difference() <= tolerance
        )
        change = difference()
    if not change <= tolerance:
        raise SmoothQuantError(
            f"smoothing changed the model's output by {change:.1e} relative, more than "
            f"{config.verify_tolerance:.1e}; use smooth_rounding='power_of_two', or load the model in float32."
        )
    info = {
        "config": config.to_dict(),
        "layers": _describe(linears, groups, statistics, peaks, outcomes, shared, config),
        "skipped": [{"name": n, "reason": r} for n, r in skipped.items()],
        "verification": {"relative_change": change, "bit_exact": change == 0.0},
        "calibration_tokens": statistics.tokens,
    }
    setattr(model, INFO, info)
    return model


def _rounding(dtype: torch.dtype) -> float:
    """What rounding every product of a model in this type once more may cost; nothing to speak of in float32."""
    return 0.0 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps


def check_finite_weights(linears: Mapping[str, nn.Module]) -> None:
    """Raises SmoothQuantError naming the first layer whose weight or bias has NaN or Inf, or no data."""
    for name, module in linears.items():
        check_present(module, name)
        if weight_of(module).dtype != torch.float64:  # which can be smoothed, at least
            check_float_type(weight_of(module).dtype, f"the weight of layer {name}")
        for what, parameter in module.named_parameters(recurse=False):
            if not bool(parameter.isfinite().all()):
                raise SmoothQuantError(
                    f"the {what} of layer {name} has NaN or Inf values; repair or reload the checkpoint."
                )


def _apply(
    model: nn.Module,
    groups: Sequence[Group],
    statistics: ActivationStatistics,
    peaks: Mapping[str, float],
    config: SmoothQuantConfig,
    same_output: Callable[[], bool],
) -> dict[str, tuple[str, str]]:
    """Smooths all groups; returns name -> (``"folded"`` or ``"runtime"``, why) and divides `statistics` by s."""

    # All from the weights as they are now: a fold into the rows of v_proj or up_proj changes the weight that their own
    # group reads, and what is quantised should not depend on what could be folded, and in which order.
    planned: dict[Group, Tensor] = {}
    for group in groups:
        name = group.linears[0]
        planned[group] = group_factors(
            statistics.absmax[name],
            weight_absmax(model, group),
            group_alpha(group, peaks[name], config),
            weight_of(model.get_submodule(name)).dtype,
            config,
        )
    factors = planned.__getitem__

    result: dict[str, tuple[str, str]] = {}

    def note(smoothing: Smoothing, how: str, why: str) -> None:
        for name in smoothing.group.linears:
            result[name] = (how, why)
            statistics.absmax[name] = statistics.absmax[name] / smoothing.smooth

    foldable = [g for g in groups if g.producer is not None]

    def weight_bytes(group: Group) -> int:
        return sum(weight_of(model.get_submodule(n)).nbytes for n in group.linears)

    for part in runs_within(foldable, weight_bytes, _FOLD_BYTES, _FOLDS_AT_ONCE):
        done, refused = fold_verified(model, part, factors, same_output, config.verify_tolerance)
        for smoothing in done:
            note(smoothing, "folded", f"into {smoothing.group.producer}")
        for smoothing in refused:
            divide_at_run_time(model, smoothing)
            producer = smoothing.group.producer
            note(smoothing, "runtime", f"folding into {producer} would change the model")
    for group in groups:
        if group.producer is None:
            smoothing = Smoothing(group, factors(group))
            divide_at_run_time(model, smoothing)
            note(smoothing, "runtime", group.reason)
    return result


def _describe(
    linears: Mapping[str, nn.Module],
    groups: Sequence[Group],
    statistics: ActivationStatistics,
    peaks: Mapping[str, float],
    outcomes: Mapping[str, tuple[str, str]],
    shared: Mapping[str, list[str]],
    config: SmoothQuantConfig,
) -> list[dict[str, Any]]:
    """One JSON-able entry a linear; `x_absmax`, the largest smoothed input seen, becomes the static scale."""
    layers = []
    group_of = {name: group for group in groups for name in group.linears}
    for name, module in linears.items():
        if name in outcomes:
            how, why = outcomes[name]
        elif f"{name}.weight" in shared:
            how, why = "none", f"its weight is also {shared[f'{name}.weight'][0]}"
        elif name not in statistics.absmax:
            how, why = "none", "never called during calibration"
        else:
            how, why = "none", "smoothing is switched off"
        absmax = statistics.absmax.get(name)
        n, k = weight_of(module).shape
        layers.append(
            {
                "name": name,
                "smoothing": how,
                "reason": why,
                "alpha": None,
                "group": [name],
                "in_features": k,
                "out_features": n,
                "x_absmax": None if absmax is None else float(absmax.max()),
                "x_peak": peaks.get(name),
            }
        )
        if group := group_of.get(name):
            alpha = group_alpha(group, peaks[group.linears[0]], config)
            layers[-1] |= {"alpha": alpha, "group": list(group.linears)}
    return layers
