"""`save_pretrained` of quantized transformers models, and what `model.hf_quantizer` allows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Linear,
    load_quantized,
    quantize_model,
    register_transformers,
    save_quantized,
)
from smoothquant_kernels.checkpoint.hf_config import Config
from tests.support.checkpoints import (
    IDS,
    assert_same_bits,
    assert_same_state,
    llama,
    logits,
    quantized,
    refusal,
)
from tests.support.families import FAMILIES
from tests.support.models import VOCAB, make_model

HEAD = SmoothQuantConfig(quantize_head=True)
WHOLE = "it is not a whole model of transformers: call that of the whole model"


@pytest.fixture(autouse=True)
def registered() -> None:
    register_transformers()


def int8(model: nn.Module, config: SmoothQuantConfig | None = None) -> Any:
    """Without calibration, which takes longer."""
    return quantize_model(model.eval(), config=config)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return int8(llama())


def reload(model: Any, folder: Path) -> Any:
    return type(model).from_pretrained(folder)


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "opt", "bloom", "bert", "t5", "t5_gated", "mixtral", "qwen2_moe", "clip"],
)
def test_families(family: str, head: bool, tmp_path: Path) -> None:
    """Conv1D, tied embeddings, experts in one tensor, encoder-decoders, towers: the same outputs, bit for bit."""
    given = FAMILIES[family]
    model: Any = given.make()
    if head and model.get_output_embeddings() is None:
        pytest.skip("the model has no output head")
    int8(model, HEAD if head else None)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = reload(model, tmp_path)
    assert_same_state(loaded, model)
    with torch.no_grad():
        first, second = (m(**given.inputs(0)).to_tuple() for m in (model, loaded))
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            assert_same_bits(b, a)


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    tied = int8(llama(tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert_same_bits(logits(reload(tied, tmp_path / "tied")), logits(tied))
    head = int8(llama(tie_word_embeddings=True), HEAD)
    head.save_pretrained(tmp_path / "head")
    loaded = reload(head, tmp_path / "head")
    assert type(loaded.lm_head) is W8A8Linear
    loaded.tie_weights()
    assert_same_bits(logits(loaded), logits(head))


def test_a_module_under_two_names_is_written_once(model: Any, tmp_path: Path) -> None:
    layers = model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not any(name.startswith("model.layers.1.mlp.up_proj") for name in names)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.model.layers[1].mlp.up_proj is loaded.model.layers[0].mlp.up_proj
    assert_same_bits(logits(loaded), logits(model))


def test_types_that_differ(tmp_path: Path) -> None:
    """.bfloat16() rounds the rotary frequencies too, which no file has. One norm has a type of its own."""
    model = quantized(lambda: llama().bfloat16(), "per_token")
    model.model.layers[0].input_layernorm.float()
    model.save_pretrained(tmp_path)
    assert_same_state(reload(model, tmp_path), model)


def test_a_model_converted_after_quantization(model: Any, tmp_path: Path) -> None:
    model.to(torch.float16).save_pretrained(tmp_path)
    loaded = reload(model, tmp_path)
    assert loaded.dtype == loaded.model.layers[0].mlp.up_proj.dtype == torch.float16
    assert_same_bits(logits(loaded), logits(model))


def test_rows_that_are_wider_than_the_weight(model: Any, tmp_path: Path) -> None:
    """On a GPU, w_q with K % 16 != 0 is a view of a wider tensor. The file has the weight only."""
    down = model.model.layers[0].mlp.down_proj
    wide = torch.full((down.out_features, 96), 99, dtype=torch.int8)
    wide[:, : down.in_features] = down.w_q
    down._buffers["w_q"] = wide[:, : down.in_features]
    model.save_pretrained(tmp_path)
    loaded = reload(model, tmp_path)
    assert loaded.model.layers[0].mlp.down_proj.w_q.is_contiguous()
    assert_same_bits(logits(loaded), logits(model))


def test_saved_again_and_in_our_format(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a")
    loaded = reload(model, tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    ours = load_quantized(save_quantized(loaded, tmp_path / "c"))
    ours.save_pretrained(tmp_path / "d")
    assert_same_state(reload(model, tmp_path / "d"), model)
    assert ours.smoothquant_info == model.smoothquant_info


def trainer(model: Any, folder: Path) -> Any:
    arguments = transformers.TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    return transformers.Trainer(model=model, args=arguments)


SAVERS: dict[str, Callable[[Any, Path], object]] = {
    "with a state dict": lambda m, f: m.save_pretrained(f, state_dict=m.state_dict()),
    "safetensors": lambda m, f: m.save_pretrained(f, safe_serialization=True),
    "trainer": lambda m, f: trainer(m, f).save_model(str(f)),
    "a copy": lambda m, f: copy.deepcopy(m).save_pretrained(f),
    "in a wrapper": lambda m, f: nn.Sequential(m)[0].save_pretrained(f),  # type: ignore[operator]
}


@pytest.mark.parametrize("saver", SAVERS)
def test_savers(saver: str, model: Any, tmp_path: Path) -> None:
    SAVERS[saver](model, tmp_path)
    assert_same_bits(logits(reload(model, tmp_path)), logits(model))


def test_a_model_in_a_model_of_another_kind(tmp_path: Path) -> None:
    """It is described by its own names, whatever the outer model calls it."""
    outer = nn.Sequential(nn.Linear(8, 8), llama())
    int8(outer)
    inner: Any = outer[1]
    inner.save_pretrained(tmp_path)
    assert_same_bits(logits(reload(inner, tmp_path)), logits(inner))


# --- the configuration ------------------------------------------------------------------------------------------------


def test_the_configuration(model: Any, tmp_path: Path) -> None:
    described = model.config.quantization_config
    assert type(described) is Config and described.quant_method == "smoothquant_kernels"
    assert described.modules["model.layers.0.mlp.up_proj"]["rotation"] == 32
    for other in (
        Config.from_dict(described.to_dict()),
        Config.from_dict(json.loads(described.to_json_string())),
        copy.deepcopy(described),
    ):
        assert other.to_dict() == described.to_dict()
    model.save_pretrained(tmp_path / "a")
    save_quantized(model, tmp_path / "b")
    native, ours = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in "ab"
    )
    assert native.pop("smoothquant_info") == model.smoothquant_info
    assert ours.pop("weights") == "smoothquant.safetensors"
    del native["types"]
    assert native == ours == described.to_dict()
    assert ours["modules"] == json.loads((tmp_path / "b/smoothquant.json").read_text())["modules"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_part_is_refused_and_nothing_is_written(model: Any, tmp_path: Path) -> None:
    save_quantized(model, tmp_path / "saved")
    loaded: Any = load_quantized(tmp_path / "saved")
    for part in (model.model, loaded.model):
        with (
            pytest.warns(UserWarning, match=WHOLE),
            pytest.raises(ValueError, match="quantized with smoothquant_kernels and is not serial"),
        ):
            part.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_a_configuration_of_two_models_is_refused(tmp_path: Path) -> None:
    first: Any = llama()
    both = nn.ModuleList([first, transformers.LlamaForCausalLM(first.config).eval()])
    int8(both, SmoothQuantConfig(skip=("1.*",)))
    assert not hasattr(first.config, "quantization_config")
    with pytest.warns(UserWarning, match="shares with another model"), pytest.raises(ValueError):
        first.save_pretrained(tmp_path)


def test_models_of_other_libraries_keep_refusing() -> None:
    """diffusers checks that the attribute is of a class of its own."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(32, 32)

        def save_pretrained(self) -> None: ...

    quantizer: Any = int8(Other()).hf_quantizer
    with pytest.warns(UserWarning, match=r"or use smoothquant_kernels\.save_quantized"):
        assert not quantizer.is_serializable()


def test_a_pickle_is_refused(model: Any) -> None:
    with pytest.warns(UserWarning, match="would write a pickle"):
        assert not model.hf_quantizer.is_serializable(safe_serialization=False)
    assert model.hf_quantizer.is_serializable(safe_serialization=True)


def test_a_damaged_model_is_refused(model: Any, tmp_path: Path) -> None:
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.w_scale[3] = float("nan")
    message = refusal(lambda: broken.save_pretrained(tmp_path))
    assert "model.layers.1.mlp.up_proj.w_scale has a value that is NaN" in message
    model.smoothquant_info["x"] = float("nan")
    assert "plain finite JSON" in refusal(lambda: model.save_pretrained(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_call_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = llama()

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("smoothquant_kernels.smoothing.convert.align_tensors", fails)
    with pytest.raises(KeyboardInterrupt):
        int8(model)
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")


# --- dequantize, adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_dequantize(family: str, tmp_path: Path) -> None:
    model: Any = int8(make_model(family), HEAD)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, W8A8Linear)}
    weights = {n: m.dequantized_weight() for n, m in layers.items()}
    classes = {n: type(m) for n, m in make_model(family).named_modules()}
    assert model.dequantize() is model
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        assert type(linear) is classes[name]
        conv1d = type(linear).__name__ == "Conv1D"
        assert torch.equal(linear.weight.t() if conv1d else linear.weight, weight)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_bits(logits(reload(model, tmp_path)), logits(model))
    half = int8(make_model(family)).hf_quantizer.dequantize
    assert half(int8(make_model(family)), torch.float16).dtype == torch.float16


def test_a_layer_that_cannot_be_made_again_stays(model: Any, monkeypatch: Any) -> None:
    class Other(nn.Linear): ...

    plain: Any = llama()
    plain.model.layers[1].mlp.up_proj = Other(32, 88)
    monkeypatch.setattr("smoothquant_kernels.checkpoint.skeleton.build", lambda *_: plain)
    before = str(model)
    assert "layers.1.mlp.up_proj was a Other before" in refusal(model.dequantize)
    assert str(model) == before and hasattr(model, "hf_quantizer")


def test_adapters_train(model: Any) -> None:
    """As LoRA does: a float branch beside a frozen int8 layer. The gradient passes the int8 layers after it."""
    assert model.hf_quantizer.is_trainable
    model.requires_grad_(False)
    first = model.model.layers[0].self_attn.q_proj
    down, up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)
    nn.init.zeros_(up.weight)
    first.register_forward_hook(lambda _, inputs, output: output + up(down(inputs[0])))
    optimizer = torch.optim.SGD([*down.parameters(), *up.parameters()], lr=1.0)
    losses = []
    for _ in range(5):
        loss = model(IDS % VOCAB, labels=IDS % VOCAB).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert up.weight.grad is not None and up.weight.grad.abs().max() > 0
        optimizer.step()
    assert losses[-1] < losses[0]
