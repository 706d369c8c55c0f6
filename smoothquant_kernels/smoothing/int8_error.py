"""The errors of a group of linears on the sample with several factors: whether smoothing helps, and which ones most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import reference
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.run import Batch, unpadded_rows
from smoothquant_kernels.nn.float_linear import in_parts, weight_of
from smoothquant_kernels.nn.rounding_w4 import rounded_w4
from smoothquant_kernels.ops.rotate import rotated_weight
from smoothquant_kernels.smoothing.padding import Padding

#: On so few tokens, errors within this ratio of each other are a tie. A tie keeps smoothing, the default everywhere.
_TIE = 1.05


@dataclass(frozen=True)
class Int8Error:
    """Relative int8 errors of a group's outputs on the sample: the norm of the error over the norm of the outputs."""

    naive: float
    smoothed: float

    @property
    def helps(self) -> bool:
        return not self.naive * _TIE < self.smoothed


@dataclass(frozen=True)
class InputSettings:
    """How a layer's input is quantized: scheme, scale if that is static, and rotation; and the layer's format."""

    scheme: str
    scale: float
    rotation: int
    format: str = "w8a8"


def static_scale(absmax: float, clip: float) -> float:
    """Returns the scale whose int8 range covers `clip` times the calibrated range."""
    return max(clip * absmax / reference.QMAX, reference.MIN_SCALE)


def int8_errors(
    model: nn.Module,
    factors: Mapping[Group, Tensor],
    settings_of: Callable[[str, Tensor | None], InputSettings],
    batch: Batch,
    run_sample: Callable[[Batch], Any],
    weight_granularity: str,
) -> dict[Group, Int8Error]:
    """Returns the errors of every group that the sample reaches, without its factors and with them.

    The arguments are those of `output_errors`, with one candidate for each group.
    """
    both = {group: (None, s) for group, s in factors.items()}
    found = output_errors(model, both, settings_of, batch, run_sample, weight_granularity)
    return {group: Int8Error(*errors) for group, errors in found.items()}


def output_errors(
    model: nn.Module,
    candidates: Mapping[Group, Sequence[Tensor | None]],
    settings_of: Callable[[str, Tensor | None], InputSettings],
    batch: Batch,
    run_sample: Callable[[Batch], Any],
    weight_granularity: str,
) -> dict[Group, list[float]]:
    """Returns the relative error of every group that the sample reaches, by candidate, in the configured scheme.

    A token counts by the absolute size of its error, as it does in the residual stream that most outputs are added to.
    By relative errors per token, a layer with massive activations would seem better without smoothing, and the model
    would get worse.

    Args:
        candidates: the factors s [K] to try for each group; None for none.
        settings_of: the settings of a layer, from its name and its factors, or None without.
        batch: the calibration sample. Its padding does not count.
        run_sample: runs the float model on the sample.
        weight_granularity: that of layers of the format ``"w8a8"``.
    """
    squares: dict[Group, Tensor] = {}
    padding = Padding(model, {g.linears[0]: model.get_submodule(g.linears[0]) for g in candidates})
    padding.start(batch, run_sample)

    def parts_of(name: str) -> tuple[Tensor, ...]:
        weight = weight_of(model.get_submodule(name)).detach()
        return in_parts(weight) if weight_granularity == "channel" else (weight,)

    def measure(group: Group, x: Tensor) -> None:
        rows = unpadded_rows(x.detach(), padding.keep(group.linears[0], x)).float()
        for name, part in ((n, part) for n in group.linears for part in parts_of(n)):
            weight = part.float()
            exact = F.linear(rows, weight)
            products = (
                _product(rows, weight, s, settings_of(name, s), weight_granularity)
                for s in candidates[group]
            )
            found = torch.stack(
                [y.double().square().sum() for y in (*(p - exact for p in products), exact)]
            )
            squares[group] = squares.get(group, torch.zeros_like(found)) + found

    with Hooks(model) as hooks:
        for group in candidates:
            hooks.on_input(group.linears[0], partial(measure, group))
        run_sample(batch)
    tiny = torch.finfo(torch.float64).tiny
    return {
        group: (found[:-1] / found[-1].clamp_min(tiny)).sqrt().tolist()
        for group, found in squares.items()
    }


def _product(
    rows: Tensor,
    weight: Tensor,
    smooth: Tensor | None,
    settings: InputSettings,
    weight_granularity: str,
) -> Tensor:
    """Returns rows @ weight.T as a quantized layer of this scheme computes it, in float32, so it needs no kernels."""
    inv_smooth = None
    if smooth is not None:
        weight, inv_smooth = weight * smooth, 1.0 / smooth
    scale = rows.new_tensor([settings.scale]) if settings.scheme == "static" else None
    granularity = "tensor" if settings.scheme == "per_tensor" else "token"
    x_q, x_scale = reference.quantize(
        rows, inv_smooth, scale, granularity, rotation=settings.rotation
    )
    weight = rotated_weight(weight, settings.rotation)
    if settings.format == "w4a8":
        w_q, w_scale = rounded_w4(weight)
    else:
        w_q, w_scale = reference.quantize_weight(weight, weight_granularity)
    # float32 sums are accurate to about 1e-7, which is enough for a comparison.
    return F.linear(x_q.float(), w_q.float()) * w_scale * x_scale[:, None]
