"""`from_pretrained` of transformers loads both kinds of folders: those of `save_quantized` and of `save_pretrained`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as vocabularies
from torch import nn

from smoothquant_kernels import (
    W8A8Linear,
    quantize_model,
    register_transformers,
    save_quantized,
)
from smoothquant_kernels.checkpoint.manifest import MANIFEST
from tests.support.checkpoints import (
    KINDS,
    RELEASE_4,
    assert_same_bits,
    assert_same_state,
    auto,
    llama,
    logits,
    quantized,
    refusal,
    write,
)
from tests.support.models import HIDDEN, VOCAB


@pytest.fixture(autouse=True)
def registered() -> None:
    register_transformers()


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized(lambda: llama(tie_word_embeddings=True), "per_token")


@pytest.fixture(params=KINDS)
def folder(request: Any, model: Any, tmp_path: Path) -> Path:
    return write(model, tmp_path / "saved", request.param)


def bfloat16() -> nn.Module:
    # .bfloat16() also rounds the rotary frequencies, which no state dict has.
    return llama().bfloat16()


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ["AutoModelForCausalLM", "LlamaForCausalLM"])
def test_the_same_model(cls: str, folder: Path, model: Any) -> None:
    loaded, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())  # nothing missing, nothing left over, nothing of another shape
    assert_same_bits(logits(loaded), logits(model))
    assert_same_state(loaded, model)
    assert loaded.smoothquant_info == model.smoothquant_info
    described = model.config.quantization_config.to_dict()
    assert loaded.config.quantization_config.to_dict().items() <= described.items()
    assert not loaded.training and not hasattr(loaded.config, "transformers_weights")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["per_token", "static"])
@pytest.mark.parametrize("make", [llama, bfloat16])
def test_several_files_and_types(
    kind: str, scheme: str, make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = quantized(make, scheme)
    folder = write(model, tmp_path / "saved", kind, 20_000)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    loaded = auto(folder)
    assert_same_state(loaded, model)
    assert_same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_subfolder(kind: str, model: Any, tmp_path: Path) -> None:
    write(model, tmp_path / "inside", kind)
    if RELEASE_4 and kind == "save_quantized":
        assert MANIFEST in refusal(lambda: auto(tmp_path, subfolder="inside"))
    else:
        assert_same_bits(logits(auto(tmp_path, subfolder="inside")), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind: str, tmp_path: Path) -> None:
    model = quantized(lambda: llama(attn_implementation="eager"))
    folder = write(model, tmp_path / "saved", kind)
    loaded = auto(folder)
    assert loaded.config._attn_implementation == "eager"
    assert_same_bits(logits(loaded), logits(model))
    assert auto(folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind: str, tmp_path: Path) -> None:
    model = quantized(scheme="per_token")
    model.generation_config.max_new_tokens = 7
    folder = write(model, tmp_path / "saved", kind)
    words = Tokenizer(vocabularies.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.save_pretrained(folder)
    loaded = auto(folder)
    assert loaded.generation_config.max_new_tokens == 7 and loaded.hf_quantizer.is_compileable
    first, second = (m.generate(torch.tensor([[5, 6]]), do_sample=False) for m in (model, loaded))
    assert torch.equal(first, second)
    options = {"do_sample": False, "max_new_tokens": 7, "return_tensors": True}
    for given, more in ((str(folder), {}), (loaded, {"tokenizer": tokenizer})):
        pipe = transformers.pipeline("text-generation", model=given, **more)
        assert pipe("w5 w6", **options)[0]["generated_token_ids"] == first[0].tolist()


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", [torch.float16, "float32", torch.bfloat16, "auto", None])
def test_the_type_asked_for(kind: str, asked: Any, tmp_path: Path) -> None:
    """Another type than the checkpoint's converts the parameters. Its own, or none, leaves everything as it is."""
    model = quantized(bfloat16, "per_token")
    model.model.norm.float()
    loaded = auto(write(model, tmp_path / "saved", kind), dtype=asked)
    if asked in (torch.bfloat16, "auto", None):
        assert_same_state(loaded, model)
        return
    dtype = torch.float16 if asked == torch.float16 else torch.float32
    assert {p.dtype for p in loaded.parameters()} == {dtype} == {loaded.config.dtype}
    for new, old in zip(loaded.modules(), model.modules(), strict=True):
        if isinstance(new, W8A8Linear):
            assert new.dtype == new.weight.dtype == dtype
            for name, t in old.named_buffers():
                assert torch.equal(getattr(new, name), t) and getattr(new, name).dtype == t.dtype
    assert logits(loaded).isfinite().all()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(dtype))


def test_the_argument_of_older_releases(folder: Path) -> None:
    assert auto(folder, torch_dtype=torch.float16).dtype == torch.float16


def test_a_type_that_no_layer_takes(folder: Path) -> None:
    assert "cannot be loaded as torch.float64" in refusal(lambda: auto(folder, dtype=torch.float64))


def test_parts_that_transformers_keeps_in_float32(tmp_path: Path) -> None:
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes)
    model = quantize_model(transformers.T5ForConditionalGeneration(config).eval())
    save_quantized(model, tmp_path / "saved")
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path / "saved", dtype=torch.float16
    )
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert loaded.encoder.block[0].layer[1].DenseReluDense.wi.weight.dtype == torch.float16


# --- devices ----------------------------------------------------------------------------------------------------------

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb")
MAPS: dict[str, Any] = {
    "auto": "auto",
    "cpu": "cpu",
    "all": {"": "cpu"},
    "device": torch.device("cpu"),
    "parts": {**dict.fromkeys(PARTS, "cpu"), "lm_head": "cpu"},
}


@pytest.mark.parametrize("name", MAPS)
def test_device_maps(name: str, folder: Path, model: Any) -> None:
    loaded = auto(folder, device_map=MAPS[name])
    assert_same_state(loaded, model)
    assert_same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffers", [False, True])
def test_a_layer_on_the_disk(kind: str, buffers: bool, tmp_path: Path) -> None:
    model = quantized(bfloat16, "per_token")
    folder = write(model, tmp_path / "saved", kind)
    devices = {**MAPS["parts"], "model.layers.1": "disk"}
    options: dict[str, Any] = {"device_map": devices, "offload_folder": str(tmp_path / "off")}

    def load() -> Any:
        return auto(folder, offload_buffers=buffers, **options)

    if RELEASE_4:
        assert "cannot offload int8 layers to the disk" in refusal(load)
    else:
        loaded = load()
        assert loaded.model.layers[1].mlp.up_proj.w_q.is_meta == buffers
        assert_same_bits(logits(loaded), logits(model))
        message = refusal(lambda: loaded.save_pretrained(tmp_path / "again"))
        assert "is offloaded and cannot be saved" in message


# --- other classes ----------------------------------------------------------------------------------------------------


def bert() -> Any:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **sizes)


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(6)[None]).last_hidden_state
    return found


def test_a_base_model_of_a_model_with_a_head_and_back(tmp_path: Path) -> None:
    whole: Any = quantize_model(transformers.BertForMaskedLM(bert()).eval())
    whole.save_pretrained(tmp_path / "whole")
    base = transformers.AutoModel.from_pretrained(tmp_path / "whole", add_pooling_layer=False)
    assert type(base).__name__ == "BertModel"
    assert_same_bits(hidden(base), hidden(whole.bert))
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    assert_same_bits(hidden(again.bert), hidden(whole.bert))
    assert type(again.classifier) is nn.Linear and again.classifier.weight.abs().max() > 0


def test_the_manifest_names_the_class(model: Any, tmp_path: Path) -> None:
    save_quantized(model, tmp_path / "saved")
    message = refusal(lambda: transformers.AutoModel.from_pretrained(tmp_path / "saved"))
    assert "holds a LlamaForCausalLM and a LlamaModel was asked for" in message
