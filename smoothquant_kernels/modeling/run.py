"""Runs a model on a batch and finds the tensors in its output."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from smoothquant_kernels.errors import SmoothQuantError

Batch = Mapping[str, Tensor]
Leaf = TypeVar("Leaf")


def model_device(model: nn.Module) -> torch.device:
    """The device for inputs: that of the first parameter, or of the first buffer if all weights are buffers."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode within the block, then restores the mode of each module."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`evaluation_mode` without gradients.

    Compiled models run eagerly, because a compiled graph calls no hooks and its operations cannot be watched.
    """
    # If dynamo was never loaded, nothing is compiled, and loading it here would take a second.
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with stance, torch.no_grad(), evaluation_mode(model):
        model.eval()  # some modules override it to do more than set the mode
        yield


def run(model: nn.Module, batch: Batch, *, logits: bool = True) -> Any:
    """Returns the output for one batch, without a key-value cache. `logits=False` skips most of the output head."""
    extra: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if hasattr(model, "config") and "use_cache" not in batch and "use_cache" in parameters:
        extra["use_cache"] = False
    # A loss needs the logits of all its labels.
    whole = "labels" in batch or "logits_to_keep" in batch
    if not logits and "logits_to_keep" in parameters and not whole:
        extra["logits_to_keep"] = 1
    device = model_device(model)
    return model(**{k: v.to(device) for k, v in batch.items()}, **extra)


def run_changed(model: nn.Module, batch: Batch) -> Any:
    """`run` for a model whose tensors were changed on purpose; None if the model cannot compute with them.

    For example, a router may send an expert a different number of tokens than the recorded tensors have.
    """
    try:
        return run(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        return None


def leaves_in(tree: Any, kind: type[Leaf]) -> Iterator[Leaf]:
    """Yields all objects of a class in nested containers, mappings and dataclasses unknown to pytree included."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, kind):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from leaves_in(list(leaf.values()), kind)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from leaves_in(list(vars(leaf).values()), kind)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields all tensors of nested containers."""
    return leaves_in(tree, Tensor)


def output_tensors(output: Any) -> list[Tensor]:
    """Every float tensor of a model's output, the logits first if there are any.

    Raises:
        SmoothQuantError: the output holds no float tensor.
    """
    logits = getattr(output, "logits", None)
    first = [logits] if isinstance(logits, Tensor) else []
    tensors = [t for t in (*first, *tensors_in(output)) if t.is_floating_point()]
    if not tensors:
        raise SmoothQuantError(
            f"the model returned no float tensor to compare ({type(output).__name__})."
        )
    return list({id(t): t for t in tensors}.values())


def output_tensor(output: Any) -> Tensor:
    """The tensor that represents an output: the logits if there are any, else the first float tensor.

    Raises:
        SmoothQuantError: the output holds no float tensor.
    """
    return output_tensors(output)[0]


def token_mask(batch: Batch, name: str = "attention_mask") -> Tensor | None:
    """[B, T] bool, False at padding; None if the batch has no such mask or an additive one."""
    mask = batch.get(name)
    if mask is None or mask.dim() != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    return mask.bool()


def unpadded_rows(t: Tensor, keep: Tensor | None) -> Tensor:
    """[M, last dimension]: the rows of `t` that the mask `keep` [rows] of `Padding.keep` selects; None keeps all."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if keep is None else rows[keep]
