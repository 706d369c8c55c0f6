"""Layers of an int8 cache and their twins in transformers, and a model's attention around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils

from smoothquant_kernels.kv_cache.attention import int8_attention
from smoothquant_kernels.kv_cache.layers import Int8DynamicLayer, Int8Layer, Int8SlidingLayer
from smoothquant_kernels.kv_cache.static_layers import Int8StaticLayer, Int8StaticSlidingLayer
from smoothquant_kernels.kv_cache.step import ATTENTION, Attention
from smoothquant_kernels.kv_cache.tokens import HeadQuantizer

WINDOW = 9
CAPACITY = 80
#: name -> (our layer, that of transformers, their arguments)
LAYERS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "dynamic": (Int8DynamicLayer, cache_utils.DynamicLayer, {}),
    "sliding": (
        Int8SlidingLayer,
        cache_utils.DynamicSlidingWindowLayer,
        {"sliding_window": WINDOW},
    ),
    "static": (Int8StaticLayer, cache_utils.StaticLayer, {"max_cache_len": CAPACITY}),
    "ring": (
        Int8StaticSlidingLayer,
        cache_utils.StaticSlidingWindowLayer,
        {"max_cache_len": CAPACITY, "sliding_window": WINDOW},
    ),
}


class Module(nn.Module):
    """An attention module, as int8 attention sees it."""

    is_causal = True

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def make_layer(
    name: str, attention: str = ATTENTION, sliding_window: int = WINDOW, **quantizer: Any
) -> Int8Layer:
    kind, _, arguments = LAYERS[name]
    if "sliding_window" in arguments:
        arguments = {**arguments, "sliding_window": sliding_window}
    options = {"rotation": None, **quantizer}
    layer: Int8Layer = kind(
        HeadQuantizer(0, **options),
        Attention(SimpleNamespace(_attn_implementation=attention)),
        **arguments,
    )
    return layer


def make_twin(name: str) -> Any:
    _, kind, arguments = LAYERS[name]
    return kind(**arguments)


def tokens(count: int, *, batch: int = 2, heads: int = 2, dim: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, count, dim, generator=generator)


def after_int8(layer: Int8Layer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens after they were stored and read again."""
    quantizer = layer.quantizer.bind(k, v)
    stored = quantizer.allocate(k, k.shape[2])
    quantizer.append(stored, k, v)
    return quantizer.dequantize(stored)


def mask_of(layer: Any, count: int, window: int | None = None) -> Tensor:
    """The mask [1, 1, T, columns] that transformers makes for a layer before it gets so many tokens."""
    columns, offset = layer.get_mask_sizes(count)
    position = int(layer.get_seq_length()) + torch.arange(count)[:, None]
    column = offset + torch.arange(columns)
    seen = column <= position
    if window is not None:
        seen &= column > position - window
    return seen[None, None]


def attend(
    layer: Int8Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    module: nn.Module | None = None,
    **more: Any,
) -> Tensor:
    """What an attention module does: stores its keys and values, and attends. [B, T, Hq, D]"""
    kwargs: dict[str, Any] = dict(more)
    k, v = layer.update(k, v, kwargs=kwargs)
    module = module or Module(q.shape[1] // k.shape[1])
    return int8_attention(module, q, k, v, mask, **kwargs)[0]
