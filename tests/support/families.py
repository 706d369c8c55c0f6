"""Tiny random models of every supported architecture, made from their configurations without a download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from tests.support.models import CONFIGS as DECODERS
from tests.support.models import GQA, HIDDEN, LLAMA_LIKE, VOCAB

Batch = dict[str, Tensor]
TOKENS = 12


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int = 0, name: str = "input_ids", length: int = TOKENS) -> Batch:
    """One row of random token ids [1, length]."""
    return {name: torch.randint(3, VOCAB, (1, length), generator=_generator(seed))}


def encoder_decoder(seed: int = 0) -> Batch:
    return {**tokens(seed), **tokens(seed + 1, "decoder_input_ids", 7)}


def image(seed: int = 0) -> Batch:
    """One image of four 8 x 8 patches."""
    return {"pixel_values": torch.randn(1, 3, 16, 16, generator=_generator(seed))}


def text_and_image(seed: int = 0) -> Batch:
    return {**tokens(seed), **image(seed)}


def speech(seed: int = 0) -> Batch:
    features = torch.randn(1, 8, 24, generator=_generator(seed))
    return {"input_features": features, **tokens(seed, "decoder_input_ids", 7)}


@dataclass(frozen=True)
class Family:
    """A model class of `transformers`, its configuration and the inputs of its forward."""

    model_class: str
    config: Callable[[], Any]
    inputs: Callable[[int], Batch] = tokens

    def make(self, seed: int = 0) -> nn.Module:
        """A random model in evaluation mode. Its norms and biases differ from their initial ones and zeros."""
        torch.manual_seed(seed)
        try:
            model_class, config = getattr(t, self.model_class), self.config()
        except AttributeError as error:
            if "module transformers has no attribute" not in str(error):
                raise
            pytest.skip(f"transformers {t.__version__} is older than this family: {error}")
        auto = self.model_class.startswith("Auto")
        model: nn.Module = model_class.from_config(config) if auto else model_class(config)
        generator = _generator(seed + 1)
        for parameter in model.parameters():
            # Overwrites every parameter, so that the model does not depend on the library's initialization.
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() <= 1:
                parameter.data += 0.2 * noise
            else:
                parameter.data = noise * (1.5 / parameter.shape[-1] ** 0.5)
        return model.eval()


def _lm(config: Callable[[], Any]) -> Family:
    return Family("AutoModelForCausalLM", config)


_MOE: dict[str, Any] = {**GQA, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_LATENT: dict[str, Any] = {
    **LLAMA_LIKE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
_LINEAR_ATTENTION: dict[str, Any] = {
    **_MOE,
    "num_experts": 4,
    "head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_BERT: dict[str, Any] = {**LLAMA_LIKE}
_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _opt_350m() -> Any:
    """Post-LN, with embeddings that are narrower than the layers and so are projected in and out."""
    return t.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        ffn_dim=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    )


def _falcon(**options: Any) -> Family:
    return _lm(
        lambda: t.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            **options,
        )
    )


def _clip_parts(text: Any, vision: Any) -> dict[str, Any]:
    sizes = {**_BERT, "projection_dim": 24, **_IDS}
    return {
        "text_config": text(**sizes).to_dict(),
        "vision_config": vision(**_VISION).to_dict(),
    }


FAMILIES: dict[str, Family] = {
    **{name: _lm(config) for name, config in DECODERS.items()},
    "opt_350m": _lm(_opt_350m),
    "gptj": _lm(
        lambda: t.GPTJConfig(
            vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
        )
    ),
    "falcon_7b": _falcon(multi_query=True, parallel_attn=True, bias=False, alibi=False),
    "falcon_40b": _falcon(new_decoder_architecture=True, num_kv_heads=2, bias=False, alibi=False),
    "falcon_rw": _falcon(multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "mixtral": _lm(lambda: t.MixtralConfig(**GQA, num_local_experts=4)),
    "qwen2_moe": _lm(
        lambda: t.Qwen2MoeConfig(**_MOE, num_experts=4, shared_expert_intermediate_size=24)
    ),
    "qwen3_moe": _lm(lambda: t.Qwen3MoeConfig(**_MOE, num_experts=4, head_dim=8)),
    "qwen3_next": _lm(lambda: t.Qwen3NextConfig(**_LINEAR_ATTENTION)),
    "qwen3_5_moe": _lm(lambda: t.Qwen3_5MoeTextConfig(**_LINEAR_ATTENTION)),
    "phi": _lm(lambda: t.PhiConfig(**LLAMA_LIKE)),
    "phi3": _lm(lambda: t.Phi3Config(**GQA, **_IDS)),
    "gemma": _lm(lambda: t.GemmaConfig(**GQA, head_dim=8)),
    "gemma2": _lm(lambda: t.Gemma2Config(**GQA, head_dim=8)),
    "gemma3": _lm(lambda: t.Gemma3TextConfig(**GQA, head_dim=8)),
    "cohere": _lm(lambda: t.CohereConfig(**GQA)),
    "cohere2": _lm(lambda: t.Cohere2Config(**GQA)),
    "stablelm": _lm(lambda: t.StableLmConfig(**GQA)),
    "stablelm_parallel": _lm(lambda: t.StableLmConfig(**GQA, use_parallel_residual=True)),
    "olmo": _lm(lambda: t.OlmoConfig(**{**GQA, "num_key_value_heads": 4}, clip_qkv=8.0)),
    "olmo2": _lm(lambda: t.Olmo2Config(**GQA)),
    "granite": _lm(lambda: t.GraniteConfig(**GQA)),
    "glm4": _lm(lambda: t.Glm4Config(**GQA, head_dim=8, pad_token_id=0)),
    "glm4_moe": _lm(
        lambda: t.Glm4MoeConfig(
            **_MOE, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, head_dim=8
        )
    ),
    "deepseek_v2": _lm(lambda: t.DeepseekV2Config(**_LATENT)),
    "deepseek_v3": _lm(lambda: t.DeepseekV3Config(**_LATENT)),
    "llama4": _lm(
        lambda: t.Llama4TextConfig(
            **GQA,
            head_dim=8,
            intermediate_size_mlp=88,
            num_local_experts=4,
            num_experts_per_tok=1,
            moe_layers=[1],
            **_IDS,
        )
    ),
    "granite_moe": _lm(lambda: t.GraniteMoeConfig(**GQA, num_local_experts=4)),
    "nemotron": _lm(lambda: t.NemotronConfig(**GQA, head_dim=8, **_IDS)),
    "gpt_oss": _lm(lambda: t.GptOssConfig(**GQA, head_dim=8, num_local_experts=4)),
    "mpt": _lm(
        lambda: t.MptConfig(vocab_size=VOCAB, d_model=HIDDEN, n_layers=2, n_heads=4, max_seq_len=64)
    ),
    "starcoder2": _lm(lambda: t.Starcoder2Config(**GQA)),
    "bert": Family("BertForMaskedLM", lambda: t.BertConfig(**_BERT)),
    "bert_classifier": Family("BertForSequenceClassification", lambda: t.BertConfig(**_BERT)),
    "roberta": Family("RobertaModel", lambda: t.RobertaConfig(**_BERT)),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        lambda: t.DistilBertConfig(
            vocab_size=VOCAB, dim=HIDDEN, hidden_dim=88, n_layers=2, n_heads=4
        ),
    ),
    "deberta_v2": Family(
        "DebertaV2ForMaskedLM",
        lambda: t.DebertaV2Config(
            **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
        ),
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        lambda: t.T5Config(
            vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=88, num_layers=2, num_heads=4
        ),
        encoder_decoder,
    ),
    "t5_gated": Family(
        "T5ForConditionalGeneration",
        lambda: t.T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=88,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        encoder_decoder,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        lambda: t.WhisperConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=88,
            decoder_ffn_dim=88,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=32,
            **_IDS,
            decoder_start_token_id=1,
            suppress_tokens=[],
            begin_suppress_tokens=[],
        ),
        speech,
    ),
    "vit": Family("ViTForImageClassification", lambda: t.ViTConfig(**_VISION), image),
    "clip": Family(
        "CLIPModel",
        lambda: t.CLIPConfig(
            **_clip_parts(t.CLIPTextConfig, t.CLIPVisionConfig), projection_dim=24
        ),
        text_and_image,
    ),
    "siglip": Family(
        "SiglipModel",
        lambda: t.SiglipConfig(**_clip_parts(t.SiglipTextConfig, t.SiglipVisionConfig)),
        text_and_image,
    ),
}
