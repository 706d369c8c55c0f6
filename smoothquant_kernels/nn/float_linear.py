"""Float linear layers: what counts as one, its weight, and the marks that smoothing leaves on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError

#: A plain attribute, because checkpoints would include a buffer and `.half()` would round it.
PENDING = "_smoothquant_pending"


#: A plain attribute as well. It marks a weight that contains the factors.
FOLDED = "_smoothquant_folded"

#: A plain attribute as well: the largest input of each channel that calibration saw, for static outlier columns.
MAXIMA = "_smoothquant_maxima"


def pending_smooth(module: nn.Module) -> Tensor | None:
    """s [K] float32 of a float linear that is smoothed at run time; `W8A8Linear.from_linear` applies it.

    The float layer itself needs no division, since `(x / s) @ (s * w)` is `x @ w`. It keeps every bit of its weight and
    its output, so code that reads, saves or hooks it sees no change.
    """
    found: Tensor | None = module.__dict__.get(PENDING)
    return None if found is None else found.to(weight_of(module).device)


def is_smoothed(module: nn.Module) -> bool:
    """Whether a float linear has factors, folded into its weight or pending."""
    return PENDING in module.__dict__ or FOLDED in module.__dict__


def set_pending_smooth(module: nn.Module, smooth: Tensor | None) -> None:
    """Leaves the factors s [K] to the quantizer; None removes them."""
    if smooth is None:
        module.__dict__.pop(PENDING, None)
    else:
        module.__dict__[PENDING] = smooth


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's `Conv1D`, a linear with weight [K, N], by its name and shape, without an import."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and getattr(module, "weight", torch.empty(0)).dim() == 2
    )


def is_float_linear(module: nn.Module) -> bool:
    """Whether `W8A8Linear.from_linear` accepts this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


#: A float32 copy of more elements than this is made in parts.
_PART = 1 << 26


def in_parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Splits a weight [N, K] by rows, so that temporary copies of a large one (an output head) stay small."""
    parts: tuple[Tensor, ...] = weight.split(max(1, _PART // max(1, weight.shape[1])))
    return parts


def weight_of(module: nn.Module) -> Tensor:
    """The weight as [N, K]. For `Conv1D` it is a view, so a write to it changes the module."""
    if not is_float_linear(module):
        raise SmoothQuantError(
            f"expected nn.Linear or Conv1D, got {type(module).__name__}; only these can be quantized."
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight
