"""Tiny random models of the decoder families, made from their configurations without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import nn

from smoothquant_kernels import SmoothQuantConfig
from smoothquant_kernels.nn.float_linear import pending_smooth

VOCAB = 131
HIDDEN = 32
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GQA = {**LLAMA_LIKE, "num_key_value_heads": 2}
#: Smooths every group with factors that are powers of two, so that the model's outputs do not change by a bit.
EXACT = SmoothQuantConfig(smooth_rounding="power_of_two", only_where_better=False)


def _opt() -> t.OPTConfig:
    return t.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=HIDDEN,
    )


def _bloom(residual_post_layernorm: bool) -> t.BloomConfig:
    return t.BloomConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        n_layer=2,
        n_head=4,
        apply_residual_connection_post_layernorm=residual_post_layernorm,
    )


def _neox(parallel: bool) -> t.GPTNeoXConfig:
    return t.GPTNeoXConfig(**LLAMA_LIKE, use_parallel_residual=parallel)


def _gpt2() -> t.GPT2Config:
    return t.GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaConfig(**LLAMA_LIKE, num_key_value_heads=4),
    "llama_gqa": lambda: t.LlamaConfig(**GQA),
    "llama_bias": lambda: t.LlamaConfig(**LLAMA_LIKE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: t.MistralConfig(**GQA),
    "qwen2": lambda: t.Qwen2Config(**GQA),
    "qwen3": lambda: t.Qwen3Config(**GQA, head_dim=8),
    "opt": _opt,
    "bloom": lambda: _bloom(False),
    "bloom_post": lambda: _bloom(True),
    "gpt_neox": lambda: _neox(True),
    "gpt_neox_serial": lambda: _neox(False),
    "gpt2": _gpt2,
}


def make_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random model in evaluation mode. Its norms and biases differ from their initial ones and zeros."""
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[family]())
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data *= 4.0  # with the initial 0.02 every model would be nearly linear
    return model.to(dtype).eval()


def token_batches(count: int = 4, length: int = 24, rows: int = 2) -> list[torch.Tensor]:
    """Random token ids [rows, length]."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB, (rows, length), generator=generator) for _ in range(count)]


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[B, T, V] in the model's dtype."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits
    return result


def small_t5() -> nn.Module:
    """An encoder-decoder of one layer each, in training mode."""
    config = t.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config)


def layers_of(model: Any) -> dict[str, dict[str, Any]]:
    """name -> what the model's record says of a linear that is smoothed or quantized."""
    return {layer["name"]: layer for layer in model.smoothquant_info["layers"]}


def skip_reasons(model: Any) -> dict[str, str]:
    """name -> why a linear stays in float, by the model's record."""
    return {layer["name"]: layer["reason"] for layer in model.smoothquant_info["skipped"]}


def divided_by(module: nn.Module) -> torch.Tensor:
    """1 / s, where s are the factors that the layer's quantizer will divide its input by."""
    smooth = pending_smooth(module)
    return torch.ones(1) if smooth is None else 1.0 / smooth
