"""`smoothquant-kernels generate`: continues a prompt greedily."""

from __future__ import annotations

import time
from typing import Any

import torch

from smoothquant_kernels.cli.console import quiet_stderr
from smoothquant_kernels.cli.loading import (
    check_kv_cache,
    kv_cache_maker,
    load_any,
    load_tokenizer,
)
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.kv_cache import cache_bytes
from smoothquant_kernels.evaluation.text import check_vocabulary
from smoothquant_kernels.modeling.run import evaluating, model_device
from smoothquant_kernels.storage.document import Document


def work(
    source: str,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool,
    dtype: str,
    device: str,
    optimize: bool,
    kv_cache: str | None,
) -> Document:
    """Loads the model and continues the prompt."""
    check_kv_cache(kv_cache, source)
    model, quantized = load_any(
        source, dtype=dtype, device=device, causal="generate", optimize=optimize
    )
    tokenizer = load_tokenizer(source)
    cache = None if kv_cache is None else kv_cache_maker(model, kv_cache)()
    answer = complete(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat, cache=cache
    )
    return {
        "model": source,
        "quantized": quantized,
        "optimized": optimize,
        "kv_cache": kv_cache,
        "cache_bytes": None if cache is None else cache_bytes(cache),
        "prompt": prompt,
        "chat": chat,
        **answer,
    }


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool = False,
    cache: Any = None,
) -> Document:
    """Continues a prompt greedily, with a float cache unless another is given.

    Returns the text, the number of new tokens and the time.
    """
    from transformers import GenerationConfig

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise SmoothQuantError("this model has no chat template; leave out --chat.")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # A chat template writes the special tokens itself.
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.shape[1]:
        raise SmoothQuantError("the prompt is empty; give some text to continue.")
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and ids.shape[1] + max_new_tokens > positions:
        raise SmoothQuantError(
            f"the prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones exceed the "
            f"{positions} positions of the model; ask for fewer."
        )
    check_vocabulary(model.config, int(ids.max()))
    stop = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    # The model's own configuration is not used, because it may ask for sampling or penalties.
    settings: Any = GenerationConfig  # its constructor has no annotations
    greedy = settings(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0] if isinstance(stop, list) else stop,
    )
    ids = ids.to(model_device(model))
    begin = time.perf_counter()
    with evaluating(model), quiet_stderr():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy,
            **({} if cache is None else {"cache": cache}),
        )
    seconds = time.perf_counter() - begin
    new = output[0, ids.shape[1] :]
    # Many tokenizers drop the space before the first token they decode, so decode the whole sequence.
    whole = tokenizer.decode(output[0], skip_special_tokens=True)
    start = tokenizer.decode(ids[0], skip_special_tokens=True)
    text = whole[len(start) :] if whole.startswith(start) else tokenizer.decode(new)
    return {
        "text": text.strip() if chat else text,
        "new_tokens": len(new),
        "seconds": seconds,
    }


def render(document: Document) -> str:
    # Plain text without wrapping, for copying and for pipes.
    return str(document["text"] if document["chat"] else document["prompt"] + document["text"])
