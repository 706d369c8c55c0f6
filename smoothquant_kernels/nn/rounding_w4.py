"""Rounding a weight to 4 bits: integer steps and offsets of groups of channels, found by search, and by GPTQ.

The int8 weight of a group is q * step + offset (`reference.w4`). A channel's scale makes its largest magnitude `TOP`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smoothquant_kernels import reference
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.float_linear import in_parts
from smoothquant_kernels.nn.rounding import (
    Column,
    check_moments,
    compensated,
    inverse_factor,
    prepared_weight,
)
from smoothquant_kernels.reference import W4_GROUP, W4_MAX

#: The int8 weight of a channel's largest magnitude. Any group then spans at most 224, which 15 steps of at most 15
#: cover. A larger one would need steps beyond `W4_MAX`.
TOP = 112
#: See `rounding.DAMPING`. At 4 bits the errors are so large that what GPTQ learns from the calibration text holds for
#: other text, too. With the paper's 0.01 other text still diverges more (docs/guides/w4a8.md).
DAMPING = 0.1
#: Each group tries the smallest step that covers its range and the next smaller ones, which clip it,
_STEPS = 4
#: and for each step offsets that move the covered range by these parts of a step.
_SHIFTS = (0.0, -0.25, 0.25, -0.5, 0.5)
#: Elements that one pass of the search takes, so that its intermediate results stay in the cache.
_AT_ONCE = 1 << 16
#: The narrowest range counts as covered if rounding errors alone put it beyond a whole number of steps.
_SLACK = 1e-4


class Grid(NamedTuple):
    """The int8 values that the groups of a weight can take: step and offset [N, G, 1] float32, whole numbers."""

    step: Tensor
    offset: Tensor

    def nearest(self, w: Tensor) -> Tensor:
        """The q that represents w [N, G, 128] best: 0 to 15, float32."""
        return ((w - self.offset) / self.step).round_().clamp_(0, W4_MAX)


class W4Weight(NamedTuple):
    """The weight of a `W4A8Linear`: w_q4 [N, 64 G] uint8, w_group [G, N, 2] int8 and w_scale [N] float32."""

    w_q4: Tensor
    w_group: Tensor
    w_scale: Tensor


def int4_weight(
    weight: Tensor, smooth: Tensor | None, rotation: int, moments: Tensor | None = None
) -> W4Weight:
    """Smooths, rotates and quantizes a weight [N, K] of any float type to 4 bits, a large one in parts.

    Args:
        smooth, rotation: as in `rounding.int8_weight`.
        moments: as in `round_w4`; None rounds to the nearest values. A vector [K] of mean squares of the input's
            channels only weighs the errors.

    Raises:
        SmoothQuantError: as in `rounding.int8_weight`.
    """
    k = weight.shape[1]
    importance = None
    if moments is not None:
        moments = moments.to(weight.device)
        if moments.dim() != 1:
            check_moments(moments, k)
            return round_w4(prepared_weight(weight, smooth, rotation), moments)
        _check_squares(moments, k)
        importance = _relative(moments)
    made = []
    for part in in_parts(weight):
        w = prepared_weight(part, smooth, rotation)
        w_scale, inverse = scales_of(w)
        made.append((*_nearest(w * inverse[:, None], importance), w_scale))
    q, step, offset, w_scale = (torch.cat(parts) for parts in zip(*made, strict=True))
    return _packed(q, step, offset, w_scale)


def rounded_w4(w: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 weight [N, K] as float32, and w_scale [N], of a prepared weight, by a shorter search.

    It serves comparisons of many candidates: errors are some percent larger than those of `int4_weight`, for all alike.
    """
    w_scale, inverse = scales_of(w)
    q, step, offset = _nearest(w * inverse[:, None], None, shifts=(0.0,))
    return (q * step + offset).flatten(1)[:, : w.shape[1]], w_scale


def round_w4(w: Tensor, moments: Tensor, damping: float = DAMPING) -> W4Weight:
    """Quantizes a weight to 4 bits by GPTQ: like `rounding.round_weight`, with a grid that each group of 128 chooses.

    A group chooses its step and offset when its turn comes, for the weight with all errors that moved to it so far.

    Args:
        w: [N, K] float32, smoothed and rotated.
        moments: [K, K] float32, X^T X of the input X [tokens, K] as it is quantized.
        damping: see `DAMPING`.

    Source: GPTQ (Frantar et al., 2022), section 3.3 and algorithm 1.
    """
    with torch.autocast(w.device.type, enabled=False):
        w_scale, inverse = scales_of(w)
        units = w * inverse[:, None]
        upper = inverse_factor(moments, damping)
        if upper is None:
            return _packed(*_nearest(units, None), w_scale)
        importance = upper.diagonal().square().reciprocal()
        grids: list[Grid] = []

        def rounder(block: Tensor, start: int) -> Column:
            grid = best_grid(*_grouped(block, importance[start : start + block.shape[1]]))
            grids.append(grid)
            step, offset = grid.step[:, 0, 0], grid.offset[:, 0, 0]

            def column(values: Tensor) -> tuple[Tensor, Tensor]:
                q = ((values - offset) / step).round().clamp(0, W4_MAX)
                return q, q * step + offset

            return column

        q = compensated(units, upper, rounder)
        step, offset = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
        return _packed(_grouped(q, None)[0], step, offset, w_scale)


def scales_of(w: Tensor) -> tuple[Tensor, Tensor]:
    """w_scale [N] of a weight [N, K], and its inverse; both 0 for a channel of zeros or subnormal numbers."""
    absmax = w.abs().amax(1)
    scale = absmax / torch.full_like(
        absmax, TOP
    )  # not a Python number: see reference.scale_from_absmax
    scale = torch.where(scale < reference.MIN_SCALE, torch.zeros_like(scale), scale)
    return scale, reference.inverse_scale(scale)


def best_grid(w: Tensor, importance: Tensor, shifts: Sequence[float] = _SHIFTS) -> Grid:
    """The step and offset of each group with the smallest sum of squared errors, among a few.

    Args:
        w: [N, G, 128] float32, the weight over its channel's scale.
        importance: [G, 128] float32, the weight of each channel's squared error.
        shifts: parts of a step to try.
    """
    low, high = w.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(min=-128.0), high.clamp(max=127.0)
    widest = ((high - low) / W4_MAX - _SLACK).ceil_().clamp_(1, W4_MAX)
    middle = (low + high) / 2
    best, least = Grid(widest, middle), torch.full_like(widest, torch.inf)
    for less in range(_STEPS):
        step = (widest - less).clamp_(min=1)
        for shift in shifts:
            offset = (middle + (shift - W4_MAX / 2) * step).round_().clamp_(min=-128)
            grid = Grid(step, torch.minimum(offset, 127 - W4_MAX * step))
            error = grid.nearest(w).mul_(grid.step).add_(grid.offset).sub_(w).square_()
            found = error.mul_(importance).sum(-1, keepdim=True)
            better = found < least
            least = torch.where(better, found, least)
            best = Grid(*(torch.where(better, a, b) for a, b in zip(grid, best, strict=True)))
    return best


def _nearest(
    units: Tensor, importance: Tensor | None, shifts: Sequence[float] = _SHIFTS
) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, G, 128], step and offset [N, G, 1] of the best grids, in parts that stay in the cache."""
    whole, importance = _grouped(units, importance)
    made = []
    for part in whole.split(max(1, _AT_ONCE // whole[0].numel())):
        grid = best_grid(part, importance, shifts)
        made.append((grid.nearest(part), *grid))
    q, step, offset = (torch.cat(parts) for parts in zip(*made, strict=True))
    return q, step, offset


def _grouped(w: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """w [N, K] as [N, G, 128], filled up with its last column, which then has no importance [G, 128]."""
    n, k = w.shape
    if importance is None:
        importance = w.new_ones(k)
    if missing := -k % W4_GROUP:
        w = torch.cat([w, w[:, -1:].expand(n, missing)], 1)
        importance = torch.cat([importance, importance.new_zeros(missing)])
    return w.view(n, -1, W4_GROUP), importance.view(-1, W4_GROUP)


def _relative(squares: Tensor) -> Tensor | None:
    """Mean squares over their mean; None if all are 0. A channel that was always 0 keeps a little importance."""
    mean = squares.mean()
    return (squares / mean).clamp(min=1e-6) if bool(mean > 0) else None


def _check_squares(squares: Tensor, k: int) -> None:
    if squares.shape != (k,) or not bool((squares.isfinite() & (squares >= 0)).all()):
        wrong = "negative or not all finite" if squares.shape == (k,) else "of another shape"
        raise SmoothQuantError(
            f"moments must be finite and of shape [{k}, {k}] or [{k}]; got {list(squares.shape)}, {wrong}."
        )


def _packed(q: Tensor, step: Tensor, offset: Tensor, w_scale: Tensor) -> W4Weight:
    group = torch.cat([step, offset], -1).to(torch.int8).transpose(0, 1).contiguous()
    return W4Weight(reference.pack_w4(q.flatten(1)), group, w_scale)
