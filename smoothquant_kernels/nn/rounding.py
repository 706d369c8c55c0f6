"""Rounding a weight to int8: to the nearest values, or by GPTQ.

GPTQ rounds so that the errors of the columns cancel on the inputs that calibration saw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoothquant_kernels import reference
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.float_linear import in_parts
from smoothquant_kernels.ops.rotate import rotated, rotated_weight

#: The attribute of a float linear with its `Moments`. A plain one, because checkpoints would include a buffer.
MOMENTS = "_smoothquant_moments"
#: What is added to the diagonal of the moments, as a part of its mean. The paper has 0.01, for 3 and 4 bits. At 8 bits
#: that fits the calibration text too closely: other text diverges more than with the nearest values
#: (docs/reference/accuracy.md). With 1.0 it does not, and text like the calibration's gains as much.
DAMPING = 1.0
#: Columns whose errors reach the columns after the block in one product. They are a group of a 4-bit weight as well.
_BLOCK = reference.W4_GROUP
#: Rounds a column [N]: the stored values, and the weights that these represent.
Column = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Moments:
    """X^T X of a layer's input over the tokens of the calibration, before smoothing.

    Attributes:
        raw: [K, K] float32.
        smooth: [K] the factors that the layer's input is divided by, folded or pending; None for none.
    """

    raw: Tensor
    smooth: Tensor | None = None

    def quantized(
        self, rotation: int, more: Tensor | None = None, without: Tensor | None = None
    ) -> Tensor:
        """[K, K] float32: those of the input as it is quantized, if it is divided by `more` [K] too, and rotated.

        The channels `without` [C] are zeros before the rotation.
        """
        result = self.raw
        for smooth in (self.smooth, more):
            if smooth is not None:
                inverse = 1.0 / smooth.to(result.device)
                result = result * inverse * inverse[:, None]
        if without is not None:
            at = without.to(result.device)
            result = result.index_fill(0, at, 0.0).index_fill(1, at, 0.0)
        return rotated(rotated(result, rotation).t().contiguous(), rotation)


def moments_of(linear: nn.Module) -> Moments | None:
    """What `smooth_lm` leaves on a linear for GPTQ; None for a layer that calibration did not reach."""
    found: Moments | None = linear.__dict__.get(MOMENTS)
    return found


def int8_weight(
    weight: Tensor,
    smooth: Tensor | None,
    rotation: int,
    granularity: str,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Smooths, rotates and quantizes a weight [N, K] of any float type, a large one in parts.

    Args:
        smooth: [K] float32; None for no smoothing.
        rotation: the size of the groups of channels to rotate; 0 for none.
        granularity: ``"channel"`` or ``"tensor"``.
        moments: as in `round_weight`; None rounds to the nearest values.

    Returns:
        w_q [N, K] int8 and w_scale [N] or [1] float32.

    Raises:
        SmoothQuantError: the result is too large for float32, or the moments have another shape or are not finite.
    """
    if moments is None:
        parts = in_parts(weight) if granularity == "channel" else (weight,)
        made = [
            reference.quantize_weight(prepared_weight(part, smooth, rotation), granularity)
            for part in parts
        ]
        w_q, w_scale = (torch.cat(tensors) for tensors in zip(*made, strict=True))
        return w_q, w_scale
    check_moments(moments, weight.shape[1])
    w = prepared_weight(weight, smooth, rotation)
    return round_weight(w, moments.to(weight.device), granularity)


def prepared_weight(part: Tensor, smooth: Tensor | None, rotation: int) -> Tensor:
    """Some rows [n, K] of a weight as they are rounded: float32, smoothed and rotated.

    Raises:
        SmoothQuantError: the result is too large for float32.
    """
    w = part.float() if smooth is None else part.float() * smooth
    w = rotated_weight(w, rotation)
    if not bool(w.isfinite().all()):
        raise SmoothQuantError("the weight (times smooth, rotated) is too large for float32.")
    return w


def check_moments(moments: Tensor, k: int) -> None:
    """Raises SmoothQuantError unless the moments of K channels are finite and have their shape."""
    if moments.shape != (k, k) or not bool(moments.isfinite().all()):
        finite = "finite" if bool(moments.isfinite().all()) else "not all finite"
        raise SmoothQuantError(
            f"moments must be finite and of shape [{k}, {k}]; got {list(moments.shape)}, {finite}."
        )


def round_weight(
    w: Tensor, moments: Tensor, granularity: str = "channel", damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Quantizes a weight with the scales of `reference.quantize_weight`, and int8 values by GPTQ.

    Column by column, the rounding error moves to the columns that are not rounded yet, so that it changes the products
    with the calibration's inputs least.

    Args:
        w: [N, K] float32, smoothed and rotated.
        moments: [K, K] float32, X^T X of the input X [tokens, K] as it is quantized.
        granularity: ``"channel"`` or ``"tensor"``.
        damping: see `DAMPING`. More trusts the calibration less; very much is rounding to the nearest values.

    Returns:
        w_q [N, K] int8 and w_scale [N] or [1] float32.

    Equivalent to:
        H = moments + damping * moments.diagonal().mean() * torch.eye(K)
        for k in range(K):
            w_q[:, k] = (w[:, k] / w_scale).round().clamp(-127, 127)
            error = w[:, k] - w_q[:, k] * w_scale
            w[:, k + 1 :] += error[:, None] * inverse(H[k:, k:])[0, 1:] / inverse(H[k:, k:])[0, 0]

    Source: GPTQ (Frantar et al., 2022), section 3.3 and algorithm 1.
    """
    with torch.autocast(w.device.type, enabled=False):
        return _round(w, moments, granularity, damping)


def _round(w: Tensor, moments: Tensor, granularity: str, damping: float) -> tuple[Tensor, Tensor]:
    nearest, w_scale = reference.quantize_weight(w, granularity)
    upper = inverse_factor(moments, damping)
    if upper is None:
        return nearest, w_scale
    inverse = reference.inverse_scale(w_scale).expand(len(w))
    scale = w_scale.expand(len(w))

    def column(values: Tensor) -> tuple[Tensor, Tensor]:
        rounded = (values * inverse).round().clamp(-reference.QMAX, reference.QMAX)
        return rounded, rounded * scale

    return compensated(w, upper, lambda block, start: column).to(torch.int8), w_scale


def compensated(w: Tensor, upper: Tensor, rounder: Callable[[Tensor, int], Column]) -> Tensor:
    """Rounds a weight [N, K] column by column, and moves the error of each to the columns after it.

    Args:
        upper: `inverse_factor` of the moments.
        rounder: for a block of columns [N, at most 128] that have all errors of earlier blocks, and its first column:
            the function that rounds each of its columns.

    Returns:
        [N, K] float32: the stored values.
    """
    w = w.clone()
    result = torch.empty_like(w)
    k = w.shape[1]
    for start in range(0, k, _BLOCK):
        end = min(start + _BLOCK, k)
        own = upper[start:end, start:end]
        column = rounder(w[:, start:end], start)
        block = w[:, start:end].t().contiguous()  # its columns as rows, which are read much faster
        errors, stored = torch.empty_like(block), torch.empty_like(block)
        for i in range(end - start):
            stored[i], value = column(block[i])
            errors[i] = (block[i] - value) / own[i, i]
            block[i + 1 :] -= own[i, i + 1 :, None] * errors[i]
        result[:, start:end] = stored.t()
        w[:, end:] -= errors.t() @ upper[start:end, end:]
    return result


def inverse_factor(moments: Tensor, damping: float) -> Tensor | None:
    """The upper triangular U with U^T U = inverse(moments + damping); None if the input was always zero."""
    mean = moments.diagonal().mean()
    if not bool(mean > 0):
        return None
    identity = torch.eye(len(moments), device=moments.device, dtype=moments.dtype)
    while damping < 1e6:
        lower, failed = torch.linalg.cholesky_ex(moments / mean + damping * identity)
        if not bool(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                return upper
        damping = max(10.0 * damping, 1e-6)  # with little of it, float32 sums may be indefinite
    return None
