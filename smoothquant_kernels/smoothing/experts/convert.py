"""Replacing float experts with int8 layers, and the records of what was done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.record import ExpertsRecord, Reason
from smoothquant_kernels.modeling.view import check_present
from smoothquant_kernels.nn.experts.inputs import Input
from smoothquant_kernels.nn.experts.kind import quantized_experts
from smoothquant_kernels.nn.experts.source import FACTORS, FloatExperts
from smoothquant_kernels.nn.kinds import describe
from smoothquant_kernels.smoothing.experts.factors import ExpertFactors, Product, expert_factors
from smoothquant_kernels.smoothing.int8_error import static_scale
from smoothquant_kernels.smoothing.statistics import ActivationStatistics


def check_finite_experts(experts: Mapping[str, FloatExperts]) -> None:
    """Raises SmoothQuantError naming the first module with NaN or Inf in a weight or bias, or without data."""
    for name, found in experts.items():
        check_present(found.module, name)
        if (parameter := found.finite_problem()) is not None:
            raise SmoothQuantError(
                f"the {parameter} of {name} has NaN or Inf values; repair or reload the checkpoint."
            )


def smooth_experts(
    experts: Mapping[str, FloatExperts],
    statistics: ActivationStatistics,
    config: SmoothQuantConfig,
    changes: Changes,
) -> tuple[ExpertsRecord, ...]:
    """Leaves factors and ranges on float experts, which compute the same as before, and returns their records.

    Raises:
        SmoothQuantError: ``folding="required"``, and some would stay unsmoothed.
    """
    records = []
    for name, found in experts.items():
        factors = expert_factors(name, found, statistics, config)
        if config.folding == "required" and config.smooth:
            raise SmoothQuantError(
                f"{name} would stay unsmoothed, which folding='required' forbids: the factors of experts are divided "
                "at run time; pass folding='only', or name these layers in skip."
            )
        if factors is not None or FACTORS in found.module.__dict__:
            changes.set_attribute(found.module, FACTORS, factors)
        records.append(_record(name, found, factors, config))
    return tuple(records)


def factors_of(module: nn.Module) -> ExpertFactors | None:
    """What smoothing left on a module of experts."""
    found: ExpertFactors | None = module.__dict__.get(FACTORS)
    return found


def are_smoothed(module: nn.Module) -> bool:
    """Whether factors wait on a module of float experts."""
    found = factors_of(module)
    return found is not None and (found.first.smooth is not None or found.second.smooth is not None)


def quantize_experts(
    name: str, experts: FloatExperts, config: SmoothQuantConfig
) -> tuple[nn.Module, ExpertsRecord]:
    """The int8 layer for a module of experts, and its record. Changes nothing.

    Raises:
        SmoothQuantError: the static scheme lacks a range, or a weight cannot be quantized.
    """
    factors = factors_of(experts.module)
    products = (None, None) if factors is None else (factors.first, factors.second)
    first, second = (
        _input(name, product, k, config)
        for product, k in zip(products, (experts.hidden, experts.inner), strict=True)
    )
    try:
        made = quantized_experts(experts, first, second, config.weight_granularity)
    except SmoothQuantError as error:
        raise SmoothQuantError(f"{name}: {error}") from error
    return made, _record(name, experts, factors, config, describe(made))


def _input(name: str, product: Product | None, k: int, config: SmoothQuantConfig) -> Input:
    scheme = config.scheme_of(None if product is None else product.peak, name)
    rotation = config.rotation_of(k, name)
    if product is None:
        if scheme == "static":
            raise SmoothQuantError(
                f"the static scheme needs a calibrated range for the experts {name}: run smooth_lm on calibration data "
                "first (smooth=False only measures), or skip them."
            )
        return Input(scheme, rotation)
    if scheme == "static":
        if product.rotation not in (0, rotation):
            raise SmoothQuantError(
                f"the range of {name} was measured with rotation {product.rotation} and the configuration asks for "
                f"{rotation}: pass the same `rotation` to smooth_lm and quantize_model."
            )
        scale = static_scale(product.absmax, config.clip_of(name))
        return Input(scheme, product.rotation, product.smooth, scale)
    return Input(scheme, rotation, product.smooth)


def _record(
    name: str,
    experts: FloatExperts,
    factors: ExpertFactors | None,
    config: SmoothQuantConfig,
    made: Mapping[str, Any] | None = None,
) -> ExpertsRecord:
    alphas = () if factors is None else (factors.first.alpha, factors.second.alpha)
    smoothed = any(alpha is not None for alpha in alphas)
    if factors is None:
        reason = Reason.NEVER_CALLED() if config.smooth else Reason.SMOOTHING_OFF()
    elif smoothed:
        reason = Reason.EXPERTS()
    else:
        reason = Reason.NO_FACTORS() if config.smooth else Reason.SMOOTHING_OFF()
    return ExpertsRecord(
        name,
        smoothing="runtime" if smoothed else "none",
        reason=reason,
        alphas=tuple(alphas),
        num_experts=experts.count,
        hidden=experts.hidden,
        inner=experts.inner,
        weights=experts.count * experts.hidden * (experts.up_rows + experts.inner),
        unseen=experts.count if factors is None else factors.unseen,
        schemes=() if made is None else tuple(made["schemes"]),
        rotations=() if made is None else tuple(made["rotations"]),
    )
