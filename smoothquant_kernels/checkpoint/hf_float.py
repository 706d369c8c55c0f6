"""`model.dequantize()` of a transformers model with quantized layers."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from smoothquant_kernels.checkpoint import skeleton as skeletons
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.changes import replace_module
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.float_linear import is_conv1d


def dequantized(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Replaces the quantized layers by the float layers that they represent, in place.

    Args:
        model: a quantized transformers model.
        dtype: the type of the whole model; None leaves it, and each new layer has the type that it had in float.

    Returns:
        The model, which is now an ordinary float model. Its linears have no rounded inputs, so it does not compute the
        same, and it has the rounding errors of int8 weights. An int8 output head stays separate from the embedding.

    Raises:
        SmoothQuantError: transformers makes another layer than a plain linear for one of them. Nothing is changed.
    """
    text = skeletons.config_json(model)
    attention = str(json.loads(text)["quantization_config"].get("attention", ""))
    plain = skeletons.build(type(model), text, attention)
    layers = {n: m for n, m in model.named_modules() if kinds.is_quantized(m)}
    made = {name: _float_layer(name, layer, plain) for name, layer in layers.items()}
    for name, linear in made.items():
        replace_module(model, name, linear)
    head = model.get_output_embeddings()
    if any(head is linear for linear in made.values()):
        model.config.get_text_config(decoder=True).tie_word_embeddings = False
    for module in model.modules():
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "smoothquant_info"):
            module.__dict__.pop(name, None)
    for config in skeletons.configurations(model):
        vars(config).pop("quantization_config", None)
    return model if dtype is None else model.to(dtype)


def _float_layer(name: str, layer: nn.Module, plain: nn.Module) -> nn.Module:
    """The layer `name` of the float model `plain`, with the weight of a quantized one."""
    linear: Any = plain.get_submodule(name)
    kind: Any = kinds.kind_of(layer)
    if not kind.is_linear and (made := kind.as_float(layer, linear)) is not None:
        return made  # type: ignore[no-any-return]
    if type(linear) is not nn.Linear and not is_conv1d(linear):
        raise SmoothQuantError(
            f"{name} was a {type(linear).__name__} before it was quantized, which cannot be made again: load the float "
            "model instead."
        )
    quantized: Any = layer
    shown: torch.dtype = quantized.weight.dtype
    weight = kind.rounded_weight(layer).to(shown)
    linear.weight = nn.Parameter(weight.t().contiguous() if is_conv1d(linear) else weight)
    if quantized.bias is not None:
        linear.bias = nn.Parameter(quantized.bias.to(shown))
    return linear.train(layer.training)  # type: ignore[no-any-return]
