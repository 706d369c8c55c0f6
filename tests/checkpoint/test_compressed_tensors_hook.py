"""`from_pretrained` keeps int8 for W8A8 checkpoints of compressed-tensors, and leaves all others to transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

from smoothquant_kernels import load_quantized, register_transformers, save_quantized
from smoothquant_kernels.checkpoint.compressed_tensors import hook
from smoothquant_kernels.nn.linear import W8A8Linear
from tests.support import compressed_tensors as ct
from tests.support.checkpoints import (
    METHOD_MAPPINGS,
    assert_same_bits,
    assert_same_state,
    logits,
    refusal,
)

METHOD = "compressed-tensors"
from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # carries no annotations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct.simple(tmp_path_factory.mktemp("ct") / "model", "static")


@pytest.mark.parametrize("scheme", list(ct.INPUTS))
@pytest.mark.parametrize("shards", [1, 2])
def test_from_pretrained_loads_what_load_quantized_does(
    scheme: str,
    shards: int,
    registered: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tied = ct.llama(tie_word_embeddings=True)
    folder = ct.simple(tmp_path / "model", scheme, model=tied, shards=shards)
    with caplog.at_level(logging.WARNING):
        model = from_pretrained(folder, dtype="auto")
    assert not [r for r in caplog.records if "weight" in r.getMessage()]
    expected = load_quantized(folder)
    assert_same_state(model, expected)
    assert_same_bits(logits(model), logits(expected))
    assert model.smoothquant_info == expected.smoothquant_info
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and not any(b.is_meta for b in model.buffers())


def test_the_caller_decides_the_type_of_the_float_weights(registered: None, folder: Path) -> None:
    model = from_pretrained(folder, dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    assert model.dtype == layer.dtype == torch.bfloat16
    assert layer.w_scale.dtype == torch.float32 and layer.w_q.dtype == torch.int8
    expected = load_quantized(folder).get_submodule("model.layers.0.mlp.up_proj")
    assert torch.equal(layer.w_scale, expected.w_scale)  # type: ignore[arg-type]
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_one_device_of_a_device_map(device_map: Any, registered: None, folder: Path) -> None:
    model = from_pretrained(folder, device_map=device_map, dtype="auto")
    assert_same_bits(logits(model), logits(load_quantized(folder)))


def test_int8_stays_after_many_forward_passes(registered: None, folder: Path) -> None:
    model = from_pretrained(folder)
    before = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    for _ in range(3):
        logits(model)
    assert {name: (t.dtype, t.shape) for name, t in model.state_dict().items()} == before
    assert sum(isinstance(m, W8A8Linear) for m in model.modules()) == 14


def test_a_model_is_saved_in_the_own_format(registered: None, folder: Path, tmp_path: Path) -> None:
    register_transformers()
    model = from_pretrained(folder, dtype="auto")
    saved = save_quantized(model, tmp_path / "own")
    assert_same_bits(logits(load_quantized(saved)), logits(model))
    model.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "smoothquant_kernels"
    again = from_pretrained(tmp_path / "hf")
    assert_same_bits(logits(again), logits(model))
    assert again.smoothquant_info == model.smoothquant_info


def test_refusals_are_those_of_load_quantized(registered: None, tmp_path: Path) -> None:
    folder = ct.simple(tmp_path / "model", "static")
    expected = "holds a ['LlamaForCausalLM'] and a LlamaModel was asked for"
    auto_model: Any = AutoModel.from_pretrained
    assert expected in refusal(lambda: auto_model(folder))
    spread = {"model": "cpu", "lm_head": "disk"}
    assert "would spread the model" in refusal(lambda: from_pretrained(folder, device_map=spread))
    name = "model.layers.1.mlp.down_proj.input_scale"
    ct.rewrite_tensors(folder, lambda tensors: tensors.pop(name))
    assert "has no input_scale" in refusal(lambda: from_pretrained(folder))
    config = ct.quantization_config(ct.group(["Linear"], {**ct.TOKEN, "symmetric": False}))
    ct.rewrite_config(folder, lambda values: values.update(quantization_config=config))
    assert "asymmetric activations" in refusal(lambda: from_pretrained(folder))


def test_other_formats_go_to_transformers_own_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes get the same arguments, and what they return or raise is the result."""

    class Config(transformers.utils.quantization_config.QuantizationConfigMixin):  # type: ignore[name-defined, misc]
        def __init__(self, **values: Any) -> None:
            self.values, self.quant_method = values, METHOD

    class Quantizer:
        def __init__(self, config: Any, **given: Any) -> None:
            self.config, self.given = config, given

    for mapping, stub in zip(METHOD_MAPPINGS, (Config, Quantizer), strict=True):
        monkeypatch.setitem(mapping, METHOD, stub)
    hook.register()
    hook.register()  # does nothing
    int4 = {**ct.WEIGHT, "num_bits": 4}
    for weights, inputs in (
        (int4, None),
        (ct.WEIGHT, None),
        ({**ct.WEIGHT, "type": "float"}, ct.TOKEN),
    ):
        values = ct.quantization_config(ct.group(["Linear"], inputs, weights))
        made = auto.AutoHfQuantizer.from_config(values, pre_quantized=True)
        assert type(made) is Quantizer and type(made.config) is Config
        assert made.config.values == values and made.given == {"pre_quantized": True}
    ours = auto.AutoHfQuantizer.from_config(ct.quantization_config(), pre_quantized=True)
    assert isinstance(ours, hook.Int8Quantizer) and ours.quantization_config.values == (
        ct.quantization_config()
    )


def test_a_later_call_registers_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for mapping in METHOD_MAPPINGS:
        monkeypatch.setitem(mapping, METHOD, mapping[METHOD])
    register_transformers()
    assert not hasattr(METHOD_MAPPINGS[0][METHOD], "of_smoothquant_kernels")
    register_transformers(compressed_tensors=True)
    assert METHOD_MAPPINGS[0][METHOD].of_smoothquant_kernels
    register_transformers()
    assert METHOD_MAPPINGS[0][METHOD].of_smoothquant_kernels
