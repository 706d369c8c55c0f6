"""Whether smoothing helps a group of linears: its int8 error on the sample, with factors and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import reference
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.groups import Group
from smoothquant_kernels.linear import weight_of
from smoothquant_kernels.modules import Batch, Hooks, run, token_mask, unpadded_rows


@dataclass(frozen=True)
class Int8Error:
    """Relative error of a group's outputs in int8, the root mean square over the sample's tokens."""

    naive: float
    smoothed: float

    @property
    def helps(self) -> bool:
        return not self.naive < self.smoothed


def static_scale(absmax: float, clip: float) -> float:
    """The scale whose int8 range covers `clip` times the calibrated range."""
    return max(clip * absmax / reference.QMAX, reference.MIN_SCALE)


def int8_errors(
    model: nn.Module,
    factors: Mapping[Group, Tensor],
    absmax: Mapping[str, Tensor],
    peaks: Mapping[str, float],
    config: SmoothQuantConfig,
    batch: Batch,
) -> dict[Group, Int8Error]:
    """Runs the float model once on the sample and tries every group that it reaches, in the configured scheme.

    Each token counts alike, whatever the size of its output: the tokens after a massive one matter as much as it does.

    Args:
        factors: s [K] of each group.
        absmax: calibrated maxima of the inputs, not smoothed.
        batch: the calibration sample.
    """
    squares: dict[Group, list[Tensor]] = {}
    mask = token_mask(batch)

    def measure(group: Group, x: Tensor) -> None:
        rows = unpadded_rows(x.detach(), mask).float()
        for name in group.linears:
            weight = weight_of(model.get_submodule(name)).detach().float()
            exact = F.linear(rows, weight)
            scale = exact.square().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
            scheme, clip = config.scheme_of(peaks[group.linears[0]], name), config.clip_of(name)
            found = []
            for s in (None, factors[group]):
                y = _int8_product(rows, weight, s, absmax[group.linears[0]], scheme, clip, config)
                found.append(((y - exact).square().sum(1) / scale).mean())
            squares.setdefault(group, []).append(torch.stack(found))

    with Hooks(model) as hooks:
        for group in factors:
            hooks.on_input(group.linears[0], lambda x, g=group: measure(g, x))  # type: ignore[misc]
        run(model, batch)
    means = {group: torch.stack(values).mean(0).sqrt() for group, values in squares.items()}
    return {group: Int8Error(float(m[0]), float(m[1])) for group, m in means.items()}


def _int8_product(
    rows: Tensor,
    weight: Tensor,
    smooth: Tensor | None,
    absmax: Tensor,
    scheme: str,
    clip: float,
    config: SmoothQuantConfig,
) -> Tensor:
    """rows @ weight.T as a `W8A8Linear` of this scheme computes it; in float32, so that it needs no kernels."""
    inv_smooth = None
    if smooth is not None:
        weight, absmax, inv_smooth = weight * smooth, absmax / smooth, 1.0 / smooth
    scale = None
    if scheme == "static":
        scale = rows.new_tensor([static_scale(float(absmax.max()), clip)])
    granularity = "tensor" if scheme == "per_tensor" else "token"
    x_q, x_scale = reference.quantize(rows, inv_smooth, scale=scale, granularity=granularity)
    w_q, w_scale = reference.quantize_weight(weight, config.weight_granularity)
    # float32 holds these sums to some 1e-7, which is enough to judge by
    return F.linear(x_q.float(), w_q.float()) * w_scale * x_scale[:, None]
