"""Tiny checkpoints in the format of compressed-tensors, as llm-compressor 0.14 writes them, and their arithmetic."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support import models

WEIGHTS = "model.safetensors"
_COMMON = {
    "actorder": None,
    "block_structure": None,
    "group_size": None,
    "num_bits": 8,
    "observer_kwargs": {},
    "scale_dtype": None,
    "symmetric": True,
    "type": "int",
    "zp_dtype": None,
}
WEIGHT = {**_COMMON, "dynamic": False, "observer": "memoryless_minmax", "strategy": "channel"}
TOKEN = {**_COMMON, "dynamic": True, "observer": None, "strategy": "token"}
STATIC = {**_COMMON, "dynamic": False, "observer": "minmax", "strategy": "tensor"}
TENSOR = {**STATIC, "dynamic": True, "observer": None}
INPUTS = {"per_token": TOKEN, "static": STATIC, "per_tensor": TENSOR}


def group(
    targets: list[str], inputs: dict[str, Any] | None = TOKEN, weights: Any = WEIGHT
) -> dict[str, Any]:
    return {
        "format": "int-quantized",
        "input_activations": copy.deepcopy(inputs),
        "output_activations": None,
        "targets": targets,
        "weights": copy.deepcopy(weights),
    }


def quantization_config(*groups: dict[str, Any], ignore: list[str] | None = None) -> dict[str, Any]:
    return {
        "config_groups": {f"group_{i}": g for i, g in enumerate(groups or (group(["Linear"]),))},
        "format": "int-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"] if ignore is None else ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def llama(**changed: Any) -> nn.Module:
    """Random, and with biases in attention."""
    torch.manual_seed(0)
    sizes = {**models.GQA, "attention_bias": True, "initializer_range": 0.2, **changed}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def quantized_weight(w: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """Int8 in [-128, 127] and the scale absmax / 127.5, in the type and shape that compressed-tensors has."""
    by_tensor = granularity == "tensor"
    absmax = w.abs().amax().reshape(1) if by_tensor else w.abs().amax(1, keepdim=True)
    scale = absmax / 127.5
    return (w / scale).round().clamp(-128, 127).to(torch.int8), scale


def write(
    folder: Path,
    model: nn.Module,
    layers: Callable[[str], tuple[str, str] | None],
    config: dict[str, Any],
    *,
    x_scale: float = 0.02,
    shards: int = 1,
) -> Path:
    """Writes a checkpoint. `layers`: name of a linear -> activation scheme and weight granularity; None for float."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tensors = load_file(folder / WEIGHTS)
    for name, module in model.named_modules():
        chosen = layers(name) if isinstance(module, nn.Linear) else None
        if chosen is None:
            continue
        w = module.weight.detach()
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = quantized_weight(w, chosen[1])
        if chosen[0] == "static":
            tensors[f"{name}.input_scale"] = torch.tensor([x_scale], dtype=w.dtype)
    put(folder, tensors, shards)
    rewrite_config(folder, lambda values: values.update(quantization_config=config))
    return folder


def put(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    put(folder, tensors)


def simple(
    folder: Path,
    scheme: str = "per_token",
    granularity: str = "channel",
    *,
    model: nn.Module | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint with one group, of all linears but the head."""
    weights = {**WEIGHT, "strategy": granularity}
    config = quantization_config(group(["Linear"], INPUTS[scheme], weights))

    def layers(name: str) -> tuple[str, str] | None:
        return None if name == "lm_head" else (scheme, granularity)

    return write(folder, model or llama(), layers, config, shards=shards)


def their_codes(x: Tensor, scale: Tensor) -> Tensor:
    """How compressed-tensors quantizes an input of float32: a division, then [-128, 127]."""
    return (x / scale).clamp(-128, 127).round()


def their_forward(x: Tensor, scale: Tensor, w_q: Tensor, w_scale: Tensor, bias: Any) -> Tensor:
    """The forward pass of compressed-tensors in float32, for a scale of the input that is known."""
    return nn.functional.linear(their_codes(x, scale) * scale, w_q.float() * w_scale, bias)
