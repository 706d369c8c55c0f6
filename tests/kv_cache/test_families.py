"""Every family generates through an int8 cache: the path through floats gives the bits of the model's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

from smoothquant_kernels import Int8KVCache, use_int8_attention
from smoothquant_kernels.kv_cache import attention
from tests.support.compare import assert_bitwise_equal
from tests.support.families import FAMILIES
from tests.support.models import GQA, HIDDEN, VOCAB

NEW = 12
_HYBRID: dict[str, Any] = {
    **GQA,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "pad_token_id": 0,
}
MORE: dict[str, Callable[[], nn.Module]] = {
    # A window that wraps around, beside full attention.
    "gemma3_short": lambda: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            **GQA,
            head_dim=8,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "gemma2_short": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**GQA, head_dim=8, sliding_window=7)
    ),
    "mistral_short": lambda: t.MistralForCausalLM(t.MistralConfig(**GQA, sliding_window=5)),
    "gpt_oss_short": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**GQA, head_dim=8, num_local_experts=4, sliding_window=6)
    ),
    "gemma3n": lambda: t.Gemma3nForCausalLM(
        t.Gemma3nTextConfig(
            **{**GQA, "num_hidden_layers": 4, "intermediate_size": [48] * 4},
            head_dim=8,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=7,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        )
    ),
    "jamba": lambda: t.JambaForCausalLM(
        t.JambaConfig(
            **{**GQA, "num_hidden_layers": 4},
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
            mamba_dt_rank=4,
            mamba_d_state=8,
        )
    ),
    "falcon_h1": lambda: t.FalconH1ForCausalLM(
        t.FalconH1Config(**_HYBRID, mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64)
    ),
    "bart": lambda: t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=88,
            decoder_ffn_dim=88,
            max_position_embeddings=64,
            decoder_start_token_id=1,
        )
    ),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=88,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=1,
        )
    ),
}
#: Families of the table, and how their layers read the cache: None: as floats.
DIRECT, PLAIN = [True, True], [False, False]
READS: dict[str, list[bool] | list[None]] = {
    "llama": DIRECT,
    "qwen2": DIRECT,
    "qwen3": DIRECT,
    "opt": DIRECT,
    "gpt2": DIRECT,
    "gemma3_short": DIRECT,
    "mistral_short": DIRECT,
    "bart": DIRECT,
    "jamba": DIRECT,
    "falcon_h1": DIRECT,
    "qwen3_next": [True],  # and a layer of linear attention
    "gemma2_short": DIRECT,  # a soft cap
    "gpt_oss_short": DIRECT,  # attention sinks
    "gemma3n": PLAIN,  # shares keys between layers
    "deepseek_v2": PLAIN,  # expands latent keys
    "t5": PLAIN,  # measures the length of the keys
    "gpt_neox": [None, None],  # does not tell the cache what attention will get
    "bloom": [None, None],  # has no choice of attention
}
#: Those that also run with a fixed size.
FIXED = ("llama", "mistral_short", "gpt_oss_short", "gemma3n", "qwen3_next", "falcon_h1", "bart")
CASES = [(family, None) for family in READS] + [(family, 40) for family in FIXED]


def random_model(name: str) -> Any:
    if name not in MORE:
        return FAMILIES[name].make()
    torch.manual_seed(0)
    model = MORE[name]()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = p.data + 0.2 * noise if p.dim() <= 1 else noise * (1.2 / p.shape[-1] ** 0.5)
    return model.eval()


def generated(model: Any, **arguments: Any) -> tuple[Any, Int8KVCache]:
    cache = Int8KVCache(model, **arguments)
    given: Any = cache
    if model.config.is_encoder_decoder:
        cross = {"max_cache_len": 9} if arguments else {}
        given = t.EncoderDecoderCache(cache, Int8KVCache(model, **cross))
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    y = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache=given,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        eos_token_id=None,
        disable_compile=True,
    )
    return y, cache


@pytest.mark.parametrize(("family", "size"), CASES)
def test_floats_of_the_cache_give_what_the_models_own_attention_gives(
    family: str, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {} if size is None else {"max_cache_len": size}
    model = random_model(family)
    expected, _ = generated(model, **arguments)
    if not family.startswith("bloom"):
        use_int8_attention(model)
    monkeypatch.setattr(attention, "_kernel_can", lambda *args: False)
    y, cache = generated(model, **arguments)
    assert [layer.direct for layer in cache.int8_layers] == READS[family]
    exact = size is None or family != "gpt_oss_short"
    for one, other in zip(y.logits, expected.logits, strict=True):
        if exact:
            assert_bitwise_equal(one, other)
        else:  # eager attention to the prompt alone, not to a fixed size padded with zeros: other sums
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [None, 40])
@pytest.mark.parametrize("family", ["llama", "mistral_short", "gemma3_short", "falcon_h1"])
def test_int8_attention_is_near_the_floats_of_the_cache(
    family: str, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step after the same prompt: only the queries differ, by their rounding to int8."""
    arguments = {} if size is None else {"max_cache_len": size}
    model = random_model(family)
    calls = []
    can = attention._kernel_can
    monkeypatch.setattr(attention, "_kernel_can", lambda *a: (calls.append(can(*a)), calls[-1])[1])
    expected, _ = generated(model, **arguments)
    y, cache = generated(use_int8_attention(model), **arguments)
    assert calls == [True] * (NEW - 1) * len(cache.int8_layers)
    assert_bitwise_equal(y.logits[0], expected.logits[0])
    error = (y.logits[1] - expected.logits[1]).norm() / expected.logits[1].norm()
    assert 0 < error < 0.03
