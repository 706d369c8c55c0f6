"""The cache with int8 layers, fused blocks and a real model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessorList

from smoothquant_kernels import (
    Int8KVCache,
    optimize_for_inference,
    smooth_and_quantize,
    use_int8_attention,
)
from smoothquant_kernels.kv_cache import attention
from tests.support.models import VOCAB, make_model


def ids(length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(3))


def run(
    model: Any,
    cache: Any,
    prompt: torch.Tensor,
    new: int = 10,
    choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        cache=cache,
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        logits_processor=LogitsProcessorList([] if choose is None else [choose]),
    )


@pytest.mark.filterwarnings("ignore:the calibration data ended:UserWarning")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama_gqa", "qwen3", "opt"])
def test_int8_layers_and_an_int8_cache(
    family: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: nn.Module = make_model(family)
    smooth_and_quantize(model, [ids(16)])
    if fused:
        optimize_for_inference(model)
    expected = run(model, Int8KVCache(model), ids())
    use_int8_attention(model)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_kernel_can", lambda *args: False)
        floats = run(model, Int8KVCache(model), ids())
    for one, other in zip(floats.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    cache = Int8KVCache(model)
    y = run(model, cache, ids())
    assert [layer.direct for layer in cache.int8_layers] == [True, True]
    # Queries in int8 move activations by more than one step of the int8 layers after them.
    error = (y.logits[1] - expected.logits[1]).norm() / expected.logits[1].norm()
    assert 0 < error < 0.1


@pytest.mark.real_model
def test_smollm2_decodes_like_the_float_cache(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    model = use_int8_attention(copy.deepcopy(model))
    text = "The three primary colors are red, yellow and blue. Mixing red and yellow gives"
    prompt = tokenizer(text, return_tensors="pt").input_ids
    expected = run(smollm2[0], None, prompt, 16)
    cache = Int8KVCache(model)

    def same_tokens(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = expected.sequences[:, tokens.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    # The model goes on with the tokens of the float cache: after another token, logits could not be compared.
    y = run(model, cache, prompt, 16, choose=same_tokens)
    assert all(layer.direct for layer in cache.int8_layers)
    assert cache.rotation == 64
    assert cache.bytes_per_token == 30 * 3 * 2 * (64 + 4)
    assert torch.equal(y.sequences, expected.sequences)
    pairs = list(zip(expected.logits, y.logits, strict=True))
    # In some processors' order of sums one step is nearly a tie.
    assert sum(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in pairs) >= 15
    divergence = [
        nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum")
        for a, b in pairs
    ]
    assert torch.stack(divergence).mean() < 0.002
