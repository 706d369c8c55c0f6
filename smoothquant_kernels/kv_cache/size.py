"""How many bytes a cache of a model takes, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smoothquant_kernels.reference import HEAD_MULTIPLE, padded_k

#: The caches that are compared; the second and third are `Int8KVCache` with its two schemes.
KINDS = ("float16", "int8", "int8-static")
#: For so many tokens the size is shown.
TOKENS = (4096, 32768)
_SCALE_BYTES = 4
#: Configurations of different families name the same number differently.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_WINDOWED = ("sliding_attention", "chunked_attention")


def cache_sizes(config: Mapping[str, Any], tokens: int) -> dict[str, int] | None:
    """The bytes of one sequence's cache, by `KINDS`.

    Args:
        config: the values of a model's config.json.
        tokens: how many tokens the cache holds. A layer with a window holds no more than that.

    Returns:
        None for a model whose configuration does not say it: one with a compressed cache (MLA) or without attention.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    layers, heads = _number(config, _LAYERS), _number(config, _HEADS)
    hidden = _number(config, _HIDDEN)
    if not layers or not heads or config.get("kv_lora_rank"):
        return None
    dim = _number(config, ("head_dim",)) or (hidden or 0) // heads
    kv_heads = _number(config, _KV_HEADS) or (1 if config.get("multi_query") else heads)
    if not dim:
        return None
    types = config.get("layer_types")
    if not isinstance(types, list):
        types = ["full_attention"] * layers
    window = _number(config, ("sliding_window", "attention_chunk_size"))
    held = 0
    for kind in types:
        if kind in _WINDOWED and window:
            held += min(tokens, window)
        elif kind == "full_attention" or kind in _WINDOWED:
            held += tokens
    halves = 2 * kv_heads * held  # keys and values
    padded = padded_k(dim, HEAD_MULTIPLE)
    return {
        "float16": halves * dim * 2,
        "int8": halves * (padded + _SCALE_BYTES),
        "int8-static": halves * padded,
    }


def cache_costs(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`cache_sizes` of one token and of `TOKENS`, as JSON values; None if the configuration does not say it."""
    one = cache_sizes(config, 1)
    if one is None:
        return None
    return {
        "bytes_per_token": one,
        "bytes": {str(tokens): cache_sizes(config, tokens) for tokens in TOKENS},
    }


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    values = (config.get(name) for name in names)
    return next((v for v in values if type(v) is int and v > 0), None)
