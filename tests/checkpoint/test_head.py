"""Int8 output heads in checkpoints: tied to the embedding before, they are tensors of their own afterwards."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Linear,
    load_quantized,
    register_transformers,
    save_quantized,
    smooth_and_quantize,
)
from smoothquant_kernels.checkpoint.manifest import MANIFEST
from smoothquant_kernels.checkpoint.size import checkpoint_bytes
from smoothquant_kernels.modeling.view import ModelView
from tests.support.checkpoints import assert_same_state, logits, manifest_of, rewrite
from tests.support.models import HIDDEN, VOCAB, make_model, token_batches
from tests.support.streams import family

ON = SmoothQuantConfig(quantize_head=True)
#: OPT's embedding has a row of zeros, that of its padding token.
TIED = ("tied", "opt", "gpt2")


def quantized(model: nn.Module, config: SmoothQuantConfig = ON) -> Any:
    return smooth_and_quantize(model, token_batches(), config, progress=False)


@pytest.mark.parametrize("name", [*TIED, "llama"])
def test_a_round_trip(name: str, tmp_path: Path) -> None:
    model = quantized(family(name))
    save_quantized(model, tmp_path / "q", max_shard_bytes=20_000)
    manifest = manifest_of(tmp_path / "q")
    assert len({entry["file"] for entry in manifest["tensors"].values()}) > 2
    assert "lm_head.w_q" in manifest["tensors"] and "lm_head.weight" not in manifest["tensors"]
    assert not manifest["tied"] and manifest["model"]["rebuild"]
    large = [
        n for n, e in manifest["tensors"].items() if VOCAB in e["shape"] and HIDDEN in e["shape"]
    ]
    assert len(large) == 2  # the float embedding and the int8 head
    loaded: Any = load_quantized(tmp_path / "q")
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("kind", ["quantized", "loaded", "copied", "pickled"])
def test_nothing_ties_the_head_to_the_embedding_again(name: str, kind: str, tmp_path: Path) -> None:
    model = quantized(family(name))
    expected, embedding = logits(model), model.get_input_embeddings().weight.detach().clone()
    if kind == "loaded":
        model = load_quantized(save_quantized(model, tmp_path / "q"))
    elif kind == "copied":
        model = copy.deepcopy(model)
    elif kind == "pickled":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    model.tie_weights()
    head = model.get_output_embeddings()
    assert type(head) is W8A8Linear and "weight" not in head._parameters
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert head.w_q.any() and embedding.any()  # no memory is shared


def test_only_the_embedding_of_the_same_shape_is_ignored() -> None:
    head = quantized(family("tied")).lm_head
    head.weight = nn.Parameter(torch.zeros(VOCAB, HIDDEN))  # what tie_weights does
    assert head.weight.any()
    with pytest.raises(KeyError):
        head.weight = nn.Parameter(torch.zeros(3, HIDDEN))
    other = quantized(family("tied")).model.layers[0].mlp.up_proj
    with pytest.raises(KeyError):
        other.weight = nn.Parameter(torch.zeros_like(other.w_q, dtype=torch.float32))


def test_an_encoder_with_a_tied_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, **sizes)
    model: Any = quantized(transformers.BertForMaskedLM(config).eval())
    expected = logits(model)
    loaded: Any = load_quantized(save_quantized(model, tmp_path / "q"))
    for each in (model, loaded):
        each.tie_weights()
        assert each.cls.predictions.decoder.bias is not each.cls.predictions.bias
        assert torch.equal(logits(each), expected)


@pytest.mark.parametrize("name", [*TIED, "llama"])
def test_from_pretrained(name: str, tmp_path: Path) -> None:
    register_transformers()
    model = quantized(family(name))
    save_quantized(model, tmp_path / "q", max_shard_bytes=20_000)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert_same_state(loaded, model)
    loaded.tie_weights()
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded.get_output_embeddings()) is W8A8Linear


def test_a_failed_call_restores_the_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("tied")
    before = {n: getattr(model, n, None) for n in ("all_tied_weights_keys", "_tied_weights_keys")}

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as failing, pytest.raises(KeyboardInterrupt):
        failing.setattr("smoothquant_kernels.smoothing.convert.quantizers", fails)
        quantized(model)
    assert {n: getattr(model, n, None) for n in before} == before
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantized(model)
    assert type(model.lm_head) is W8A8Linear


@pytest.mark.parametrize("name", ["tied", "opt", "llama"])
@pytest.mark.parametrize("head", [False, True])
def test_the_size_of_a_checkpoint_is_foreseen(name: str, head: bool, tmp_path: Path) -> None:
    model = family(name)
    config = ON.replace(quantize_head=head)
    foreseen = checkpoint_bytes(model, ModelView(model, (), head).linears, config) - (1 << 20)
    manifest = manifest_of(save_quantized(quantized(model, config), tmp_path / "q"))
    files = [e["size"] for n, e in manifest["files"].items() if n.endswith(".safetensors")]
    assert 0.9 * sum(files) < foreseen + 5000 and foreseen < 1.1 * sum(files)


def test_a_manifest_without_the_setting_loads(tmp_path: Path) -> None:
    model = quantized(make_model("llama"), SmoothQuantConfig())
    save_quantized(model, tmp_path / "q")
    rewrite(tmp_path / "q", lambda m: m["info"]["config"].pop("quantize_head"))
    assert (
        "quantize_head" not in json.loads((tmp_path / "q" / MANIFEST).read_text())["info"]["config"]
    )
    loaded = load_quantized(tmp_path / "q")
    assert torch.equal(logits(loaded), logits(model))
    info: Any = loaded.smoothquant_info
    assert SmoothQuantConfig.from_dict(info["config"]) == SmoothQuantConfig()
