"""A quantized layer that keeps its weight when a library ties that of the float layer again."""

from __future__ import annotations

from typing import Any

from torch import nn

_APART = "_smoothquant_apart"  # a plain attribute, which copies keep


class OwnWeight(nn.Module):
    """Base of quantized layers.

    An output head often shares its float weight with the embedding, and transformers ties the two again by assigning
    the embedding's parameter (`tie_weights`, `from_pretrained`). A head that is int8 has a weight of its own.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            isinstance(value, nn.Parameter)
            and self.__dict__.get(_APART)
            and self._is_tie(name, value)
        ):
            return
        super().__setattr__(name, value)

    def _is_tie(self, name: str, value: nn.Parameter) -> bool:
        return name in ("weight", "bias") and value.shape == getattr(self, name).shape


def keep_apart(layer: nn.Module) -> None:
    """Makes a quantized layer ignore the assignment of a parameter as its weight or bias, if the shape is its own."""
    layer.__dict__[_APART] = True
