"""What a cache costs, on caches whose error and size are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from smoothquant_kernels import Int8KVCache, calibrate_kv_cache, use_int8_attention
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.kv_cache import CacheReference, cache_bytes, evaluate_cache
from smoothquant_kernels.evaluation.perplexity import evaluate
from tests.evaluation.test_perplexity import NLL_TOLERANCE, WORDS, random_text


class Rounded(DynamicCache):
    """Stores keys and values in bfloat16."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        k, v = super().update(
            key_states.bfloat16(), value_states.bfloat16(), layer_idx, *args, **kwargs
        )
        return k.float(), v.float()


class Forgetful(DynamicCache):
    """Returns zeros in place of all keys but the new ones."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        new = key_states.shape[2]
        return torch.cat([0 * k[:, :, :-new], key_states], 2), v


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


@pytest.fixture
def tokenizer(word_tokenizer: Callable[..., Any]) -> Any:
    return word_tokenizer(WORDS)


@pytest.mark.parametrize("step", [1, 8])
@pytest.mark.parametrize(("tokens", "window"), [(2, 64), (20, 64), (75, 32)])
def test_the_float_cache_costs_nothing(
    model: Any, tokenizer: Any, tokens: int, window: int, step: int
) -> None:
    text = random_text(tokens)
    found = evaluate_cache(model, text, tokenizer, DynamicCache, window=window, step=step)
    whole = evaluate(model, text, tokenizer, window=window)
    assert found.tokens == whole.tokens == tokens - 1
    assert found.perplexity == found.float_perplexity
    assert (found.mean_kl, found.delta_nll, found.top1_agreement) == (0.0, 0.0, 1.0)
    # Token by token or a whole window: the same scores, on the same tokens.
    assert math.log(found.perplexity) == pytest.approx(whole.nll, abs=NLL_TOLERANCE)
    held = min(tokens, window) - 1
    # 2 layers, keys and values, 2 heads, 8 channels
    assert found.cache_tokens == held
    assert found.cache_bytes == found.float_cache_bytes == 2 * 2 * 2 * 8 * held * 4
    assert found.float16_cache_bytes == found.float_cache_bytes // 2


def test_an_error_of_the_cache_is_found(model: Any, tokenizer: Any) -> None:
    text, reference = random_text(200), CacheReference(model)
    options: dict[str, Any] = {"window": 64, "reference": reference}
    rounded = evaluate_cache(model, text, tokenizer, Rounded, **options)
    forgetful = evaluate_cache(model, text, tokenizer, Forgetful, **options)
    # bfloat16 keeps 8 bits: a relative error of 2^-9 of scores and values
    assert 0 < rounded.mean_kl < 1e-3 < forgetful.mean_kl
    assert rounded.top1_agreement > forgetful.top1_agreement
    assert rounded.cache_bytes * 2 == rounded.float_cache_bytes
    assert rounded.delta_nll == pytest.approx(
        math.log(rounded.perplexity / rounded.float_perplexity), abs=1e-9
    )
    assert rounded.delta_nll_stderr > 0 and rounded.kl_stderr > 0
    assert rounded.to_dict()["mean_kl"] == rounded.mean_kl


def test_the_int8_cache(model: Any, tokenizer: Any) -> None:
    use_int8_attention(model)
    ids = torch.randint(3, len(WORDS), (4, 64), generator=torch.Generator().manual_seed(1))
    calibrate_kv_cache(model, [ids], progress=False)
    text, reference = random_text(120), CacheReference(model)
    for scheme in ("per_token", "static"):
        found = evaluate_cache(
            model, text, tokenizer, lambda s=scheme: Int8KVCache(model, scheme=s), window=64,
            reference=reference,
        )  # fmt: skip
        # 127 steps: errors of some 0.4 % of a head's largest value, far below those of a wrong cache
        assert 0 < found.mean_kl < 0.01
        assert found.cache_bytes < found.float_cache_bytes


def test_a_reference_runs_once(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    forward = type(model).forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(type(kwargs.get("cache")).__name__)
        return forward(self, *args, **kwargs)

    counting.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", counting)
    text = random_text(20)
    for reference, runs in ((CacheReference(model), 1), (CacheReference(model, max_bytes=0), 2)):
        steps.clear()
        for _ in range(2):
            evaluate_cache(model, text, tokenizer, Rounded, reference=reference, window=32)
        assert steps.count("DynamicCache") == runs * 19
        assert steps.count("Rounded") == 2 * 19


def test_bytes_count_each_memory_once() -> None:
    cache: Any = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert cache_bytes(cache) == 2 * 24 * 4
    cache.layers[0].alias = cache.layers[0].keys[:, :, :1]
    cache.layers[0].more = {"a": [torch.zeros(5, dtype=torch.int8)], "self": cache}
    cache.model = nn.Linear(8, 8)  # refers to it only
    assert cache_bytes(cache) == 2 * 24 * 4 + 5
    # The whole memory of a view counts, as it cannot be freed.
    cache.layers[0].keys = torch.zeros(1, 2, 100, 4)[:, :, :3]
    cache.layers[0].alias = None
    assert cache_bytes(cache) == 24 * 4 + 800 * 4 + 5


@pytest.mark.parametrize("step", [0, -1, 1.0, True])
def test_a_step_is_a_number_of_tokens(model: Any, tokenizer: Any, step: Any) -> None:
    with pytest.raises(SmoothQuantError, match="step must be a whole number of tokens from 1"):
        evaluate_cache(model, random_text(9), tokenizer, DynamicCache, step=step)


def test_refusals(model: Any, tokenizer: Any, tiny_llama: Callable[..., Any]) -> None:
    text = random_text(9)
    for reference in (CacheReference(tiny_llama()), CacheReference(model, step=2)):
        with pytest.raises(SmoothQuantError, match="of the same model and step"):
            evaluate_cache(model, text, tokenizer, DynamicCache, reference=reference)

    class NoCache(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> None: ...

    with pytest.raises(SmoothQuantError, match="NoCache takes no cache of keys and values"):
        evaluate_cache(NoCache(), text, tokenizer, DynamicCache)
