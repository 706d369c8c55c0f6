"""The size of a cache from a configuration equals that of a real cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as t

from smoothquant_kernels import Int8KVCache, calibrate_kv_cache
from smoothquant_kernels.kv_cache.size import KINDS, cache_sizes
from tests.support.models import CONFIGS, GQA, make_model, token_batches


@pytest.mark.parametrize("family", ["llama", "llama_gqa", "qwen3", "gpt2", "gpt_neox"])
def test_sizes_are_those_of_real_caches(family: str) -> None:
    model: Any = make_model(family)
    ids = token_batches(1, length=64, rows=1)[0]
    calibrate_kv_cache(model, [ids], progress=False)
    sizes = cache_sizes(CONFIGS[family]().to_dict(), 64)
    assert sizes is not None and tuple(sizes) == KINDS
    caches = {
        "float16": t.DynamicCache(),
        "int8": Int8KVCache(model),
        "int8-static": Int8KVCache(model, scheme="static"),
    }
    for kind, cache in caches.items():
        with torch.no_grad():
            model(input_ids=ids, cache=cache, use_cache=True)
        if kind == "float16":  # the model is float32
            assert sum(x.keys.numel() + x.values.numel() for x in cache.layers) * 2 == sizes[kind]
        else:
            assert isinstance(cache, Int8KVCache)
            assert cache.nbytes == sizes[kind]


def test_windows_bound_a_layer() -> None:
    config = t.Gemma2Config(**GQA, head_dim=16, sliding_window=8).to_dict()
    few, many = cache_sizes(config, 4), cache_sizes(config, 100)
    assert few is not None and many is not None
    # One layer of two has the window.
    assert few["float16"] == 2 * 4 * 2 * 2 * 16 * 2
    assert many["float16"] == (8 + 100) * 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 2, "hidden_size": 8},
        {"num_hidden_layers": 2, "num_attention_heads": 2},
        {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "kv_lora_rank": 4},
        {"num_hidden_layers": "2", "num_attention_heads": 2, "hidden_size": 8},
    ],
)
def test_what_a_configuration_does_not_say(config: dict[str, Any]) -> None:
    assert cache_sizes(config, 1) is None


def test_a_model_of_several_parts() -> None:
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    sizes = cache_sizes({"text_config": text, "hidden_size": 7}, 3)
    assert sizes == {"float16": 768, "int8": 480, "int8-static": 384}
