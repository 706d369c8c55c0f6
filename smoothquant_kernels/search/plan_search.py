"""Choosing the format of each layer under a budget of bytes or of error."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.batches import PositionCounter
from smoothquant_kernels.modeling.record import ModelRecord
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.nn.kinds import choose
from smoothquant_kernels.plan import apply_plan
from smoothquant_kernels.search.costs import layer_costs
from smoothquant_kernels.search.held import hold_back
from smoothquant_kernels.smoothing.calibrate import (
    CalibrationData,
    collect_statistics,
    configured_batches,
)
from smoothquant_kernels.smoothing.patterns import check_patterns
from smoothquant_kernels.smoothing.smooth import check_finite_weights, smooth_lm
from smoothquant_kernels.smoothing.statistics import warn_if_short

#: What a group of layers may become, as entries of a plan.
CANDIDATES: tuple[Mapping[str, Any], ...] = (
    {"format": "w4a8"},
    {"format": "w8a8"},
    {"format": "float"},
)


@dataclass(frozen=True)
class Option:
    """What one group of layers costs as one candidate.

    Attributes:
        entry: the candidate, an entry of a plan.
        nbytes: of the weights of the group's layers.
        kl: the estimated KL divergence that it causes at the model's output, in nats per prediction.
    """

    entry: Mapping[str, Any]
    nbytes: int
    kl: float


@dataclass(frozen=True)
class PlanSearch:
    """The result of `search_plan`.

    Attributes:
        plan: layer -> entry, for every layer of the groups; `apply_plan` and JSON take it.
        config: the configuration with the plan applied, for `smooth_and_quantize`.
        nbytes: of the weights of all layers in the plan.
        kl: the sum of the estimated costs. They about add up (docs/guides/search.md).
        options: the layers of each group -> all its candidates.
    """

    plan: dict[str, dict[str, Any]]
    config: SmoothQuantConfig
    nbytes: int
    kl: float
    options: dict[tuple[str, ...], tuple[Option, ...]]


def search_plan(
    model: nn.Module,
    data: CalibrationData,
    config: SmoothQuantConfig | None = None,
    *,
    max_bytes: int | None = None,
    max_kl: float | None = None,
    candidates: Sequence[Mapping[str, Any]] = CANDIDATES,
    tokenizer: Any = None,
    tokens: int = 1024,
    progress: bool = True,
) -> PlanSearch:
    """Finds the format of every group of layers: the least error within a budget of bytes, or the fewest bytes.

    Each candidate runs with the arithmetic of its quantized layer on activations that did not set the ranges. Its cost
    is the KL divergence that its error causes at the model's output, estimated from gradients, as in `search_config`.

    Args:
        model: a float model; left unchanged. Each candidate smooths a copy of it.
        data, tokenizer: as for `calibrate_model`. The last batches are held back to measure on.
        config: all other settings. Its `formats` and `outlier_layers` do not count.
        max_bytes: the most bytes that the weights of the layers may take.
        max_kl: the largest sum of the estimated KL divergences, in nats per prediction. Give one of the two.
        candidates: what layers may become, as entries of a plan (`apply_plan`).
        tokens: how many tokens to hold back, at most a quarter of the batches.
        progress: whether to show progress bars.

    Memory: as `weight_rounding` says; where W4A8 is a candidate, GPTQ keeps [K, K] float32 of every layer.

    Returns:
        A `PlanSearch`. The same model, data and settings give the same result.

    Raises:
        SmoothQuantError: as for `calibrate_model`; not exactly one budget, too few data, a wrong candidate, or a budget
            that no choice of candidates keeps (the message says what the nearest one takes).

    Equivalent to:
        argmin over candidates c of sum(kl[layer][c[layer]]) where sum(nbytes[layer][c[layer]]) <= max_bytes,
        along the lower convex hull of each group's candidates

    Source: Lagrangian bit allocation (Shoham & Gersho, 1988); errors weighted by the diagonal of the Fisher information
    as in HAWQ-V2 (Dong et al., 2020).
    """
    config = (config or SmoothQuantConfig()).replace(formats={}, outlier_layers={})
    budgets = [b for b in (max_bytes, max_kl) if b is not None]
    if len(budgets) != 1 or not budgets[0] >= 0 or tokens < 1 or not candidates:
        raise SmoothQuantError(
            "give one of max_bytes and max_kl, not below 0, tokens >= 1 and at least one candidate; "
            f"got max_bytes={max_bytes}, max_kl={max_kl}, tokens={tokens} and {len(candidates)} candidates."
        )
    settings = [apply_plan(config, {"*": entry}) for entry in candidates]
    check_patterns(model, config)
    view = ModelView(model, config.float_pattern, config.quantize_head)
    check_finite_weights(view.linears)
    batches = list(configured_batches(model, data, config, tokenizer))
    warn_if_short(sum(map(PositionCounter(model), batches)), config.calibration_tokens)
    seen, (held,) = hold_back(model, batches, tokens)
    # What GPTQ needs, of all layers: each is tried as a W4A8 layer.
    four = any(own.format_of("") == "w4a8" for own in settings)
    kept = config.replace(formats={"*": "w4a8"}) if four else config
    statistics = collect_statistics(
        model, view.linears, seen, config=kept, heads=view.int8_heads, progress=progress
    )
    measured: list[tuple[Mapping[str, Any], dict[str, tuple[int, float]]]] = []
    groups: list[tuple[str, ...]] = []
    for entry, own in zip(candidates, settings, strict=True):
        if own.format_of("") == "float":
            continue
        smoothed = smooth_lm(copy.deepcopy(model), statistics, config=own, progress=False)
        costs = layer_costs(smoothed, statistics, held, own)
        layers = [layer for layer in ModelRecord.of(smoothed).layers if layer.group]
        # The settings of an int8 head are its own.
        groups += [la.group for la in layers if view.int8_heads.isdisjoint(la.group)]
        found = {}
        for name in (layer.name for layer in layers):
            kl = costs[name].kl if name in costs else 0.0
            found[name] = (_bytes(name, smoothed.get_submodule(name), own), kl)
        measured.append((entry, found))
    # A candidate that leaves a group unsmoothed has its layers apart. Each layer must be in one group only.
    options: dict[tuple[str, ...], list[Option]] = {
        group: [
            Option(entry, sum(of[n][0] for n in group), sum(of[n][1] for n in group))
            for entry, of in measured
        ]
        for group in joined(groups)
    }
    floats = [
        e for e, own in zip(candidates, settings, strict=True) if own.format_of("") == "float"
    ]
    for group in options or _groups(view):
        weights = [weight_of(model.get_submodule(name)) for name in group]
        nbytes = sum(w.numel() * w.element_size() for w in weights)
        options.setdefault(group, []).extend(Option(entry, nbytes, 0.0) for entry in floats[:1])
    chosen = allocate(options, max_bytes=max_bytes, max_kl=max_kl)
    plan = {name: dict(o.entry) for group, o in chosen.items() for name in group}
    return PlanSearch(
        plan,
        apply_plan(config, plan),
        sum(option.nbytes for option in chosen.values()),
        sum(option.kl for option in chosen.values()),
        {group: tuple(tried) for group, tried in options.items()},
    )


def _groups(view: ModelView) -> list[tuple[str, ...]]:
    return [(name,) for name in view.linears if name not in view.int8_heads]


def joined(groups: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The groups, those that share a layer as one, in the order of their first layers."""
    found: list[tuple[str, ...]] = []
    for group in dict.fromkeys(groups):
        touching = [other for other in found if not set(other).isdisjoint(group)]
        whole = tuple(dict.fromkeys(name for part in (*touching, group) for name in part))
        at = found.index(touching[0]) if touching else len(found)
        found[at : at + 1] = [whole]
        found = [other for other in found if other not in touching or other == whole]
    return found


def _bytes(name: str, linear: nn.Module, config: SmoothQuantConfig) -> int:
    n, k = weight_of(linear).shape
    return choose(name, linear, config).nbytes(n, k)


def allocate(
    options: Mapping[tuple[str, ...], Iterable[Option]],
    *,
    max_bytes: int | None = None,
    max_kl: float | None = None,
) -> dict[tuple[str, ...], Option]:
    """Starts with the fewest bytes and takes the steps that lower the error most for a byte, while the budget lasts.

    Raises:
        SmoothQuantError: no choice keeps the budget.
    """
    hulls = {group: _hull(tried) for group, tried in options.items()}
    chosen = {group: hull[0] for group, hull in hulls.items()}
    steps = [
        (-(after.kl - before.kl) / (after.nbytes - before.nbytes), index, group, after)
        for index, (group, hull) in enumerate(hulls.items())
        for before, after in itertools.pairwise(hull)
    ]
    stopped: set[tuple[str, ...]] = set()
    for _, _, group, after in sorted(steps, key=lambda step: (-step[0], step[1])):
        taken = sum(option.nbytes for option in chosen.values())
        if max_kl is not None and sum(option.kl for option in chosen.values()) <= max_kl:
            break
        larger = taken + after.nbytes - chosen[group].nbytes
        if group in stopped or (max_bytes is not None and larger > max_bytes):
            stopped.add(group)  # its later steps build on this one
            continue
        chosen[group] = after
    nbytes, kl = (sum(getattr(o, what) for o in chosen.values()) for what in ("nbytes", "kl"))
    if max_bytes is not None and nbytes > max_bytes:
        raise SmoothQuantError(
            f"no choice of these candidates fits into {max_bytes} bytes: the smallest one takes {nbytes}."
        )
    if max_kl is not None and kl > max_kl:
        raise SmoothQuantError(
            f"no choice of these candidates stays within a KL divergence of {max_kl}: the best one has {kl:.4g}."
        )
    return chosen


def _hull(tried: Iterable[Option]) -> list[Option]:
    """The candidates that are best for some price of a byte, from the fewest bytes to the least error."""

    def gain(a: Option, b: Option) -> float:
        return (a.kl - b.kl) / (b.nbytes - a.nbytes)

    hull: list[Option] = []
    for option in sorted(tried, key=lambda o: (o.nbytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and gain(hull[-2], hull[-1]) <= gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def describe(found: PlanSearch) -> Iterator[str]:
    """Sentences for a command line."""
    for entry in {str(sorted(e.items())): e for e in found.plan.values()}.values():
        count = sum(e == entry for e in found.plan.values())
        yield f"{count} layers: " + ", ".join(f"{key} {value}" for key, value in entry.items())
