"""What users and tools hang on a linear: hooks, a forward of its own, parametrizations, attributes.

What still does the same on an int8 layer moves along. A layer with anything else stays in float, and is listed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from smoothquant_kernels.nn.float_linear import FOLDED, PENDING
from smoothquant_kernels.nn.kinds import KINDS

#: Called with the input or the output of a forward pass, which an int8 layer has like a float one. Handles remove
#: their hook from these very dictionaries.
_MOVED = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
#: Hooks that the int8 layer could not serve, and what they are about.
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
#: What a linear has of its own, besides what every module has.
_OWN = {"in_features", "out_features", "nf", "nx", PENDING, FOLDED}
#: How torch keeps the compiled form of a module, which is made again for another one.
_DROPPED = {"_compiled_call_impl"}


def keeps_float(linear: nn.Module) -> str | None:
    """Why a linear must stay in float for the sake of what hangs on it; None if all of it can move along."""
    return next(_reasons(linear), None)


def _reasons(linear: nn.Module) -> Iterator[str]:
    if any(True for _ in linear.children()):
        child = next(name for name, _ in linear.named_children())
        # torch.nn.utils.parametrize among them
        yield f"it has a module of its own, {child}"
    parameters = {name for name, p in linear._parameters.items() if p is not None}
    if extra := sorted(parameters - {"weight", "bias"}):
        # weight_norm, spectral_norm, pruning, adapters in the layer
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
        elif any(hasattr(kind.smallest(), name) for kind in KINDS):
            yield f"its attribute {name} means something else for an int8 layer"


def _attributes(linear: nn.Module) -> Iterator[tuple[str, Any]]:
    """What was set on the instance, beyond what its constructor sets."""
    plain = vars(nn.Module()).keys() | _OWN | _DROPPED
    for name, value in vars(linear).items():
        if name not in plain and name != "forward" and not _is_dispatched(linear, name):
            yield name, value


def _is_dispatched(linear: nn.Module, name: str = "forward") -> bool:
    """Whether accelerate has put this there to move inputs to the layer's device, where the int8 layer will be too.

    Weights that it has offloaded have no data, which is refused elsewhere.
    """
    hook = type(vars(linear).get("_hf_hook")).__name__
    return name in ("forward", "_hf_hook", "_old_forward") and hook == "AlignDevicesHook"


def _bound_to(value: Any, linear: nn.Module) -> bool:
    """Whether calling it calls the float layer."""
    while isinstance(value, functools.partial):
        value = value.func
    return value is linear or getattr(value, "__self__", None) is linear


def move_attached(old: nn.Module, new: nn.Module) -> None:
    """Hands what hangs on the float layer to the int8 layer that takes its place."""
    for kind in _MOVED:
        setattr(new, kind, getattr(old, kind))
    for name, value in _attributes(old):
        setattr(new, name, value)
