"""What the report says of the cache of keys and values."""

from __future__ import annotations

import transformers

from smoothquant_kernels.report.page import _cache
from smoothquant_kernels.report.report import _cache_costs
from tests.support.models import LLAMA_LIKE, make_model


def test_the_sizes_of_the_caches() -> None:
    costs = _cache_costs(make_model("llama_gqa"))
    assert costs is not None
    # Two layers of two heads for keys and values; of 8 channels a token holds 16, and a scale.
    assert costs["bytes_per_token"] == {"float16": 128, "int8": 160, "int8-static": 128}
    (fact,) = _cache(costs)
    assert "<dt>Cache of 32,768 tokens</dt><dd>5.2 MB in int8<small>4.2 MB with static" in fact


def test_a_model_without_a_cache() -> None:
    config = transformers.BertConfig(**LLAMA_LIKE)
    assert _cache_costs(transformers.BertModel(config)) is None
    assert _cache(None) == []
