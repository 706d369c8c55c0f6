"""Smoothing factors of every group of linears, and how each is applied: folded, at run time, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig, first_match
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.record import How, Reason
from smoothquant_kernels.modeling.run import Batch
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import in_parts, weight_of
from smoothquant_kernels.reference import smoothing_factors
from smoothquant_kernels.smoothing.fold import (
    Smoothing,
    divide_at_run_time,
    fold_verified,
    round_to_power_of_two,
)
from smoothquant_kernels.smoothing.int8_error import (
    InputSettings,
    Int8Error,
    int8_errors,
    output_errors,
    static_scale,
)
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

#: The alphas that the search for W4A8 layers tries, beside the usual one (docs/guides/w4a8.md).
AWQ_ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
#: The norms of AWQ's own factors, which come from the activations alone. A common factor of all channels has no effect.
AWQ_NORMS = ("rms", "none")
#: On so few tokens, errors within this ratio of each other are a tie. Smaller gains, as most rotated groups have, do
#: not hold for other text (docs/guides/w4a8.md).
_CLEARLY = 1.05
_FOLDS_AT_ONCE = 16  # the most groups whose folds are verified together
_FOLD_BYTES = 1 << 26  # the most bytes of their weights, unless one group alone has more


def group_alpha(
    group: Group, peak: float | None, config: SmoothQuantConfig, *, rotated: bool
) -> float:
    """Returns the alpha of a group. Raises SmoothQuantError if the configuration gives its linears different ones."""

    def alpha_of(name: str) -> float:
        return config.alpha_of(peak, name, rotated=rotated)

    # Linears without an alpha of their own all take the default of the first one's scheme.
    _check_agreement(group, "alpha", config.alphas, alpha_of)
    return alpha_of(group.linears[0])


class Balance(NamedTuple):
    """What decides on the factors of a group: alpha, and the norms of the channels of activations and weights."""

    alpha: float
    norms: tuple[str, str]


def group_balance(
    group: Group, peak: float | None, config: SmoothQuantConfig, *, rotated: bool
) -> Balance:
    """Returns the balance of a group. Raises SmoothQuantError as `group_alpha` does."""
    scheme = config.scheme_of(peak, group.linears[0])
    return Balance(
        group_alpha(group, peak, config, rotated=rotated), config.norms_of(scheme, rotated=rotated)
    )


def group_rotation(group: Group, k: int, config: SmoothQuantConfig) -> int:
    """Returns the rotation of a group of linears [N, K]. Raises SmoothQuantError as `group_alpha` does."""

    def rotation_of(name: str) -> int:
        return config.rotation_of(k, name)

    _check_agreement(group, "rotation", config.rotations, rotation_of)
    return rotation_of(group.linears[0])


def _check_agreement(
    group: Group, what: str, by_layer: Mapping[str, Any], value: Callable[[str], Any]
) -> None:
    first, *others = group.linears
    own = first_match(by_layer, first)
    for other in others:
        if first_match(by_layer, other) != own:
            raise SmoothQuantError(
                f"{first} and {other} read the same tensor, so they share their smoothing factors and rotation, but "
                f"{what} is {value(first)} for the first and {value(other)} for the second; give all of "
                f"{', '.join(group.linears)} the same."
            )


def weight_norms(model: nn.Module, group: Group, norm: str) -> Tensor:
    """Returns the largest |w| or the root mean square of each input channel over all linears of the group.

    [K] float32. `norm` is ``"max"``, ``"rms"``, or ``"none"`` for ones: AWQ's factors do not look at the weights.
    """
    if norm == "none":
        return torch.ones_like(
            weight_of(model.get_submodule(group.linears[0]))[0], dtype=torch.float32
        )
    weights = [
        part for n in group.linears for part in in_parts(weight_of(model.get_submodule(n)).detach())
    ]
    if norm == "max":
        return torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    # float64, because the squares of large float32 weights overflow float32.
    lengths = [torch.linalg.vector_norm(w, dim=0, dtype=torch.float64) for w in weights]
    rows = sum(len(w) for w in weights)
    whole: Tensor = torch.linalg.vector_norm(torch.stack(lengths), dim=0)
    return (whole / math.sqrt(rows)).float()


def group_factors(
    model: nn.Module,
    group: Group,
    statistics: ActivationStatistics,
    alpha: float,
    norms: tuple[str, str],
    config: SmoothQuantConfig,
) -> Tensor:
    """Returns s [K] float32, rounded as configured, for a group of linears of the unsmoothed model.

    `norms`: ``"max"`` or ``"rms"`` of the activations and of the weights (`SmoothQuantConfig.norms_of`).
    """
    name = group.linears[0]
    of_inputs = statistics.norms(name, norms[0])
    of_weights = weight_norms(model, group, norms[1])
    if (repeats := group.repeats).times > 1:
        of_inputs = _of_copies(repeats.by_copy(of_inputs), norms[0])
        of_weights = _of_copies(repeats.by_copy(of_weights), norms[1])
    smooth = repeats.spread(smoothing_factors(of_inputs, of_weights, alpha))
    rounding = config.smooth_rounding
    if rounding == "auto":
        whole = weight_of(model.get_submodule(name)).dtype == torch.float32
        rounding = "none" if whole else "power_of_two"
    return round_to_power_of_two(smooth) if rounding == "power_of_two" else smooth


def _of_copies(values: Tensor, norm: str) -> Tensor:
    """[channels] the norm of all copies of a channel together, from those of each copy [channels, copies]."""
    return values.amax(1) if norm == "max" else values.square().mean(1).sqrt()


def smoothable_linears(
    view: ModelView, linears: Iterable[str], statistics: ActivationStatistics
) -> list[str]:
    """Returns the linears that calibration reached, but heads, and whose weight no other module shares."""
    return [
        n
        for n in linears
        if n in statistics.absmax and n not in view.int8_heads and f"{n}.weight" not in view.shared
    ]


def runs_within(
    groups: Iterable[Group],
    size: Callable[[Group], int],
    max_bytes: int,
    max_groups: int | None = None,
) -> Iterator[list[Group]]:
    """Splits the groups into runs of at most `max_bytes` and `max_groups`. A group that is too large runs alone."""
    part: list[Group] = []
    used = 0
    for group in groups:
        more = size(group)
        if part and (len(part) == max_groups or used + more > max_bytes):
            yield part
            part, used = [], 0
        part.append(group)
        used += more
    if part:
        yield part


class Plan:
    """The rotation, the largest token and the factors of every layer, from the weights before any fold.

    A fold into the rows of v_proj or up_proj changes the weight that the factors of their own group depend on. The
    quantized result must not depend on which folds succeed, or on their order.

    Attributes:
        rotations: layer -> group size, 0 for none.
        alphas: layer -> the migration strength of its factors.
        norms: layer -> the norms of its factors, where they are not those of the configuration.
        peaks: layer -> the largest token of its input over the median one, as it is quantized.
        smooth: layer -> the factors that `apply` has applied.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        statistics: ActivationStatistics,
        config: SmoothQuantConfig,
        heads: Collection[str] = (),
    ) -> None:
        self._model, self._statistics, self._config = model, statistics, config
        self._heads = heads
        self.rotations = {n: config.rotation_of(a.numel(), n) for n, a in statistics.absmax.items()}
        self.alphas: dict[str, float] = {}
        self.norms: dict[str, tuple[str, str]] = {}
        self.peaks: dict[str, float] = {}
        self.smooth: dict[str, Tensor] = {}
        self._factors: dict[Group, Tensor] = {}
        self._balances: dict[Group, Balance] = {}
        self._undivided: list[Group] = []
        for group in groups:
            if group.producer is None and not config.divides:
                self._undivided.append(group)
                continue
            name = group.linears[0]
            config = self.settings(name)
            rotation = group_rotation(group, statistics.absmax[name].numel(), config)
            usual, smooth = None, None
            if rotation:
                # Whether there are massive activations decides on the factors, so the usual ones must do to see them.
                usual = group_balance(group, None, config, rotated=True)
                smooth = self._factors_of(group, usual)
            peak = statistics.peak(name, smooth, rotation)
            self.peaks |= dict.fromkeys(group.linears, peak)
            balance = group_balance(group, peak, config, rotated=rotation > 0)
            if smooth is None or balance != usual:
                smooth = self._factors_of(group, balance)
            self._factors[group] = smooth
            self._balances[group] = balance
            self.alphas |= dict.fromkeys(group.linears, balance.alpha)
        for name in statistics.absmax.keys() - self.peaks.keys():
            self.peaks[name] = statistics.peak(name, None, self.rotations[name])

    def _factors_of(self, group: Group, balance: Balance) -> Tensor:
        return group_factors(self._model, group, self._statistics, *balance, self._config)

    def settings(self, name: str) -> SmoothQuantConfig:
        """The configuration, or that of an output head."""
        return self._config.for_head(name) if name in self._heads else self._config

    def foldable(self) -> list[Group]:
        return [group for group in self._factors if group.producer is not None]

    def search_for_w4(self, batch: Batch, run_sample: Callable[[Batch], Any]) -> None:
        """Gives groups with W4A8 layers the factors of least error on the sample, if the configuration asks for that.

        The usual factors stay unless others are clearly better. Other groups, and layers in `alphas`, keep theirs.

        Source: AWQ (Lin et al., 2023), section 3.2.
        """
        config = self._config
        balances = {
            group: [usual, *self._others(group, usual)]
            for group, usual in self._balances.items()
            if config.awq
            and first_match(config.alphas, group.linears[0]) is None
            and any(self.settings(n).format_of(n) == "w4a8" for n in group.linears)
        }
        if not balances:
            return
        candidates = {
            group: [self._factors[group], *(self._factors_of(group, b) for b in tried[1:])]
            for group, tried in balances.items()
        }
        errors = output_errors(
            self._model, candidates, self._trial_of, batch, run_sample, config.weight_granularity
        )
        for group, found in errors.items():
            best = found.index(min(found))
            if not found[best] * _CLEARLY < found[0]:
                continue
            chosen = balances[group][best]
            self._factors[group] = candidates[group][best]
            self.alphas |= dict.fromkeys(group.linears, chosen.alpha)
            if chosen.norms != balances[group][0].norms:
                self.norms |= dict.fromkeys(group.linears, chosen.norms)

    def _others(self, group: Group, usual: Balance) -> Iterator[Balance]:
        """What the search tries beside the usual balance."""
        yield from (usual._replace(alpha=a) for a in AWQ_ALPHAS if a != usual.alpha)
        if not self.rotations[group.linears[0]]:  # a rotated group gains nothing from them
            yield from (Balance(a, AWQ_NORMS) for a in AWQ_ALPHAS)

    def leave_out_what_does_not_gain(
        self, batch: Batch, run_sample: Callable[[Batch], Any]
    ) -> dict[str, tuple[How, str]]:
        """Drops the groups that int8 computes better without factors; returns name -> (``"none"``, why)."""
        config = self._config
        if not config.only_where_better:
            return {}
        asked = {
            group: s
            for group, s in self._factors.items()
            if first_match(config.alphas, group.linears[0]) is None
        }
        by_granularity: dict[str, dict[Group, Tensor]] = {}
        for group, s in asked.items():
            own = self.settings(group.linears[0]).weight_granularity
            by_granularity.setdefault(own, {})[group] = s
        errors: dict[Group, Int8Error] = {}
        for own, part in by_granularity.items():
            errors |= int8_errors(self._model, part, self._trial_of, batch, run_sample, own)
        left: dict[str, tuple[How, str]] = {}
        for group, error in errors.items():
            if not error.helps:
                del self._factors[group]
                why = Reason.NO_GAIN(error.naive, error.smoothed)
                left |= dict.fromkeys(group.linears, ("none", why))
        return left

    def _trial_of(self, name: str, smooth: Tensor | None) -> InputSettings:
        """How the layer's input is quantized with these factors."""
        rotation = self.rotations[name]
        scheme = self.settings(name).scheme_of(self.peaks[name], name)
        largest = self._statistics.range_of(name, smooth, rotation) if scheme == "static" else 0.0
        scale = static_scale(largest, self._config.clip_of(name))
        return InputSettings(scheme, scale, rotation, self.settings(name).format_of(name))

    def apply(
        self, same_output: Callable[[], bool], changes: Changes
    ) -> dict[str, tuple[How, str]]:
        """Smooths the groups; returns name -> (how, why)."""
        model = self._model
        result: dict[str, tuple[How, str]] = {}

        def note(smoothing: Smoothing, how: How, why: str) -> None:
            for name in smoothing.group.linears:
                result[name] = (how, why)
                self.smooth[name] = smoothing.smooth

        def leave(group: Group, why: str) -> None:
            for name in group.linears:
                result[name] = ("none", Reason.NOT_DIVIDED(why))
                self.peaks[name] = self._statistics.peak(name, None, self.rotations[name])

        def divide(group: Group, why: str) -> None:
            if not self._config.divides:
                leave(group, why)
                return
            smoothing = Smoothing(group, self._factors[group])
            divide_at_run_time(model, smoothing, changes)
            note(smoothing, "runtime", why)

        def weight_bytes(group: Group) -> int:
            return sum(weight_of(model.get_submodule(n)).nbytes for n in group.linears)

        for part in runs_within(self.foldable(), weight_bytes, _FOLD_BYTES, _FOLDS_AT_ONCE):
            smoothings = [Smoothing(group, self._factors[group]) for group in part]
            done, refused = fold_verified(model, smoothings, same_output, changes)
            if self._config.smooth_rounding == "auto":
                # A fold refused for its rounding errors may succeed with powers of two, which multiply exactly.
                rounded = [Smoothing(r.group, round_to_power_of_two(r.smooth)) for r in refused]
                more, refused = fold_verified(model, rounded, same_output, changes)
                done += more
            for smoothing in done:
                note(smoothing, "folded", Reason.FOLDED(smoothing.group.producer))
            for group in (r.group for r in refused):
                divide(group, Reason.FOLD_REFUSED(group.producer))
        for group in self._factors:
            if group.producer is None:
                divide(group, group.reason)
        for group in self._undivided:
            leave(group, group.reason)
        return result
