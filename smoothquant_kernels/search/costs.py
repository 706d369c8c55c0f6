"""What each layer of a smoothed model costs at its output once it is int8, and what division at run time would cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.record import LayerRecord, ModelRecord, Reason
from smoothquant_kernels.modeling.run import Batch
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.search.sensitivity import recordings
from smoothquant_kernels.smoothing.convert import quantize_linear
from smoothquant_kernels.smoothing.factors import group_balance, group_factors
from smoothquant_kernels.smoothing.statistics import ActivationStatistics

_BYTES = 1 << 29  # of recorded inputs and gradients at a time


@dataclass(frozen=True)
class LayerCost:
    """The KL divergence that the int8 error of a layer causes at the model's output, in nats per prediction.

    Attributes:
        kl: as the layer is quantized.
        divided: if its input were divided by smoothing factors at run time; None for a layer that is smoothed, or that
            would not be.
    """

    kl: float
    divided: float | None = None


def layer_costs(
    model: nn.Module,
    statistics: ActivationStatistics,
    batches: Sequence[Batch],
    config: SmoothQuantConfig,
) -> dict[str, LayerCost]:
    """Estimates the cost of every layer alone, by gradients (docs/guides/search.md). The costs about add up.

    Args:
        model: the result of `smooth_lm`; left unchanged.
        statistics: what calibration measured on the model before.
        batches: tokens to estimate on; some hundred are enough.
        config: the settings that the model was smoothed with.

    Returns:
        name -> cost, without layers that these tokens do not reach.
    """
    layers = ModelRecord.of(model).described
    groups = [Group(g) for g in dict.fromkeys(layer.group for layer in layers.values()) if g]
    found: dict[str, LayerCost] = {}
    for part, recording in recordings(model, groups, batches, _BYTES):
        with torch.no_grad():
            for group in part:
                x = recording.x[group.linears[0]]
                for name in group.linears:
                    linear = model.get_submodule(name)
                    y = F.linear(x, weight_of(linear), getattr(linear, "bias", None))
                    made = _ways(model, statistics, layers[name], config)
                    kl = [recording.cost(name, way(x).float() - y.float()) for way in made]
                    found[name] = LayerCost(*kl)
                recording.forget(group)
    return found


def _ways(
    model: nn.Module,
    statistics: ActivationStatistics,
    layer: LayerRecord,
    config: SmoothQuantConfig,
) -> Iterator[nn.Module]:
    """The int8 layer as it will be, and, if it lacks factors that cannot be folded, the one that divides by them."""
    name, linear, group = layer.name, model.get_submodule(layer.name), Group((layer.name,))
    scheme, rotation = config.scheme_of(layer.x_peak, name), layer.rotation
    yield quantize_linear(name, linear, scheme, layer.x_absmax, config, rotation=rotation)
    if Reason.of(layer.reason) is Reason.NOT_DIVIDED:
        balance = group_balance(group, layer.x_peak, config, rotated=rotation > 0)
        smooth = group_factors(model, group, statistics, *balance, config)
        largest = statistics.range_of(name, smooth, rotation)
        yield quantize_linear(
            name, linear, scheme, largest, config, rotation=rotation, smooth=smooth
        )
