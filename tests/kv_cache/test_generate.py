"""Every way to generate that transformers has, through an int8 cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t

from smoothquant_kernels import Int8KVCache, use_int8_attention
from tests.support.compare import assert_bitwise_equal
from tests.support.models import GQA, VOCAB, make_model

SLIDING = {**GQA, "sliding_window": 6}
SIZES: list[dict[str, int]] = [{}, {"max_cache_len": 48}]


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def model_of(family: str) -> Any:
    if family == "sliding":
        torch.manual_seed(0)
        return use_int8_attention(t.MistralForCausalLM(t.MistralConfig(**SLIDING)).eval())
    return use_int8_attention(make_model(family))


def run(model: Any, cache: Any, prompt: torch.Tensor | None = None, **options: Any) -> Any:
    prompt = ids() if prompt is None else prompt
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, **options}
    return model.generate(
        prompt,
        cache=cache,
        max_new_tokens=options.pop("max_new_tokens", 12),
        pad_token_id=0,
        eos_token_id=None,
        disable_compile=True,
        **options,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llama_gqa", "sliding"])
def test_the_whole_prompt_or_token_by_token(family: str, size: dict[str, int]) -> None:
    """Logits of generation equal those of feeding the same tokens one by one, up to the prompt's rounding."""
    model = model_of(family)
    y = run(model, Int8KVCache(model, **size), return_dict_in_generate=True, output_logits=True)
    cache = Int8KVCache(model, **size)
    with torch.no_grad():
        model(ids(), cache=cache)
        for step, token in enumerate(y.sequences[:, 9:-1].split(1, dim=1), 1):
            logits = model(token, cache=cache).logits[:, -1]
            torch.testing.assert_close(logits, y.logits[step], rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("family", ["llama_gqa", "sliding"])
def test_a_fixed_size_generates_what_a_growing_one_does(family: str) -> None:
    model = model_of(family)
    texts = [run(model, Int8KVCache(model, **size)) for size in SIZES]
    assert torch.equal(*texts)


@pytest.mark.parametrize("size", SIZES)
def test_sampling_and_several_sequences(size: dict[str, int]) -> None:
    model = model_of("llama_gqa")
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        cache = Int8KVCache(model, **size)
        texts.append(run(model, cache, do_sample=True, num_return_sequences=3))
    assert torch.equal(*texts) and texts[0].shape == (6, 21)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llama_gqa", "sliding"])
def test_beams(family: str, size: dict[str, int]) -> None:
    """A beam's score is the sum of its tokens' log probabilities, computed again without beams."""
    model = model_of(family)
    y = run(
        model,
        Int8KVCache(model, **size),
        num_beams=3,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    cache = Int8KVCache(model, **size)
    prompt = ids().repeat_interleave(3, 0)
    with torch.no_grad():
        logits = [model(prompt, cache=cache).logits[:, -1]]
        for token in y.sequences[:, 9:-1].split(1, dim=1):
            logits.append(model(token, cache=cache).logits[:, -1])
    chosen = torch.stack(logits, 1).log_softmax(-1).gather(2, y.sequences[:, 9:, None])
    torch.testing.assert_close(chosen.sum((1, 2)), y.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llama_gqa", "sliding", "opt"])
def test_left_padding(family: str, size: dict[str, int]) -> None:
    """A padded sequence generates what it generates alone."""
    model = model_of(family)
    long = ids(1, 9)
    short = torch.cat([torch.zeros(1, 4, dtype=torch.long), long[:, :5]], 1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options = {"return_dict_in_generate": True, "output_logits": True}
    both = run(
        model, Int8KVCache(model, **size), torch.cat([long, short]), attention_mask=mask, **options
    )
    alone = [run(model, Int8KVCache(model, **size), p, **options) for p in (long, long[:, :5])]
    for row, y in enumerate(alone):
        assert torch.equal(both.sequences[row, 9:], y.sequences[0, -12:])
        for one, other in zip(both.logits, y.logits, strict=True):
            # int8 of other last bits: a value at the middle of two steps can go either way
            torch.testing.assert_close(one[row], other[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", ["llama_gqa", "sliding"])
@pytest.mark.parametrize("helper", ["lookup", "model"])
def test_assisted_decoding(family: str, helper: str) -> None:
    """Candidates are cropped when they were wrong, and the text is that of greedy decoding."""
    model = model_of(family)
    prompt = ids(1, 4).repeat(1, 3)  # so that look-up finds candidates
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if helper == "model":
        options = {"assistant_model": make_model("llama_gqa", seed=7)}
    expected = run(model, Int8KVCache(model), prompt, max_new_tokens=16)
    cache = Int8KVCache(model)
    assert torch.equal(run(model, cache, prompt, max_new_tokens=16, **options), expected)
    assert cache.get_seq_length() == 27


@pytest.mark.parametrize("size", SIZES)
def test_a_conversation_goes_on(size: dict[str, int]) -> None:
    """A second prompt on a filled cache, and a copy of a cache with a common beginning."""
    model = model_of("llama_gqa")
    cache = Int8KVCache(model, **size)
    first = run(model, cache, max_new_tokens=5)
    saved = copy.deepcopy(cache)
    longer = torch.cat([first, ids(2, 11)], 1)
    once = run(model, cache, longer, max_new_tokens=5)
    again = run(model, saved, longer, max_new_tokens=5)
    assert torch.equal(once, again) and once.shape == (2, 30)
    assert cache.get_seq_length() == 29


def test_chunks_of_a_prompt() -> None:
    model = model_of("llama_gqa")
    texts = [
        run(model, Int8KVCache(model), ids(1, 25), prefill_chunk_size=size)
        for size in (None, 10, 5)
    ]
    assert all(text.shape == (1, 37) for text in texts)
    assert torch.equal(texts[0], texts[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = model_of("llama_gqa").to(dtype)
    cache = Int8KVCache(model)
    run(model, cache)
    keys = cache.int8_layers[0].keys
    assert keys is not None and keys.dtype == dtype


def test_encoder_and_decoder_crop_their_own_tokens() -> None:
    model = model_of("llama_gqa")
    both = t.EncoderDecoderCache(Int8KVCache(model), Int8KVCache(model))
    k = torch.randn(2, 2, 5, 8)
    for cache in (both.self_attention_cache, both.cross_attention_cache):
        cache.update(k, k, 0)
    both.crop(-2)
    both.batch_repeat_interleave(2)
    both.batch_select_indices(torch.tensor([0, 3]))
    assert both.get_seq_length() == 3
    assert_bitwise_equal(
        both.self_attention_cache.layers[0].keys[1],
        both.cross_attention_cache.layers[0].keys[1, :, :3],
    )


def test_early_initialization() -> None:
    model = model_of("llama_gqa")
    expected = run(model, Int8KVCache(model))
    for size in SIZES:
        cache = Int8KVCache(model, **size)
        cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0
        assert torch.equal(run(model, cache), expected)
