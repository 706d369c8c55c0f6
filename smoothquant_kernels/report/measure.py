"""What the report measures: the quantization noise of each layer alone, on tokens not chosen for calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.modeling.batches import count_tokens
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.run import Batch, evaluating, run, unpadded_rows
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import pending_smooth, weight_of
from smoothquant_kernels.nn.kinds import kind_of
from smoothquant_kernels.smoothing.convert import quantize_linear
from smoothquant_kernels.smoothing.factors import group_factors
from smoothquant_kernels.smoothing.padding import Padding
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

#: Makes the layer that stands in for a float layer. It is called for every batch and its layer is then dropped, so only
#: one is in memory at a time. Quantizing a weight is cheap compared with multiplying a window of tokens by it.
Stand = Callable[[nn.Module], nn.Module]
SettingsOf = Callable[[str], SmoothQuantConfig]
SHOWN_TOKENS = 128  # rows of the heat maps


@dataclass
class Measured:
    """Float64 sums over all tokens that are not padding, and the first rows of some inputs.

    Attributes:
        signal: layer -> |y|^2, where y is the output of the float layer.
        noise: layer -> |y_hat - y|^2 for each of its stand-ins.
        shown: layer -> x [T, K] float32 of the first tokens, after division at run time, if any.
        tokens: how many tokens were read.
    """

    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, list[float]] = field(default_factory=dict)
    shown: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def relative(self, name: str, which: int = 0) -> float | None:
        """|y_hat - y|^2 / |y|^2. None if the layer was never called or its output is zero."""
        return self.noise[name][which] / self.signal[name] if self.signal.get(name) else None

    def sqnr(self, name: str, which: int = 0) -> float | None:
        """The ratio of signal to quantization noise in dB, infinite for an exact layer. None as in `relative`."""
        relative = self.relative(name, which)
        return None if relative is None else decibel(relative)


def decibel(relative_noise: float) -> float:
    """10 log10(1 / noise)."""
    return -10.0 * math.log10(relative_noise) if relative_noise > 0 else math.inf


def measure(
    model: nn.Module,
    stands: Mapping[str, Sequence[Stand]],
    batches: Iterable[Batch],
    *,
    shown: Sequence[str] = (),
    logits: bool = False,
) -> Measured:
    """Runs the float model and gives each layer's input to its stand-ins too. The model's results do not change.

    Args:
        stands: layer -> the functions that make its stand-ins.
        shown: layers whose first inputs are kept, at most `SHOWN_TOKENS` rows each.
        logits: whether the output head reads every token, because it has a stand-in.

    Memory:
        In addition to the model: the input, the output and one stand-in of one layer for one batch, and `shown`.
    """
    result = Measured(noise={name: [0.0] * len(made) for name, made in stands.items()})
    layers = {name: model.get_submodule(name) for name in stands}
    padding = Padding(model, layers)
    rows = 0  # the most rows of the batch that one layer has read

    def record(name: str, x: Tensor, y: Tensor) -> None:
        nonlocal rows
        keep = padding.keep(name, x)
        exact = unpadded_rows(y.detach(), keep)
        rows = max(rows, len(exact))
        if name in shown and len(result.shown.get(name, ())) < SHOWN_TOKENS:
            _keep(result.shown, name, layers[name], unpadded_rows(x.detach(), keep))
        result.signal[name] = result.signal.get(name, 0.0) + _power(exact)
        for i, make in enumerate(stands[name]):
            noise = unpadded_rows(make(layers[name])(x), keep).float() - exact.float()
            result.noise[name][i] += _power(noise)

    def forward(batch: Batch) -> Any:
        return run(model, batch, logits=logits)

    with evaluating(model):
        for batch in batches:
            rows = 0
            padding.start(batch, forward)
            with Hooks(model) as hooks:
                for name in stands:
                    hooks.on_call(name, partial(record, name))
                forward(batch)
            result.tokens += count_tokens(batch, rows)
    return result


def _power(x: Tensor) -> float:
    """The sum of squares: float32 within a row and float64 across rows, which keeps about six digits."""
    return float(x.float().square().sum(-1).sum(dtype=torch.float64))


def _keep(shown: dict[str, Tensor], name: str, module: nn.Module, x: Tensor) -> None:
    old = shown.get(name)
    x = x[: SHOWN_TOKENS - (0 if old is None else len(old))].float()
    smooth = pending_smooth(module)
    x = (x if smooth is None else x / smooth).cpu()
    shown[name] = x if old is None else torch.cat([old, x])


# --- stand-ins --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How one layer is quantized.

    The layer's input is divided by `factor` [K] in addition to what the module already divides by (None: nothing).
    `x_absmax` is the calibrated range of the quantized input, which only the static scheme needs. `rotation` is the
    size of the groups of channels that the quantizer rotates, 0 for none.
    """

    alpha: float | None
    scheme: str
    x_absmax: float | None
    rotation: int = 0
    factor: Tensor | None = None


def settings_by_layer(model: nn.Module, config: SmoothQuantConfig) -> SettingsOf:
    """The settings of each layer of a float model by its name: the configuration, or that of an int8 output head."""
    heads = ModelView(model, config.float_pattern, config.quantize_head).int8_heads
    own = {name: config.for_head(name) for name in heads}
    return lambda name: own.get(name, config)


def stand_in(plan: Plan, name: str, config: SmoothQuantConfig) -> Stand:
    """A function that makes the quantized layer with which `quantize_model` would replace a float layer."""

    def make(module: nn.Module) -> nn.Module:
        return quantize_linear(
            name,
            module,
            plan.scheme,
            plan.x_absmax,
            config,
            rotation=plan.rotation,
            smooth=plan.factor,
        )

    # GPTQ takes longer than the products of many windows.
    return cache(make) if config.rounding_of(name) == "gptq" else make


def half_stand_in(make: Stand, *, weights: bool) -> Stand:
    """Like `make`, but with only weights (or only activations) quantized, to measure what each adds to the noise."""

    def half(module: nn.Module) -> nn.Module:
        return _Half(make(module), module, weights=weights)

    return half


class _Half(nn.Module):
    """A quantized layer with only its weights or only its activations rounded. The rest is float32."""

    def __init__(self, quantized: nn.Module, original: nn.Module, *, weights: bool) -> None:
        super().__init__()
        kind = kind_of(quantized)
        assert kind is not None
        exact = weight_of(original).detach().float()
        self.weight = kind.rounded_weight(quantized) if weights else exact
        self.read = Tensor.float if weights else partial(kind.rounded_input, quantized)
        bias = getattr(original, "bias", None)
        self.bias = None if bias is None else bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.read(x), self.weight, self.bias).to(x.dtype)


# --- factors ----------------------------------------------------------------------------------------------------------


def layer_norms(
    config: SmoothQuantConfig, members: Sequence[str], peak: float | None, rotation: int
) -> tuple[str, str]:
    """What the factors of a group balance: the first member decides, as in `smooth_lm`."""
    return config.norms_of(config.scheme_of(peak, members[0]), rotated=rotation > 0)


def layer_factors(
    model: nn.Module,
    members: Sequence[str],
    statistics: ActivationStatistics,
    alpha: float | None,
    norms: tuple[str, str],
    config: SmoothQuantConfig,
) -> Tensor:
    """The s [K] float32 that `smooth_lm` uses for linears of the unsmoothed model. All ones if alpha is None."""
    if alpha is None:
        return torch.ones_like(statistics.absmax[members[0]])
    return group_factors(model, Group(tuple(members)), statistics, alpha, norms, config)
