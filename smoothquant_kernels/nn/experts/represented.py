"""What int8 experts compute with the weights that they represent, in float: for gradients, and for float models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels.nn.experts.source import FloatExperts, choices_of

if TYPE_CHECKING:
    from smoothquant_kernels.nn.experts.layer import W8A8Experts


def represented(
    layer: W8A8Experts, x: Tensor, index: Tensor | None, weights: Tensor | None
) -> Tensor:
    """The layer's result in float, in the shape and type of x. Autograd records it."""
    rows = x.reshape(-1, layer.hidden)
    total = torch.zeros_like(rows)
    each = len(rows) // layer.num_experts
    for e in range(layer.num_experts):
        if layer.routed:
            assert index is not None and weights is not None
            token, choice = torch.where(choices_of(index) == e)
            weight = choices_of(weights)[token, choice, None]
        else:
            token = torch.arange(e * each, (e + 1) * each, device=x.device)
            weight = torch.ones(1, 1, device=x.device)
        v = rows[token]
        for name in ("up", "down"):
            b = layer._buffers[f"{name}_bias"]
            bias = None if b is None else b[e].to(x.dtype)
            v = F.linear(v, layer.dequantized(name, e).to(x.dtype), bias)
            v = layer.gate(v) if name == "up" else v
        total = total.index_add(0, token, (v * weight).to(x.dtype))
    return total.reshape(x.shape)


def write_float(layer: W8A8Experts, experts: FloatExperts) -> nn.Module:
    """Gives a module of float experts, which may be without data, the weights that an int8 layer represents."""
    module = experts.module
    for name in ("up", "down"):
        weights = torch.stack([layer.dequantized(name, e) for e in range(layer.num_experts)])
        bias = layer._buffers[f"{name}_bias"]
        if name == "up" and experts.interleaved:
            weights = interleaved(weights)
            bias = None if bias is None else interleaved(bias)
        if experts.transposed:
            weights = weights.transpose(1, 2)
        own = experts.first_name if name == "up" else "down_proj"
        setattr(module, own, nn.Parameter(weights.to(layer.dtype).contiguous()))
        if bias is not None:
            setattr(module, f"{own}_bias", nn.Parameter(bias.to(layer.dtype)))
    return module.train(layer.training)


def interleaved(t: Tensor) -> Tensor:
    """[E, 2 I, ...] with gate and up in turns by one channel, from gate before up."""
    gate, up = t.chunk(2, dim=1)
    return torch.stack([gate, up], 2).flatten(1, 2)
