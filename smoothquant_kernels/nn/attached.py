"""What users and tools attach to a linear: hooks, a replaced forward, parametrizations, attributes.

Whatever works the same on an int8 layer moves to it. A layer with anything else stays in float, and is listed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from smoothquant_kernels.nn.float_linear import FOLDED, MAXIMA, PENDING
from smoothquant_kernels.nn.kinds import KINDS
from smoothquant_kernels.nn.rounding import MOMENTS

#: Hooks on the input or output of a forward pass, which are the same for an int8 layer. The dictionaries themselves
#: move, because a handle removes its hook from the original dictionary.
_MOVED = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
#: Hooks that an int8 layer cannot serve, and why.
_BACKWARD = "it has backward hooks, and an int8 layer has no gradient"
_STATE = "it has hooks on its state dict, which name the float weight"
_STAYS = {
    "_backward_hooks": _BACKWARD,
    "_backward_pre_hooks": _BACKWARD,
    "_state_dict_hooks": _STATE,
    "_state_dict_pre_hooks": _STATE,
    "_load_state_dict_pre_hooks": _STATE,
    "_load_state_dict_post_hooks": _STATE,
}
#: Attributes of a linear that a plain module does not have.
_OWN = {"in_features", "out_features", "nf", "nx", PENDING, FOLDED, MOMENTS, MAXIMA}
#: Where torch keeps the compiled form of a module. The new module needs its own.
_DROPPED = {"_compiled_call_impl"}


def keeps_float(linear: nn.Module) -> str | None:
    """Why a linear must stay in float because of what is attached to it; None if all of that can move."""
    return next(_reasons(linear), None)


def _reasons(linear: nn.Module) -> Iterator[str]:
    if any(True for _ in linear.children()):
        child = next(name for name, _ in linear.named_children())
        # for example from torch.nn.utils.parametrize
        yield f"it has a module of its own, {child}"
    parameters = {name for name, p in linear._parameters.items() if p is not None}
    if extra := sorted(parameters - {"weight", "bias"}):
        # for example from weight_norm, spectral_norm, pruning, or an adapter in the layer
        yield f"it has a parameter of its own, {extra[0]}"
    if linear._buffers:
        yield f"it has a buffer of its own, {min(linear._buffers)}"
    if "weight" not in parameters:
        yield "its weight is not a parameter"
    if "forward" in vars(linear) and not _is_dispatched(linear):
        yield "its forward was replaced on the instance"
    for kind, reason in _STAYS.items():
        if getattr(linear, kind, None):
            yield reason
    for name in sorted(parameters):
        parameter: Any = linear._parameters[name]
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield f"its {name} has a gradient hook, and an int8 layer has no gradient"
    for name, value in _attributes(linear):
        if isinstance(value, Tensor):
            yield f"it has a tensor of its own, {name}"
        elif _bound_to(value, linear):
            yield f"its attribute {name} is bound to the float layer"
        elif any(hasattr(kind.smallest(), name) for kind in KINDS if kind.is_linear):
            yield f"its attribute {name} means something else for an int8 layer"


def _attributes(linear: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes set on the instance, other than those that its constructor sets."""
    plain = vars(nn.Module()).keys() | _OWN | _DROPPED
    for name, value in vars(linear).items():
        if name not in plain and name != "forward" and not _is_dispatched(linear, name):
            yield name, value


def _is_dispatched(linear: nn.Module, name: str = "forward") -> bool:
    """Whether accelerate set this attribute to move inputs to the layer's device, which the int8 layer shares.

    Weights that accelerate has offloaded have no data; `check_present` refuses those.
    """
    hook = type(vars(linear).get("_hf_hook")).__name__
    return name in ("forward", "_hf_hook", "_old_forward") and hook == "AlignDevicesHook"


def _bound_to(value: Any, linear: nn.Module) -> bool:
    """Whether a call of `value` calls the float layer."""
    while isinstance(value, functools.partial):
        value = value.func
    return value is linear or getattr(value, "__self__", None) is linear


def move_attached(old: nn.Module, new: nn.Module) -> None:
    """Moves what is attached to the float layer to the int8 layer that replaces it."""
    for kind in _MOVED:
        setattr(new, kind, getattr(old, kind))
    for name, value in _attributes(old):
        setattr(new, name, value)
