"""Writing compressed-tensors `int-quantized` folders, which vLLM, SGLang and transformers load without this package.

The format has int8 weights, their scales, and activation scales per token or static. It has no factors that divide the
input at run time and no rotation. So a model is quantized for it: smoothing is folded or left out (`exportable`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.checkpoint.compressed_tensors.scheme import (
    COMPRESSED,
    FORMAT,
    INPUT_SCALE,
    QUANT_METHOD,
    REGEX,
    WEIGHT,
    WEIGHT_SCALE,
    is_plain_linear,
)
from smoothquant_kernels.checkpoint.manifest import CONFIG, RECORD
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.record import info_of
from smoothquant_kernels.modeling.view import ModelView, holds_matrices
from smoothquant_kernels.nn.kinds import are_quantized_experts
from smoothquant_kernels.nn.linear import W8A8Linear
from smoothquant_kernels.storage.safetensors import stored_sizes
from smoothquant_kernels.storage.versions import package_version

#: How transformers and vLLM expect weight files and their index to be named.
STEM = "model"
INDEX = "model.safetensors.index.json"
_SCHEMES = ("per_token", "static")
#: How vLLM names the linears of experts, whatever a model calls them.
_EXPERTS = r".*\.experts\.\d+\..*"
_FOR_EXPORT = "quantize the float model with SmoothQuantConfig(folding='only', rotation='none')"


def exportable(config: SmoothQuantConfig, *, strict: bool = False) -> SmoothQuantConfig:
    """The settings with which a float model is quantized for this format: folded factors only, no rotation.

    Args:
        config: the settings that the user asks for.
        strict: refuse a model of which a layer would stay unsmoothed because its factors cannot be folded.

    Raises:
        SmoothQuantError: the settings ask for what the format lacks, by name: a rotation, one dynamic scale per tensor,
            or an int8 output head.
    """
    rotations = {config.rotation, *config.rotations.values()} - {"auto", "none"}
    if rotations:
        raise SmoothQuantError(
            f"{QUANT_METHOD} has no rotation before a quantizer, and the settings ask for {rotations.pop()}: pass "
            "rotation='none', or save the native format."
        )
    if wrong := {config.activation_scheme, *config.schemes.values()} - set(_SCHEMES):
        _refuse_scheme(wrong.pop())
    if wanted := {config.outliers, *config.outlier_layers.values()} - {"none"}:
        patterns = [n for n, outliers in config.outlier_layers.items() if outliers != "none"]
        where = "" if config.outliers != "none" else f" for {', '.join(patterns[:3])}"
        raise SmoothQuantError(
            f"{QUANT_METHOD} has no outlier columns, and the settings ask for {min(wanted)} ones{where}: pass "
            "outliers='none', or save the native format."
        )
    if config.quantize_head:
        raise SmoothQuantError(
            f"readers of {QUANT_METHOD} keep the output head in float: leave out quantize_head, or save "
            "the native format."
        )
    if "w4a8" in (config.format_of(""), *config.formats.values()):
        patterns = [n for n, format in config.formats.items() if format == "w4a8"]
        where = f"formats of {', '.join(patterns[:3])}" if patterns else "w_bit=4"
        raise SmoothQuantError(
            f"{QUANT_METHOD} holds layers with int8 weights, and the settings ask for W4A8 ({where}): pass w_bit=8, or "
            "save the native format."
        )
    folding = "required" if strict else "only"
    return config.replace(folding=folding, rotation="none", rotations={})


def _refuse_scheme(scheme: str, where: str = "") -> NoReturn:
    raise SmoothQuantError(
        f"{where}vLLM has no {scheme} activations (one dynamic scale for the whole tensor) in {QUANT_METHOD}: choose "
        "per_token or static, or save the native format."
    )


def check_config(config: SmoothQuantConfig) -> None:
    """Raises SmoothQuantError, before any work, if models quantized so cannot be written in this format."""
    exportable(config)
    if config.divides or config.rotation != "none" or config.rotations:
        raise SmoothQuantError(
            f"{QUANT_METHOD} cannot express division at run time and rotation: {_FOR_EXPORT}, or save the native "
            "format."
        )


def quantization_config(model: nn.Module, again: nn.Module | None) -> dict[str, Any]:
    """What config.json says about the weights.

    Args:
        model: a quantized transformers model.
        again: the float model that transformers makes from config.json; None if it makes none.

    Raises:
        SmoothQuantError: the format, or one of its readers, lacks something that the model has. The message names the
            layer.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, W8A8Linear)
    }
    others = [n for n in skeletons.describe_modules(model)[0] if n not in layers]
    if of_experts := [n for n in others if are_quantized_experts(model.get_submodule(n))]:
        raise SmoothQuantError(
            f"{QUANT_METHOD} has no int8 experts in one tensor, and {of_experts[0]} holds them ({len(of_experts)} such "
            f"modules): skip them with a pattern such as '*.{of_experts[0].rpartition('.')[2]}', or save the native "
            "format."
        )
    if others:
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise SmoothQuantError(
            f"{QUANT_METHOD} holds layers of the class W8A8Linear, and these are of another kind: {names}; quantize "
            "them as W8A8 without outlier columns (`formats`, `outlier_layers`), or save the native format."
        )
    if not layers:
        raise SmoothQuantError(
            f"{QUANT_METHOD} holds layers of the class W8A8Linear, and the model has none."
        )
    if again is None:
        raise SmoothQuantError(
            f"{QUANT_METHOD} is for models that transformers makes from config.json, and {type(model).__name__} is not "
            "one: save the native format."
        )
    heads = ModelView(again).heads
    floats = dict(again.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        _check_layer(name, layer, floats.get(name), head=name in heads)
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": COMPRESSED,
        "config_groups": {f"group_{i}": g for i, g in enumerate(_groups(layers))},
        "ignore": [n for n, m in floats.items() if isinstance(m, nn.Linear) and n not in layers]
        + _experts(floats.values(), layers),
        "kv_cache_scheme": None,
    }


def _experts(modules: Iterable[nn.Module], layers: Iterable[str]) -> list[str]:
    """What to ignore where experts are matrices in one parameter: vLLM takes them for layers of the class "Linear"."""
    if not any(map(holds_matrices, modules)) or any(re.match(_EXPERTS, n) for n in layers):
        return []
    warnings.warn(
        "transformers with the package compressed-tensors does not load the float experts of this model: serve it with "
        "vLLM, or load it with this package.",
        stacklevel=5,
    )
    return [f"{REGEX}{_EXPERTS}"]


def check_originals(originals: Mapping[str, nn.Module | None]) -> None:
    """Raises SmoothQuantError unless readers of the format can replace these modules of the float model."""
    for name, original in originals.items():
        if original is None or not is_plain_linear(original):
            found = "missing" if original is None else f"a {type(original).__name__}"
            raise SmoothQuantError(
                f"{QUANT_METHOD} quantizes nn.Linear only, and {name} is {found} in the float model: name it in skip, "
                "or save the native format."
            )


def _check_layer(name: str, layer: W8A8Linear, original: nn.Module | None, *, head: bool) -> None:
    if layer.inv_smooth is not None or layer.rotation:
        what = "rotates" if layer.rotation else "divides by smoothing factors"
        raise SmoothQuantError(
            f"{name} {what} at run time, which {QUANT_METHOD} cannot express: {_FOR_EXPORT}, or save the native format."
        )
    if layer.activation_scheme not in _SCHEMES:
        _refuse_scheme(layer.activation_scheme, f"{name}: ")
    if head:
        raise SmoothQuantError(
            f"{name} is an int8 output head, and readers of {QUANT_METHOD} keep the head in float: quantize without "
            "quantize_head, or save the native format."
        )
    check_originals({name: original})


def _groups(layers: Mapping[str, W8A8Linear]) -> list[dict[str, Any]]:
    """The config groups: layers of the same scheme and granularity.

    Several groups name all of their layers. vLLM would give a merged layer (qkv_proj) the group of the class "Linear"
    before it looks for the names of its parts.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault((layer.activation_scheme, layer.weight_granularity), []).append(name)
    return [
        {
            "targets": ["Linear"] if len(alike) == 1 else names,
            "weights": _int8(strategy=granularity, dynamic=False),
            "input_activations": _int8(strategy="token", dynamic=True)
            if scheme == "per_token"
            else _int8(strategy="tensor", dynamic=False),
            "output_activations": None,
        }
        for (scheme, granularity), names in alike.items()
    ]


def _int8(*, strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
    }


def export_state(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """The state dict in this format: `weight` [N, K] int8, `weight_scale` [N, 1] or [1], static `input_scale` [1].

    Scales are float32. A bias has the type of the float layer, which it had exactly.
    """
    state = skeletons.layer_state(model, prefix)
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, W8A8Linear):
            key = f"{prefix}{name}"
            for buffer in list(layer._buffers):
                state.pop(f"{key}.{buffer}", None)
            # A channel of zeros has the scale 0, which some readers divide by. Any scale represents it.
            scale = torch.where(layer.w_scale == 0, 1.0, layer.w_scale)
            state[f"{key}.{WEIGHT}"] = layer.w_q.contiguous()
            state[f"{key}.{WEIGHT_SCALE}"] = (
                scale[:, None] if layer.weight_granularity == "channel" else scale
            )
            if layer.bias is not None:
                state[f"{key}.bias"] = layer.bias.to(layer.dtype)
            if layer.x_scale is not None:
                state[f"{key}.{INPUT_SCALE}"] = layer.x_scale
    return state


def own_ties(tied: Mapping[str, str], again: Any) -> dict[str, str]:
    """Those of the other names of tensors whose tensors the model would not tie by itself, so they need a copy."""
    again.tie_weights()  # the construction on the meta device separates tied parameters
    made = dict(again.named_parameters(remove_duplicate=False))
    return {a: n for a, n in tied.items() if a not in made or made[a] is not made.get(n)}


def write_description(
    folder: Path,
    model: nn.Module,
    scheme: Mapping[str, Any],
    texts: Mapping[str, str],
    weight_map: Mapping[str, str],
    tokenizer: Any,
) -> None:
    """Writes everything but the weights: configuration, index, tokenizer, and what was done to each layer."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, text in texts.items():
        if name == CONFIG:
            text = _json(json.loads(text) | {"quantization_config": dict(scheme)})
        (folder / name).write_text(text, "utf-8")
    if len(shards := set(weight_map.values())) > 1:
        size = sum(stored_sizes(folder / shard for shard in shards).values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(weight_map)}
        (folder / INDEX).write_text(_json(index), "utf-8")
    record = {"format": QUANT_METHOD, "package_version": package_version(), "info": info_of(model)}
    (folder / RECORD).write_text(_json(record), "utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
