"""Trying candidates for one group with the int8 arithmetic of the quantized layers, on recorded activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import ops, reference
from smoothquant_kernels.config import LEAST_ROTATION, SmoothQuantConfig, first_match
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.nn.rounding_w4 import rounded_w4
from smoothquant_kernels.ops.rotate import rotated, rotated_weight
from smoothquant_kernels.reference import MAX_ROTATION
from smoothquant_kernels.search.result import Choice, GroupResult
from smoothquant_kernels.search.sensitivity import Recording
from smoothquant_kernels.smoothing.factors import group_factors, group_rotation
from smoothquant_kernels.smoothing.int8_error import static_scale
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

#: Every group tries these alphas, then the neighbors of its best one at a distance of `STEP`.
ALPHAS: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEP = 0.05
#: Parts of the calibrated range for a static scale to cover, and quantiles of |x| for its range to end at.
CLIPS = (0.9, 0.8, 0.65, 0.5)
QUANTILES = (0.99999, 0.9999, 0.999)


def own_scheme(config: SmoothQuantConfig, group: Group | GroupResult) -> str:
    """Returns the scheme that the settings give the group's first linear, whatever its activations are."""
    return config.replace(massive_activations="keep").scheme_of(None, group.linears[0])


@dataclass
class _Quantized:
    """A group at one alpha, rotation and pair of norms: factors and int8 weights, which fit any activation scale."""

    alpha: float | None
    rotation: int
    inv_smooth: Tensor | None
    absmax: float  # of the smoothed and rotated input over the calibration data
    weights: list[tuple[Tensor, Tensor]]


@dataclass
class Space:
    """The candidates that a configuration allows."""

    model: nn.Module
    statistics: ActivationStatistics
    config: SmoothQuantConfig

    @property
    def alphas(self) -> tuple[float | None, ...]:
        return ALPHAS if self.config.smooth else (None,)

    def schemes(self, group: Group, *, per_token: bool) -> list[str]:
        """Returns the group's own scheme and, if `per_token` allows it, one scale per token."""
        own = own_scheme(self.config, group)
        return [own] if own == "per_token" or not per_token else [own, "per_token"]

    def own_rotation(self, group: Group) -> int:
        """Returns the rotation that the configuration gives the group."""
        k = self.statistics.absmax[group.linears[0]].numel()
        return group_rotation(group, k, self.config)

    def other_rotations(self, group: Group) -> list[int]:
        """Returns the rotations to try beside the group's own one: none, a smaller and a larger one."""
        own = self.own_rotation(group)
        fixed = first_match(self.config.rotations, group.linears[0]) is not None
        if not own or fixed or self.config.rotation != "auto":
            return []
        k = self.statistics.absmax[group.linears[0]].numel()
        sizes = (own // 4, own * 2)
        return [0, *(g for g in sizes if LEAST_ROTATION <= g <= MAX_ROTATION and k % g == 0)]

    def explore(self, group: Group, schemes: list[str], recording: Recording) -> GroupResult:
        """Returns all candidates of a group with their costs, always in the same order."""
        trial = _Trial(self, group, recording)
        tried: list[Choice] = []
        own = self.own_rotation(group)
        for alpha in self.alphas:
            for norms, alike in self._by_norms(schemes, own).items():
                made = trial.quantized(alpha, own, norms)
                tried += [trial.choice(made, scheme) for scheme in alike]
        for scheme in schemes:
            best = GroupResult(group.linears, tuple(tried)).best(scheme)
            for alpha in _neighbors(best.alpha):
                made = trial.quantized(alpha, own, self._norms(scheme, own))
                tried.append(trial.choice(made, scheme))
            best = GroupResult(group.linears, tuple(tried)).best(scheme)
            for rotation in self.other_rotations(group):
                made = trial.quantized(best.alpha, rotation, self._norms(scheme, rotation))
                tried.append(trial.choice(made, scheme))
            if scheme == "static":
                best = GroupResult(group.linears, tuple(tried)).best(scheme)
                norms = self._norms(scheme, best.rotation)
                made = trial.quantized(best.alpha, best.rotation, norms)
                tried += [trial.choice(made, scheme, clip) for clip in trial.clips(made)]
        return GroupResult(group.linears, tuple(tried))

    def _norms(self, scheme: str, rotation: int) -> tuple[str, str]:
        return self.config.norms_of(scheme, rotated=rotation > 0)

    def _by_norms(self, schemes: Iterable[str], rotation: int) -> dict[tuple[str, str], list[str]]:
        """The schemes whose factors balance the same norms: one quantized weight serves them all."""
        found: dict[tuple[str, str], list[str]] = {}
        for scheme in schemes:
            found.setdefault(self._norms(scheme, rotation), []).append(scheme)
        return found


def _neighbors(alpha: float | None) -> Iterator[float]:
    if alpha is not None:
        yield from (round(alpha - STEP, 2), round(alpha + STEP, 2))


class _Trial:
    """One group's recorded input and its float outputs."""

    def __init__(self, space: Space, group: Group, recording: Recording) -> None:
        self.space, self.group, self.recording = space, group, recording
        self.x = recording.x[group.linears[0]]
        self.rows = recording.rows[group.linears[0]]
        self.linears = [space.model.get_submodule(n) for n in group.linears]
        self.weights = [weight_of(m).detach() for m in self.linears]
        self.biases = [getattr(m, "bias", None) for m in self.linears]
        self.y = [F.linear(self.x, w, b) for w, b in zip(self.weights, self.biases, strict=True)]

    def quantized(self, alpha: float | None, rotation: int, norms: tuple[str, str]) -> _Quantized:
        space, name = self.space, self.group.linears[0]
        weights = [w.float() for w in self.weights]
        smooth = None
        if alpha is not None:
            smooth = group_factors(
                space.model, self.group, space.statistics, alpha, norms, space.config
            )
            weights = [w * smooth for w in weights]
        granularity = space.config.weight_granularity
        weights = [rotated_weight(w, rotation) for w in weights]
        return _Quantized(
            alpha,
            rotation,
            None if smooth is None else 1.0 / smooth,
            space.statistics.range_of(name, smooth, rotation),
            [
                self._rounded(name, w, granularity)
                for name, w in zip(self.group.linears, weights, strict=True)
            ],
        )

    def _rounded(self, name: str, w: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
        """The int8 weight that the layer's format has, and its scale."""
        if self.space.config.format_of(name) == "w4a8":
            w_q, w_scale = rounded_w4(w)
            return w_q.to(torch.int8), w_scale
        return reference.quantize_weight(w, granularity)

    def choice(self, made: _Quantized, scheme: str, clip: float = 1.0) -> Choice:
        x_q, x_scale = self._quantize(made, scheme, clip)
        cost = 0.0
        for name, y, bias, (w_q, w_scale) in zip(
            self.group.linears, self.y, self.biases, made.weights, strict=True
        ):
            bias = None if bias is None else bias.detach()
            y_q = ops.gemm_s8(x_q, w_q, x_scale, w_scale, bias=bias, out_dtype=y.dtype)
            cost += self.recording.cost(name, y_q.float() - y.float())
        return Choice(scheme, made.alpha, clip, made.rotation, cost)

    def _quantize(self, made: _Quantized, scheme: str, clip: float) -> tuple[Tensor, Tensor]:
        quantize = partial(ops.quantize, inv_smooth=made.inv_smooth, rotation=made.rotation)
        if scheme == "static":
            scale = self.x.new_tensor([static_scale(made.absmax, clip)], dtype=torch.float32)
            return quantize(self.x, scale=scale)
        if scheme == "per_token":
            return quantize(self.x)
        # A dynamic scale per tensor differs from call to call.
        parts = [quantize(x, granularity="tensor") for x in self.x.split(self.rows)]
        scales = [s.expand(len(q)) for q, s in parts]
        return torch.cat([q for q, _ in parts]), torch.cat(scales)

    def clips(self, made: _Quantized) -> list[float]:
        """Returns the parts of the calibrated range to try, including quantiles of the recorded |x|, descending."""
        x = self.x.float() if made.inv_smooth is None else self.x * made.inv_smooth
        flat = rotated(x, made.rotation).abs().reshape(-1)
        quantiles = [
            float(flat.kthvalue(max(1, round(q * flat.numel()))).values) / made.absmax
            for q in QUANTILES
            if made.absmax > 0
        ]
        return sorted({r for r in (*CLIPS, *quantiles) if 0.0 < r < 1.0}, reverse=True)
