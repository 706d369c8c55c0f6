"""Names of the quantization schemes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

ACTIVATION_SCHEMES = ("per_token", "per_tensor", "static")


WEIGHT_GRANULARITIES = ("channel", "tensor")
