"""Choosing alpha, clipping and scheme per layer by their cost at the model's output, in the real int8 arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.perplexity import stderr_of_mean
from smoothquant_kernels.modeling.batches import PositionCounter
from smoothquant_kernels.modeling.groups import Group, find_groups
from smoothquant_kernels.modeling.run import Batch, evaluating, run
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.search.candidates import ALPHAS, Space, own_scheme
from smoothquant_kernels.search.held import hold_back
from smoothquant_kernels.search.result import (
    Choice,
    GroupResult,
    SearchFile,
    SearchResult,
    Validation,
    fingerprint,
)
from smoothquant_kernels.search.sensitivity import divergence, recordings
from smoothquant_kernels.smoothing.calibrate import (
    CalibrationData,
    calibration_bar,
    collect_statistics,
    configured_batches,
)
from smoothquant_kernels.smoothing.convert import quantize_model
from smoothquant_kernels.smoothing.factors import Plan, smoothable_linears
from smoothquant_kernels.smoothing.padding import Padding
from smoothquant_kernels.smoothing.patterns import check_patterns
from smoothquant_kernels.smoothing.smooth import check_finite_weights, smooth_lm
from smoothquant_kernels.smoothing.statistics import ActivationStatistics, warn_if_short

__all__ = ["Choice", "GroupResult", "SearchResult", "Validation", "search_config"]


def search_config(
    model: nn.Module,
    data: CalibrationData,
    config: SmoothQuantConfig | None = None,
    *,
    tokenizer: Any = None,
    path: str | Path | None = None,
    tokens: int = 1024,
    validation_tokens: int = 1024,
    per_token_share: float = 0.1,
    max_bytes: int = 1 << 30,
    progress: bool = True,
) -> SearchResult:
    """Finds the best alpha, clipping ratio and scheme of every group for a configuration.

    Each candidate runs with the int8 arithmetic of the quantized layer, on activations that did not set the ranges. Its
    cost is the KL divergence that its error causes at the model's output, estimated from gradients
    (docs/guides/search.md).
    Then the whole quantized model is compared on further tokens with the fixed alpha of least cost and with the
    defaults. If it is worse than the better of these by more than the standard error, that one is returned.

    Args:
        model: a float model; left unchanged.
        data: as for `calibrate_model`. The last batches are held back for the search and for the validation.
        config: the scheme, granularity, rounding and skips to search for. `alphas` and `clips` are replaced. With
            `smooth=False` only the clipping of static scales is searched. An int8 output head (`quantize_head`) is
            part of the validated models; its settings are not searched.
        tokenizer: turns strings into token ids.
        path: a JSON file that stores each finding, so an interrupted search can resume. At the end it holds the result.
        tokens, validation_tokens: the number of tokens to hold back, limited to a quarter of the batches each. Without
            validation tokens (0) there is no validation.
        per_token_share: the part of the groups that may get a scale per token where the configuration has one per
            tensor; those that gain most get it. With 0 or `massive_activations="keep"` all keep their scheme.
        max_bytes: the limit for recorded inputs and gradients, which take rows * (K + N) elements per layer. Layers
            that do not fit take further passes over the tokens. The limit excludes the model, one batch's backward
            pass, one layer's candidates and, for the validation, one quantized copy.
        progress: whether to show a progress bar.

    Returns:
        A `SearchResult` with `.config` for `smooth_lm` or `smooth_and_quantize`, and all measurements. The same model,
        data and settings give the same result.

    Raises:
        SmoothQuantError: as for `calibrate_model`; or there is too little data to hold any back (fewer than three
            sequences); or `path` belongs to another search or cannot be written.

    Equivalent to:
        for each group: argmin over alpha of sum(g ** 2 * (w8a8(x / s, w * s) - w @ x) ** 2) / 2

    Source: SmoothQuant (Xiao et al., 2022), section 3.2, for the grid search of alpha; Optimal Brain Damage (LeCun et
    al., 1990) and BRECQ (Li et al., 2021), section 3, for errors weighted by the diagonal of the Fisher information.
    """
    config = config or SmoothQuantConfig()
    if not 0.0 <= per_token_share <= 1.0 or tokens < 1 or validation_tokens < 0 or max_bytes < 1:
        raise SmoothQuantError(
            "per_token_share must be in [0, 1], tokens and max_bytes >= 1, validation_tokens >= 0; "
            f"got {per_token_share}, {tokens}, {max_bytes} and {validation_tokens}."
        )
    if per_token_share == 0.0:
        config = config.replace(massive_activations="keep")
    check_patterns(model, config)
    view = ModelView(model, config.float_pattern, config.quantize_head)
    check_finite_weights(view.linears)
    batches = list(configured_batches(model, data, config, tokenizer))
    warn_if_short(sum(map(PositionCounter(model), batches)), config.calibration_tokens)
    seen, (held, unseen) = hold_back(model, batches, tokens, validation_tokens)
    asked = [config.to_dict(), tokens, validation_tokens, per_token_share]
    file = SearchFile.open(path, fingerprint(model, batches, asked))
    if file.result is not None:
        return file.result
    statistics = collect_statistics(
        model, view.linears, seen, config=config, heads=view.int8_heads, progress=progress
    )
    names = smoothable_linears(view, view.linears, statistics)
    groups = find_groups(view, names, statistics.sample, fold=False)
    per_token = config.smooth and config.massive_activations == "per_token"
    _explore_all(
        Space(model, statistics, config), groups, held, file, per_token, max_bytes, progress
    )
    found = [file.groups[g.linears] for g in groups if g.linears in file.groups]
    budget = int(per_token_share * len(found)) if per_token else 0
    searched, searched_cost = _searched(config, found, budget)
    fixed_alpha, fixed_cost = _best_fixed(Space(model, statistics, config), groups, found)
    defaults = config.replace(clips={})
    fixed = [defaults]
    if fixed_alpha is not None:
        fixed.append(defaults.replace(alpha=fixed_alpha, alphas={}))
    validation, better = None, len(fixed) - 1
    if unseen:
        validation, better = _validate(model, statistics, fixed, searched, unseen)
    keep_fixed = validation is not None and validation.worse
    return file.finish(
        SearchResult(
            fixed[better] if keep_fixed else searched,
            "fixed" if keep_fixed else "searched",
            fixed_alpha if better else None,
            fixed_cost,
            searched_cost,
            tuple(found),
            validation,
        )
    )


# --- candidates -------------------------------------------------------------------------------------------------------


def _explore_all(
    space: Space,
    groups: Sequence[Group],
    held: Sequence[Batch],
    file: SearchFile,
    per_token: bool,
    max_bytes: int,
    progress: bool,
) -> None:
    """Adds the costs of all candidates of every group to `file`, in as many passes as `max_bytes` requires."""
    todo = [g for g in groups if g.linears not in file.groups]
    if not todo:
        return
    with calibration_bar(progress) as bar:
        task = bar.add_task("searching (groups)", total=len(groups), completed=len(file.groups))
        for part, recording in recordings(space.model, todo, held, max_bytes):
            with torch.no_grad():
                for group in part:
                    schemes = space.schemes(group, per_token=per_token)
                    file.add(space.explore(group, schemes, recording))
                    recording.forget(group)
                    bar.advance(task)


# --- decisions --------------------------------------------------------------------------------------------------------


def _searched(
    config: SmoothQuantConfig, found: Sequence[GroupResult], budget: int
) -> tuple[SmoothQuantConfig, float]:
    """Takes each group's cheapest candidate; up to `budget` groups, those that gain most, get a scale per token."""

    def gain(group: GroupResult) -> float:
        own = own_scheme(config, group)
        if not any(c.scheme == "per_token" for c in group.tried):
            return 0.0
        return group.best(own).cost - group.best("per_token").cost

    order = sorted(found, key=gain, reverse=True)[:budget]
    freed = {g.linears for g in order if gain(g) > 0.0}
    alphas: dict[str, float] = {}
    clips: dict[str, float] = {}
    rotations = dict(config.rotations)
    schemes = dict(config.schemes)
    cost = 0.0
    for group in found:
        own = own_scheme(config, group)
        best = group.best("per_token" if group.linears in freed else own)
        cost += best.cost
        for name in group.linears:
            if best.scheme != own:
                schemes[name] = best.scheme
            if best.alpha is not None:
                alphas[name] = best.alpha
            if best.rotation != group.rotation:
                rotations[name] = best.rotation or "none"
            if best.clip < 1.0:
                clips[name] = best.clip
    chosen = config.replace(
        alphas=alphas,
        clips=clips,
        rotations=rotations,
        schemes=schemes,
        massive_activations="keep",
    )
    return chosen, cost


def _best_fixed(
    space: Space, groups: Sequence[Group], found: Sequence[GroupResult]
) -> tuple[float | None, float]:
    """Returns the single alpha of least cost in the configured schemes, or None for its own alphas, and that cost."""

    def cost(alpha: float | None) -> float:
        config = space.config
        if alpha is not None:
            config = config.replace(alpha=alpha, alphas={})
        peaks = Plan(space.model, groups, space.statistics, config).peaks
        total = 0.0
        for group in found:
            name = group.linears[0]
            own = config.alpha_of(peaks[name], name, rotated=group.rotation > 0)
            at = group.at(config.scheme_of(peaks[name], name), own if config.smooth else None)
            total += float("inf") if at is None else at.cost
        return total

    candidates: list[float | None] = [None, *(ALPHAS if space.config.smooth else ())]
    best = min(candidates, key=cost)
    return best, cost(best)


def _validate(
    model: nn.Module,
    statistics: ActivationStatistics,
    fixed: Sequence[SmoothQuantConfig],
    searched: SmoothQuantConfig,
    unseen: Sequence[Batch],
) -> tuple[Validation, int]:
    """Compares the searched model with the better of the fixed ones on the same tokens; also returns that one's index.

    Only one quantized copy is alive at a time. Its KL rows are kept.
    """

    padding = Padding(model, {})

    def compared(quantized: nn.Module, batch: Batch) -> Tensor:
        padding.start(batch, lambda b: run(model, b))
        return divergence(run(model, batch), run(quantized, batch), padding)

    def kl(config: SmoothQuantConfig) -> Tensor:
        quantized = smooth_lm(copy.deepcopy(model), statistics, config=config, progress=False)
        quantize_model(quantized, config=config)
        with evaluating(model), evaluating(quantized):
            return torch.cat([compared(quantized, b) for b in unseen])

    rows = [kl(config) for config in fixed]
    better = min(range(len(rows)), key=lambda i: float(rows[i].mean()))
    a, b = rows[better], kl(searched)
    stderr = stderr_of_mean(b - a)
    validation = Validation(
        tokens=len(a),
        fixed_kl=float(a.mean()),
        searched_kl=float(b.mean()),
        difference=float((b - a).mean()),
        stderr=stderr if math.isfinite(stderr) else None,
    )
    return validation, better
