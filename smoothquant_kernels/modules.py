"""Finding and replacing layers in a model, and running it on a batch."""

from __future__ import annotations

import fnmatch
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.linear import W8A8Linear, is_float_linear, weight_of
from smoothquant_kernels.reference import MAX_K

Batch = Mapping[str, Tensor]


def output_heads(model: nn.Module) -> set[str]:
    """Names of the modules that turn hidden states into logits; they stay in float, as in the paper."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    names = {name for name, module in model.named_modules() if head is not None and module is head}
    return names | {n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] == "lm_head"}


def partition_linears(
    model: nn.Module, skip: tuple[str, ...] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The float linears to quantise, and those left in float with the reason.

    Raises:
        SmoothQuantError: there is no linear layer to quantise.
    """
    heads = output_heads(model)
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    quantized = 0
    for name, module in model.named_modules():
        quantized += isinstance(module, W8A8Linear)
        if not is_float_linear(module):
            continue
        pattern = next((p for p in skip if fnmatch.fnmatchcase(name, p)), None)
        if pattern is not None:
            skipped[name] = f"matches the skip pattern {pattern!r}"
        elif name in heads:
            skipped[name] = "output head: stays in float"
        elif weight_of(module).shape[1] > MAX_K:
            skipped[name] = f"more than {MAX_K} input features: an int32 sum could overflow"
        elif not weight_of(module).is_floating_point():
            skipped[name] = f"weight is {weight_of(module).dtype}, not float"
        else:
            chosen[name] = module
    if not chosen:
        if quantized:
            raise SmoothQuantError(f"the model is quantised already ({quantized} W8A8Linear).")
        raise SmoothQuantError(
            f"no linear layer to quantise in {type(model).__name__}: expected nn.Linear or Conv1D modules"
            + (f"; {len(skipped)} were skipped." if skipped else ".")
        )
    return chosen, skipped


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where the module `name` is, and under every other name that the same module has."""
    old = model.get_submodule(name)
    names = [n for n, module in model.named_modules(remove_duplicate=False) if module is old]
    for alias in names:
        parent, _, child = alias.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names that denote one tensor: each name -> the others."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter.data_ptr() if not parameter.is_meta else id(parameter)].append(name)
    return {
        n: [o for o in group if o != n] for group in names.values() for n in group if len(group) > 1
    }


def model_device(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter."""
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, and evaluation mode for the time of the block; each module gets its own mode back."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def run(model: nn.Module, batch: Batch, *, logits: bool = True) -> Any:
    """The model's output on one batch, without a key-value cache; `logits=False` saves most of the output head."""
    extra: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if hasattr(model, "config") and "use_cache" not in batch and "use_cache" in parameters:
        extra["use_cache"] = False
    if not logits and "logits_to_keep" in parameters and "logits_to_keep" not in batch:
        extra["logits_to_keep"] = 1
    device = model_device(model)
    return model(**{k: v.to(device) for k, v in batch.items()}, **extra)


def output_tensor(output: Any) -> Tensor:
    """The tensor that stands for an output: the logits where there are any, else the first float tensor.

    Raises:
        SmoothQuantError: the output holds no float tensor.
    """
    logits = getattr(output, "logits", None)
    candidates = [logits] if isinstance(logits, Tensor) else pytree.tree_leaves(output)
    if isinstance(output, Mapping) and not isinstance(logits, Tensor):
        candidates = list(output.values())
    for value in candidates:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise SmoothQuantError(
        f"the model returned no float tensor to compare ({type(output).__name__})."
    )
