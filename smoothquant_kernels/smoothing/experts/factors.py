"""The factors and ranges of experts, from the statistics of calibration.

All experts read the same tensor, so they share the factors of the first product; a second product has a tensor of its
own and factors of its own. The quantizers divide by the first ones, whoever else reads the tensor: a router, shared
experts and the rest of the model keep every bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smoothquant_kernels import reference
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.nn.experts.source import FloatExperts
from smoothquant_kernels.nn.rounding import prepared_weight
from smoothquant_kernels.smoothing.experts.observe import first_name, second_name
from smoothquant_kernels.smoothing.factors import group_balance
from smoothquant_kernels.smoothing.fold import round_to_power_of_two
from smoothquant_kernels.smoothing.int8_error import Int8Error
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

#: How many of the experts decide whether factors help: those that read the most tokens.
_TRIED = 4


@dataclass(frozen=True)
class Product:
    """What calibration found for the input of one product.

    Attributes:
        smooth: [K], or [E, K] for second products; None for none.
        alpha: the migration strength of the factors.
        rotation: that under which the range was measured.
        absmax: the largest value, smoothed and rotated.
        peak: the largest token over the median one.
    """

    smooth: Tensor | None
    alpha: float | None
    rotation: int
    absmax: float
    peak: float


@dataclass(frozen=True)
class ExpertFactors:
    """What smoothing leaves on a module of float experts (`source.FACTORS`). Its function stays the same."""

    first: Product
    second: Product
    unseen: int  # experts that no token of the calibration reached


class _Balanced(NamedTuple):
    smooth: Tensor
    alpha: float


def expert_factors(
    name: str, experts: FloatExperts, statistics: ActivationStatistics, config: SmoothQuantConfig
) -> ExpertFactors | None:
    """The factors and ranges of one module of experts; None if calibration did not reach it."""
    if first_name(name) not in statistics.absmax:
        return None
    seen = [e for e in range(experts.count) if second_name(name, e) in statistics.absmax]
    first = _first(name, experts, statistics, config)
    second = _second(name, experts, seen, statistics, config)
    return ExpertFactors(first, second, experts.count - len(seen))


def _first(
    name: str, experts: FloatExperts, statistics: ActivationStatistics, config: SmoothQuantConfig
) -> Product:
    key, group = first_name(name), Group((name,))
    rotation = config.rotation_of(experts.hidden, name)
    made: _Balanced | None = None
    peak = statistics.peak(key, None, rotation)
    if config.smooth and config.divides:

        def balanced(peak: float | None) -> _Balanced:
            balance = group_balance(group, peak, config, rotated=rotation > 0)
            weights = _weight_norms(experts, balance.norms[1], range(experts.count), experts.up)
            x = statistics.norms(key, balance.norms[0]).to(weights.device)
            smooth = reference.smoothing_factors(x, weights, balance.alpha)
            return _Balanced(_rounded(smooth, experts, config), balance.alpha)

        # Whether there are massive activations decides on the factors, so the usual ones must do to see them.
        usual = balanced(None)
        peak = statistics.peak(key, _on(statistics.absmax[key], usual.smooth), rotation)
        made = balanced(peak)
        if config.only_where_better and not _helps(
            name, experts, statistics, made.smooth, rotation
        ):
            made = None
            peak = statistics.peak(key, None, rotation)
    smooth = None if made is None else made.smooth
    own = None if smooth is None else _on(statistics.absmax[key], smooth)
    absmax = statistics.range_of(key, own, rotation)
    return Product(smooth, made and made.alpha, rotation, absmax, peak)


def _second(
    name: str,
    experts: FloatExperts,
    seen: list[int],
    statistics: ActivationStatistics,
    config: SmoothQuantConfig,
) -> Product:
    key, group = second_name(name), Group((name,))
    if not seen:
        return Product(None, None, 0, 0.0, 1.0)
    rotation = config.rotation_of(experts.inner, name)
    peak = statistics.peak(key, None, rotation)
    if config.scheme_of(peak, name) == "static":
        rotation = 0  # the range of each expert's rotated values under its own factors is not known
    smooth, alpha = None, None
    # Elsewhere the factors go into the rows of up, which needs no division at run time.
    if config.smooth and (config.divides or experts.gate.is_linear):
        balance = group_balance(group, peak, config, rotated=rotation > 0)
        alpha = balance.alpha
        smooth = torch.ones(experts.count, experts.inner, device=experts.first.device)
        for e in seen:
            weights = _weight_norms(experts, balance.norms[1], [e], experts.down)
            x = statistics.norms(second_name(name, e), balance.norms[0]).to(weights.device)
            smooth[e] = _rounded(
                reference.smoothing_factors(x, weights, balance.alpha), experts, config
            )
    largest = 0.0
    for e in seen:
        absmax = statistics.absmax[second_name(name, e)]
        own = absmax if smooth is None else absmax / smooth[e].to(absmax.device)
        largest = max(largest, float(own.max()))
    return Product(smooth, alpha, rotation, largest, peak)


def _on(like: Tensor, smooth: Tensor) -> Tensor:
    return smooth.to(like.device)


def _rounded(smooth: Tensor, experts: FloatExperts, config: SmoothQuantConfig) -> Tensor:
    rounding = config.smooth_rounding
    if rounding == "auto":
        rounding = "none" if experts.first.dtype == torch.float32 else "power_of_two"
    return round_to_power_of_two(smooth) if rounding == "power_of_two" else smooth


def _weight_norms(
    experts: FloatExperts, norm: str, which: range | list[int], weight: Callable[[int], Tensor]
) -> Tensor:
    """[K] float32: the largest magnitude (``"max"``) or root mean square of each input channel over some experts."""
    if norm == "max":
        return torch.stack([weight(e).abs().amax(0).float() for e in which]).amax(0)
    # float64, because the squares of large float32 weights overflow float32.
    sums = [torch.linalg.vector_norm(weight(e), dim=0, dtype=torch.float64).square() for e in which]
    rows = len(which) * len(weight(which[0]))
    return (torch.stack(sums).sum(0) / rows).sqrt().float()


def _helps(
    name: str,
    experts: FloatExperts,
    statistics: ActivationStatistics,
    smooth: Tensor,
    rotation: int,
) -> bool:
    """Whether the first product of the busiest experts is nearer to float's with the factors, on tokens kept for it."""
    x = statistics.kept(first_name(name)).to(smooth.device).float()
    counts = [statistics.counts.get(second_name(name, e), 0) for e in range(experts.count)]
    busiest = sorted(range(experts.count), key=lambda e: -counts[e])[:_TRIED]
    errors = []
    for factors in (None, smooth):
        inverse = None if factors is None else 1.0 / factors
        x_q, x_scale = reference.quantize(x, inv_smooth=inverse, rotation=rotation)
        found = total = 0.0
        for e in busiest:
            w_q, w_scale = reference.quantize_weight(
                prepared_weight(experts.up(e), factors, rotation)
            )
            y = reference.gemm_s8(x_q, w_q, x_scale, w_scale, out_dtype=torch.float32)
            exact = x @ experts.up(e).float().t()
            found += float((y - exact).double().square().sum())
            total += float(exact.double().square().sum())
        errors.append(math.sqrt(found / max(total, 1e-300)))
    return Int8Error(*errors).helps
