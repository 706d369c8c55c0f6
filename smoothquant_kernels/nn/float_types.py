"""The floating-point types that weights and activations may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


def type_name(dtype: torch.dtype) -> str:
    """Without the prefix: ``float16``."""
    return str(dtype).removeprefix("torch.")


def check_float_type(dtype: torch.dtype, what: str) -> None:
    """Raises SmoothQuantError for any other type; `what` has it, as the subject of a sentence."""
    if dtype not in FLOAT_TYPES:
        raise SmoothQuantError(
            f"{what} is {type_name(dtype)}, and must be one of {', '.join(map(type_name, FLOAT_TYPES))} to be "
            "quantized: convert the model first, for example model.to(torch.bfloat16), and switch layerwise casting "
            "off."
        )


def check_float_types(linears: Mapping[str, nn.Module]) -> None:
    """Raises SmoothQuantError naming the first linear whose weight cannot be quantized for its type."""
    for name, linear in linears.items():
        weight: Any = linear.weight
        check_float_type(weight.dtype, f"the weight of layer {name}")


def float_type(t: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The tensor's type if it is one of these."""
    return t.dtype if t.dtype in FLOAT_TYPES else otherwise
