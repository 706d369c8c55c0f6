"""Which input channels of a layer are outliers, and the range of the others: from calibration to quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.nn.float_linear import MAXIMA
from smoothquant_kernels.smoothing.rows import rotated_maxima
from smoothquant_kernels.smoothing.statistics import ActivationStatistics


@dataclass(frozen=True)
class Maxima:
    """The largest inputs of a layer by channel, which `smooth_lm` leaves on the float linear for static outliers.

    Attributes:
        absmax: [K] float32, before smoothing.
        smooth: [K] the factors that the layer's input is divided by, folded or pending; None for none.
        rows: [tokens, K] the tokens that calibration has kept, before smoothing, if a static range may need them.
    """

    absmax: Tensor
    smooth: Tensor | None = None
    rows: Tensor | None = None

    def columns(self, threshold: float, more: Tensor | None = None) -> Tensor:
        """[C] int64: the channels whose smoothed maximum, divided by `more` [K] too, reaches the threshold."""
        largest = self.absmax * self._inverse(more)
        return (largest >= threshold).nonzero().squeeze(1)

    def range_without(self, columns: Tensor, rotation: int, more: Tensor | None = None) -> float:
        """The largest |value| of the smoothed and rotated input with zeros in the columns.

        Without a rotation it is that of all tokens. With one it is that of the kept tokens: the first ones, and those
        whose rotated values were the largest with the columns. Larger values of other tokens saturate.
        """
        inverse = self._inverse(more).index_fill(0, columns, 0.0)
        if not rotation:
            return float((self.absmax * inverse).max())
        assert self.rows is not None
        return float(rotated_maxima(self.rows.to(inverse.device), inverse, rotation).max())

    def _inverse(self, more: Tensor | None) -> Tensor:
        result = torch.ones_like(self.absmax)
        for smooth in (self.smooth, more):
            if smooth is not None:
                result = result * (1.0 / smooth.to(result.device))
        return result


def maxima_of(linear: nn.Module) -> Maxima | None:
    """What `smooth_lm` leaves on a linear for static outliers; None if none were asked for or it was not reached."""
    found: Maxima | None = linear.__dict__.get(MAXIMA)
    return found


def maxima_in(
    statistics: ActivationStatistics, name: str, smooth: Tensor | None, config: SmoothQuantConfig
) -> Maxima | None:
    """What to leave on the linear `name`; None unless its outliers are static and calibration reached it."""
    if name not in statistics.absmax or config.outliers_of(name) != "static":
        return None
    kept = statistics.rows.get(name)
    # Any scheme may turn static when the layer is quantized, but only a rotated range needs tokens.
    rotated = config.rotation_of(statistics.absmax[name].numel(), name) > 0
    rows = kept.both() if kept is not None and rotated and may_be_static(config) else None
    return Maxima(statistics.absmax[name], smooth, rows)


def may_be_static(config: SmoothQuantConfig) -> bool:
    """Whether a layer may have a static scale."""
    return "static" in (config.activation_scheme, *config.schemes.values())


def check_maxima(
    linears: Mapping[str, nn.Module],
    own: Mapping[str, SmoothQuantConfig],
    reached: Mapping[str, bool],
    schemes: Mapping[str, str],
    rotations: Mapping[str, int],
) -> None:
    """Raises SmoothQuantError unless calibration has left what the static outliers of every layer need.

    Args:
        linears: name -> float layer.
        own: name -> the layer's settings.
        reached: name -> whether calibration saw the layer's input.
        schemes, rotations: name -> the layer's activation scheme and the size of the groups that it rotates.
    """
    wanted = [n for n in linears if own[n].outliers_of(n) == "static"]
    lacking = [n for n in wanted if reached[n] and maxima_of(linears[n]) is None]
    if lacking or (wanted and not any(reached.values())):
        raise SmoothQuantError(
            f"outliers='static' needs the maxima of the channels, which calibration keeps for it, and "
            f"{(lacking or wanted)[0]} has none: run smooth_lm with the same `outliers` and `outlier_layers` first "
            "(smooth=False only measures), or pass outliers='dynamic'."
        )
    for name in wanted:
        found = maxima_of(linears[name])
        needs = schemes[name] == "static" and rotations[name] > 0
        if found is not None and needs and found.rows is None:
            raise SmoothQuantError(
                f"the static range of {name} without its outlier columns comes from tokens that calibration keeps: run "
                "smooth_lm with the same activation scheme and rotation, on statistics of this release."
            )
