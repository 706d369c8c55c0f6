"""The floating-point types that weights and activations may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.ops.checks import FLOATS, type_name


def check_float_type(dtype: torch.dtype, what: str) -> None:
    """Raises SmoothQuantError for a type not in `FLOATS`; `what` is the subject of its sentence."""
    if dtype not in FLOATS:
        raise SmoothQuantError(
            f"{what} is {type_name(dtype)}, and must be one of {', '.join(map(type_name, FLOATS))} to be "
            "quantized: convert the model first, for example model.to(torch.bfloat16), and switch layerwise casting "
            "off."
        )


def check_float_types(linears: Mapping[str, nn.Module]) -> None:
    """Raises SmoothQuantError that names the first linear whose weight has a type that cannot be quantized."""
    for name, linear in linears.items():
        weight: Any = linear.weight
        check_float_type(weight.dtype, f"the weight of layer {name}")


def float_type(t: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The type of `t` if it is in `FLOATS`, else `otherwise`."""
    return t.dtype if t.dtype in FLOATS else otherwise


def keep_types(module: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Gives buffers that were converted to another type their old values again, on their new device.

    Args:
        module: what was moved or converted.
        before: its buffers before that.
    """
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new.dtype != old.dtype:
            module._buffers[name] = old.to(new.device)
