"""Savers without knowledge of int8 layers: their files load completely or are refused, never partly."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict
import transformers
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Linear,
    load_quantized,
    quantize_model,
    register_transformers,
    save_quantized,
    smooth_lm,
)
from smoothquant_kernels.checkpoint.skeleton import plain_floats
from tests.support.checkpoints import (
    IDS,
    assert_same_bits,
    assert_same_state,
    llama,
    logits,
    manifest_of,
    quantized,
    refusal,
    rewrite,
)


def bfloat16() -> nn.Module:
    return llama().bfloat16()


# --- whole models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8() -> Any:
    return quantized()


def test_a_whole_model_can_still_be_copied_and_pickled(int8: Any) -> None:
    file = io.BytesIO()
    torch.save(int8, file)
    file.seek(0)
    for other in (copy.deepcopy(int8), torch.load(file, weights_only=False)):
        assert_same_bits(logits(other), logits(int8))
        assert_same_state(other, int8)


def test_float_models_and_parts_are_saved_as_usual(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = llama()
    before = logits(model)
    smooth_lm(model, [IDS], config=SmoothQuantConfig(folding="never"), progress=False)
    model.save_pretrained(tmp_path / "smoothed")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "smoothed")
    assert_same_bits(logits(reloaded), before)

    model = llama()
    other = transformers.LlamaForCausalLM(model.config).eval()
    both = nn.ModuleList([model, other])
    quantize_model(both, config=SmoothQuantConfig(skip=("1.*",)))
    other.save_pretrained(tmp_path / "other")  # the configuration is one object for both
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert_same_bits(logits(reloaded), logits(other))


# --- state dicts ----------------------------------------------------------------------------------------------


def through_torch(model: nn.Module, folder: Path) -> Callable[[nn.Module], object]:
    torch.save(model.state_dict(), folder / "state.pt")
    state = torch.load(folder / "state.pt", weights_only=True)
    return lambda other: other.load_state_dict(state, strict=False)


def through_safetensors(model: nn.Module, folder: Path) -> Callable[[nn.Module], object]:
    path = folder / "state.safetensors"
    safetensors.torch.save_model(model, str(path))
    return lambda other: safetensors.torch.load_model(other, path, strict=False)


def through_accelerate(model: nn.Module, folder: Path) -> Callable[[nn.Module], object]:
    accelerate.Accelerator().save_model(model, str(folder))
    return lambda other: accelerate.load_checkpoint_in_model(other, folder)


STATES = {
    "torch": through_torch,
    "safetensors": through_safetensors,
    "accelerate": through_accelerate,
}


@pytest.mark.parametrize("way", STATES)
def test_a_state_dict_loads_only_into_a_quantized_model(way: str, tmp_path: Path) -> None:
    model = quantized(bfloat16, "per_token")
    load = STATES[way](model, tmp_path)
    empty = copy.deepcopy(model)
    for module in empty.modules():
        for tensor in module.buffers(False) if isinstance(module, W8A8Linear) else ():
            tensor.zero_()
    load(empty)
    assert_same_bits(logits(empty), logits(model))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*q_proj\.weight"):
        load(bfloat16())


def test_a_foreign_weight_file_with_the_configuration(tmp_path: Path) -> None:
    """accelerate writes a file with the name that from_pretrained looks for."""
    register_transformers()
    model = quantized(scheme="per_token")
    accelerate.Accelerator().save_model(model, str(tmp_path))
    model.config.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_bits(logits(loaded), logits(model))
    quantize_model(llama()).config.save_pretrained(tmp_path)  # describes other layers
    assert "o_proj.inv_smooth, which its config.json does not describe" in refusal(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    )


def test_distributed_checkpoints(tmp_path: Path) -> None:
    model = quantized()
    state = {"model": dcp.state_dict.get_model_state_dict(model)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.w_q.zero_()
    state = dcp.state_dict.get_model_state_dict(other)
    dcp.load({"model": state}, checkpoint_id=tmp_path, no_dist=True)
    dcp.state_dict.set_model_state_dict(other, state)
    assert_same_bits(logits(other), logits(model))


def test_accelerate_hooks_keep_the_results() -> None:
    model = quantized(bfloat16, "per_token")
    for moved in (
        accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")),
        accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True),
    ):
        assert_same_bits(logits(moved), logits(model))


# --- our own checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_checkpoint_keeps_the_dtype_of_the_weight_property(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = quantized(lambda: llama().to(dtype), "per_token")
    save_quantized(model, tmp_path / "a")
    arguments = manifest_of(tmp_path / "a")["modules"]["model.layers.0.mlp.down_proj"]
    assert arguments["dtype"] == str(dtype).removeprefix("torch.")
    assert "model.layers.0.mlp.down_proj.weight" not in manifest_of(tmp_path / "a")["tensors"]
    loaded: Any = load_quantized(tmp_path / "a")
    assert loaded.model.layers[0].mlp.down_proj.weight.dtype == dtype
    assert_same_state(loaded, model)


def test_a_checkpoint_without_the_dtype_is_read(tmp_path: Path) -> None:
    model = quantized()
    save_quantized(model, tmp_path / "a")

    def as_an_older_release_wrote(manifest: dict[str, Any]) -> None:
        for arguments in manifest["modules"].values():
            del arguments["dtype"]

    rewrite(tmp_path / "a", as_an_older_release_wrote)
    assert_same_bits(logits(load_quantized(tmp_path / "a")), logits(model))


def test_infinity_and_nan_in_a_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=131,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
    )
    config.own = {"low": -math.inf, "none": math.nan, "list": [math.inf]}
    model: Any = transformers.Mamba2ForCausalLM(config).eval()
    assert math.isinf(config.time_step_limit[1])
    quantize_model(model)
    save_quantized(model, tmp_path / "a")
    loaded: Any = load_quantized(tmp_path / "a")
    assert_same_bits(logits(loaded), logits(model))
    assert list(loaded.config.time_step_limit) == [0.0, math.inf]
    assert loaded.config.own["low"] == -math.inf and loaded.config.own["list"] == [math.inf]
    assert math.isnan(loaded.config.own["none"])
    # transformers reads our file, however its release writes infinity.
    read = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert list(read.time_step_limit) == [0.0, math.inf]


def test_both_ways_of_writing_infinity() -> None:
    text = '{"a": Infinity, "b": [{"__float__": "-Infinity"}], "c": {"__float__": "x"}, "d": NaN}'
    found = plain_floats(json.loads(text))
    assert found["a"] == math.inf and found["b"] == [-math.inf] and found["c"] == {"__float__": "x"}
    assert math.isnan(found["d"]) and math.isnan(plain_floats({"__float__": "NaN"}))
    assert plain_floats({"__float__": ["NaN"]}) == {"__float__": ["NaN"]}
