"""How the inputs of the two products of int8 experts are quantized."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Input:
    """How one of the two products quantizes its input.

    Attributes:
        scheme: as `activation_scheme` of `W8A8Linear`.
        rotation: the size of the groups of channels that the quantizer rotates; 0 for none.
        smooth: [K] factors for all experts, or [E, K] for each; None for none.
        x_scale: the static scale, > 0, for the scheme ``"static"`` only.
    """

    scheme: str = "per_token"
    rotation: int = 0
    smooth: Tensor | None = None
    x_scale: float | None = None
