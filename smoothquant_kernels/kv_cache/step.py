"""What a cache hands to attention: the tokens of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from smoothquant_kernels.kv_cache.layers import Int8Layer

#: The name of the attention implementation.
ATTENTION = "int8_kv"
#: The keyword argument with which a `Step` goes from `Cache.update` to the attention function.
STEP = "int8_kv"


class Attention:
    """Which attention implementation a model uses, asked at each step. Copies of a cache ask the same model."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def is_int8(self) -> bool:
        return bool(self.config._attn_implementation == ATTENTION)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attention:
        return self


@dataclass
class Step:
    """New tokens of a layer, after they were stored.

    Attributes:
        layer: where they were stored.
        k, v: [B, H, T, D], as the model computed them.
        empty: whether the layer had no tokens before.
        tokens: those that the new ones see, and themselves: the columns of the mask. None if they are not all stored.
        past: the float keys and values before them, where they are not stored any more.
        lengths: how many of `tokens` there are, if not all.
        ring: as in `ops.decode_attention_s8`.
        first: the column of the first new token.
    """

    layer: Int8Layer
    k: Tensor
    v: Tensor
    empty: bool
    tokens: Any
    past: tuple[Tensor, Tensor] | None = None
    lengths: Tensor | None = None
    ring: bool = False
    first: int | Tensor = 0

    @property
    def count(self) -> int:
        return self.k.shape[2]

    def full(self) -> tuple[Tensor, Tensor]:
        """The float keys and values of all columns of the mask."""
        return self.layer.full(self)
