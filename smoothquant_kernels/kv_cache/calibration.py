"""What calibration finds out about keys and values, and the factors of an int8 cache that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoothquant_kernels.reference import QMAX, smoothing_factors

SCHEMES = ("per_token", "static")
#: The attribute of a model that keeps its calibration. Checkpoints store it.
ATTRIBUTE = "smoothquant_kv_calibration"
#: Static scales leave so much room above the largest value of the calibration data.
ROOM = 1.1


@dataclass(frozen=True)
class LayerMaxima:
    """The largest magnitudes of one attention layer, after the rotary embedding: [H, D] float32, on the CPU.

    H counts heads of keys and values; `q` is the maximum over the query heads that read the same one.
    """

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class KVCalibration:
    """The maxima of every layer that caches keys and values, by `layer_idx`.

    Attributes:
        layers: layer_idx -> its maxima.
        tokens: how many tokens were seen.
    """

    layers: dict[int, LayerMaxima]
    tokens: int

    def factors(
        self, layer: int, scheme: str, alpha: float | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(k_smooth, v_smooth) of `ops.decode_attention_s8` for a layer, each [H, D] float32 or None.

        Args:
            layer: the `layer_idx`.
            scheme: ``"static"``: the static scales; ``"per_token"``: smoothing factors of the keys.
            alpha: the migration strength from keys to queries; static scales need none, because there the query takes
                over the whole difference between channels.
        """
        maxima = self.layers[layer]
        if scheme == "static":
            return static_scales(maxima.k), static_scales(maxima.v)
        if alpha is None:
            return None, None
        return smoothing_factors(maxima.k, maxima.q, alpha), None


def static_scales(absmax: Tensor) -> Tensor:
    """absmax * ROOM / 127; 1 for a channel that was always zero, which then rounds small values to zero."""
    return torch.where(absmax > 0, absmax * (ROOM / QMAX), torch.ones_like(absmax))


def calibration_of(model: nn.Module) -> KVCalibration | None:
    """`model.smoothquant_kv_calibration`; None if the model was not calibrated."""
    found: KVCalibration | None = vars(model).get(ATTRIBUTE)
    return found


def attach_calibration(model: nn.Module, calibration: KVCalibration) -> None:
    """Makes this the calibration of a model, for `Int8KVCache` and for checkpoints."""
    vars(model)[ATTRIBUTE] = calibration
