"""Estimates the size of a checkpoint, so that the disk can be checked before the work starts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.nn.experts.kind import experts_bytes
from smoothquant_kernels.nn.experts.source import FloatExperts
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.nn.kinds import choose

_SPARE = 1 << 20  # configuration, tokenizer, manifest


def checkpoint_bytes(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    config: SmoothQuantConfig,
    experts: Mapping[str, FloatExperts] | None = None,
) -> int:
    """Estimates the checkpoint size of a float model, which may be on the meta device, with these layers quantized."""
    names = {id(module): name for name, module in linears.items()}
    replaced = {id(found.module): found for found in (experts or {}).values()}
    seen: set[int] = set()
    size = _SPARE
    for module in model.modules():
        name = names.get(id(module))
        if id(module) in replaced:
            size += experts_bytes(replaced[id(module)])
            continue
        for key, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            # The float weight of a quantized layer is stored only if another module shares it.
            if id(tensor) not in seen and not (name is not None and key == "weight"):
                seen.add(id(tensor))
                size += tensor.numel() * tensor.element_size()
        if name is not None:
            size += choose(name, module, config).nbytes(*weight_of(module).shape)
    return size
