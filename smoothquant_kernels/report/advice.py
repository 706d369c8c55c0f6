"""Advice for the worst layers. Every alternative that it offers was tried on the tokens of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from smoothquant_kernels.config import MASSIVE_PEAK, SmoothQuantConfig
from smoothquant_kernels.modeling.run import Batch
from smoothquant_kernels.report.measure import (
    Measured,
    Plan,
    SettingsOf,
    Stand,
    decibel,
    half_stand_in,
    layer_factors,
    layer_norms,
    measure,
    stand_in,
)
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from smoothquant_kernels.storage.document import Document

_STEPS = (-0.2, -0.1, 0.1, 0.2)
#: In dB. The layers of one model differ by tens of dB, so smaller gains are not worth a setting of their own.
WORTH = 0.5


@dataclass(frozen=True)
class _Trial:
    """An alternative for all layers that read one tensor, since they share their factors."""

    alpha: float | None
    scheme: str


def advise(
    original: nn.Module,
    smoothed: nn.Module,
    worst: Sequence[str],
    layers: Mapping[str, Document],
    statistics: ActivationStatistics,
    batches: Iterable[Batch],
    settings_of: SettingsOf,
    *,
    logits: bool = False,
) -> list[Document]:
    """Tries other settings for some layers, each together with the layers that read the same tensor.

    It tries alpha 0.1 and 0.2 lower and higher, and a scale per token if the layer has none. A layer's input is that of
    the smoothed float model, so each setting is judged without the settings of other layers.

    Args:
        worst: the names of the layers.
        layers: name -> the layer's entry in `smoothquant_info`, with `activation_scheme`.
        statistics: those of the original model.
        settings_of: the settings of each layer.
        logits: as in `measure`.

    Returns:
        One entry for each layer of `worst`: the settings tried, the best one, and the settings that give exactly that.
    """
    trials: dict[str, list[_Trial]] = {}
    stands: dict[str, list[Stand]] = {}
    for name in worst:
        for member in layers[name]["group"]:
            if member not in stands:
                trials[member] = _trials(layers[name])
                stands[member] = _stands(
                    original, layers, member, trials[member], statistics, settings_of(member)
                )
    if not stands:
        return []
    measured = measure(smoothed, stands, batches, logits=logits)
    return [_advice(layers, name, trials[name], measured) for name in worst]


def _trials(layer: Document) -> list[_Trial]:
    """The present setting, then its alternatives."""
    alpha, scheme = layer["alpha"], layer["activation_scheme"]
    found = [_Trial(alpha, scheme)]
    if alpha is not None:
        others = [round(alpha + step, 6) for step in _STEPS]
        found += [_Trial(other, scheme) for other in others if 0.0 <= other <= 1.0]
    if scheme != "per_token":
        found.append(_Trial(alpha, "per_token"))
    return found


def _stands(
    original: nn.Module,
    layers: Mapping[str, Document],
    name: str,
    trials: Sequence[_Trial],
    statistics: ActivationStatistics,
    config: SmoothQuantConfig,
) -> list[Stand]:
    """One stand-in per trial, then the first one with only its weights and with only its activations quantized."""
    members = layers[name]["group"]
    rotation = layers[name]["rotation"]
    made = []
    now = None
    for trial in trials:
        norms = layer_norms(config, members, layers[name]["x_peak"], rotation)
        if trial is trials[0]:
            norms = layers[name].get("norms") or norms  # those of the factors in the model
        elif trial.scheme != trials[0].scheme:  # of all members
            norms = config.norms_of(trial.scheme, rotated=rotation > 0)
        factors = layer_factors(original, members, statistics, trial.alpha, norms, config)
        now = factors if now is None else now
        # The smoothed model already divides by `now`.
        factor = None if torch.equal(factors, now) else factors / now
        largest = statistics.range_of(name, factors, rotation)
        plan = Plan(trial.alpha, trial.scheme, largest, rotation, factor)
        made.append(stand_in(plan, name, config))
    return [*made, half_stand_in(made[0], weights=True), half_stand_in(made[0], weights=False)]


def _advice(
    layers: Mapping[str, Document], name: str, trials: Sequence[_Trial], measured: Measured
) -> Document:
    layer = layers[name]
    group: list[str] = layer["group"]
    noise = [
        sum(measured.relative(member, i) or 0.0 for member in group) for i in range(len(trials))
    ]
    tried: list[Document] = [
        {
            "alpha": trial.alpha,
            "activation_scheme": trial.scheme,
            "sqnr": measured.sqnr(name, i),
            "group_gain": decibel(noise[i]) - decibel(noise[0]) if noise[i] and noise[0] else 0.0,
        }
        for i, trial in enumerate(trials)
    ]
    by_weights, by_activations = measured.noise[name][len(trials) :]
    both = by_weights + by_activations
    share = by_weights / both if both else None
    best = min(range(len(trials)), key=lambda i: noise[i])
    better = tried[best]["group_gain"] >= WORTH and tried[best]["sqnr"] > tried[0]["sqnr"]
    n, k = layer["out_features"], layer["in_features"]
    result: Document = {
        "layer": name,
        "group": group,
        "sqnr": tried[0]["sqnr"],
        "weights_share": share,
        "x_peak": layer["x_peak"],
        "tried": tried,
        "chosen": best if better else None,
        "sqnr_then": tried[best]["sqnr"] if better else tried[0]["sqnr"],
        "settings": _settings(group, trials[0], trials[best]) if better else None,
        "float_bytes_more": n * k * layer["float_bytes"] - n * k,
    }
    return {**result, "text": _text(result, layer, trials)}


def _settings(group: Sequence[str], now: _Trial, best: _Trial) -> dict[str, Any]:
    """The settings of `SmoothQuantConfig` that change, by full layer name, which takes precedence over patterns."""
    found: dict[str, Any] = {}
    if best.alpha is not None:  # even if unchanged: another scheme has another default
        found["alphas"] = {name: best.alpha for name in group}
    if best.scheme != now.scheme:
        found["schemes"] = {name: best.scheme for name in group}
    return found


def _text(advice: Document, layer: Document, trials: Sequence[_Trial]) -> str:
    """What to do, and the facts that support it."""
    share, peak = advice["weights_share"], advice["x_peak"] or 1.0
    facts = []
    if share is not None:
        what = "weights" if share >= 0.5 else "activations"
        facts.append(f"the {what} make {max(share, 1 - share):.0%} of the noise")
    if peak >= MASSIVE_PEAK:
        facts.append(f"the largest token is {peak:,.0f} times the median one")
    because = f" ({'; '.join(facts)})" if facts else ""
    if advice["chosen"] is None:
        return f"Keep it: no alternative gains {WORTH} dB{because}. Only leaving it in float removes its noise."
    now, best = trials[0], trials[advice["chosen"]]
    if best.scheme != now.scheme:
        what = "Give it a scale per token"
    else:
        assert now.alpha is not None and best.alpha is not None
        what = f"{'Lower' if best.alpha < now.alpha else 'Raise'} alpha to {best.alpha:g}"
    with_others = len(advice["group"]) - 1
    others = (
        f", with {with_others} that read{'s' * (with_others == 1)} the same input"
        if with_others
        else ""
    )
    return f"{what}{others}{because}."
