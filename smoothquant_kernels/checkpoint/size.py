"""Estimates the size of a checkpoint, so that the disk can be checked before the work starts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.nn.kinds import choose

_SPARE = 1 << 20  # configuration, tokenizer, manifest


def checkpoint_bytes(
    model: nn.Module, linears: Mapping[str, nn.Module], config: SmoothQuantConfig
) -> int:
    """Estimates the checkpoint size of a float model, which may be on the meta device, with `linears` quantized."""
    names = {id(module): name for name, module in linears.items()}
    seen: set[int] = set()
    size = _SPARE
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                size += tensor.numel() * tensor.element_size()
        if (name := names.get(id(module))) is not None:
            weight = weight_of(module)
            size += choose(name, module, config).nbytes(*weight.shape) - weight.nbytes
    return size
