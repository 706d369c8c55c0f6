"""Whether a disk has room for a checkpoint, asked before the work and not after it."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from smoothquant_kernels.nn.float_linear import weight_of

_SPARE = 1 << 20  # configuration, tokenizer, manifest


def checkpoint_bytes(model: nn.Module, linears: Collection[str]) -> int:
    """About the size of the checkpoint of a float model (on the meta device, too) once `linears` are quantized."""
    names = {id(model.get_submodule(name)) for name in linears}
    seen: set[int] = set()
    size = _SPARE
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                size += tensor.numel() * tensor.element_size()
        if id(module) in names:
            n, k = (weight := weight_of(module)).shape
            size += weight.numel() * (1 - weight.element_size()) + 4 * (n + k)
    return size
