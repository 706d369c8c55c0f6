"""The paper's own situation, planted into a model that does not have it."""

from __future__ import annotations

import torch
from torch import nn


def plant_outliers(model: nn.Module, readers: dict[str, list[str]], *, seed: int = 0) -> None:
    """Scales 6 random channels of each norm's output by 20-60 and the reading weights by the inverse.

    The function stays the same, as in OPT, where training put such channels there (SmoothQuant, section 3.1).

    Args:
        readers: norm name -> names of the linears that read its output.
    """
    generator = torch.Generator().manual_seed(seed)
    for norm_name, names in readers.items():
        norm = model.get_submodule(norm_name)
        channels = torch.randperm(norm.weight.shape[0], generator=generator)[:6]
        factor = 20 + 40 * torch.rand(6, generator=generator)
        norm.weight.data[channels] *= factor
        if getattr(norm, "bias", None) is not None:
            norm.bias.data[channels] *= factor
        for name in names:
            model.get_submodule(name).weight.data[:, channels] /= factor


def llama_readers(model: nn.Module) -> dict[str, list[str]]:
    """The norms of a LLaMA-like decoder and what reads them."""
    readers: dict[str, list[str]] = {}
    for name, _ in model.named_modules():
        if name.endswith(".input_layernorm"):
            attention = name.replace("input_layernorm", "self_attn")
            readers[name] = [f"{attention}.{part}_proj" for part in "qkv"]
        elif name.endswith(".post_attention_layernorm"):
            mlp = name.replace("post_attention_layernorm", "mlp")
            readers[name] = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
    return readers
