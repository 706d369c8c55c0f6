"""Running a model on a batch, and the tensors of its output."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from smoothquant_kernels.errors import SmoothQuantError

Batch = Mapping[str, Tensor]


def model_device(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter, or buffer where all weights are buffers."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block; each module gets its own mode back."""
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

    Compiled models run eagerly: a graph that is compiled already calls no hooks, and no operation of it can be watched.
    """
    # nothing is compiled where dynamo was never loaded, and loading it takes a second
    compiled = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with stance, torch.no_grad(), evaluation_mode(model):
        model.eval()  # some modules do more in it than take the mode
        yield


def run(model: nn.Module, batch: Batch, *, logits: bool = True) -> Any:
    """The model's output on one batch, without a key-value cache; `logits=False` saves most of the output head."""
    extra: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    if hasattr(model, "config") and "use_cache" not in batch and "use_cache" in parameters:
        extra["use_cache"] = False
    whole = (
        "labels" in batch or "logits_to_keep" in batch
    )  # a loss needs the logits of all its labels
    if not logits and "logits_to_keep" in parameters and not whole:
        extra["logits_to_keep"] = 1
    device = model_device(model)
    return model(**{k: v.to(device) for k, v in batch.items()}, **extra)


def run_changed(model: nn.Module, batch: Batch) -> Any:
    """`run` for a model some of whose tensors were changed on purpose; None if it cannot compute with them.

    A router that sends another number of tokens to an expert makes shapes that the recorded tensors do not have.
    """
    try:
        return run(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError):
        return None


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors of nested containers, those among them that pytree takes for leaves: mappings and dataclasses."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors_in(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from tensors_in(list(vars(leaf).values()))


def output_tensors(output: Any) -> list[Tensor]:
    """Every float tensor of a model's output; the logits first where there are any.

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
    """The tensor that stands for an output: the logits where there are any, else the first float tensor.

    Raises:
        SmoothQuantError: the output holds no float tensor.
    """
    return output_tensors(output)[0]


def token_mask(batch: Batch, name: str = "attention_mask") -> Tensor | None:
    """[B, T] bool, False at padding; None where the batch has no such mask, or one that is added to scores."""
    mask = batch.get(name)
    if mask is None or mask.dim() != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    return mask.bool()


def unpadded_rows(t: Tensor, keep: Tensor | None) -> Tensor:
    """[M, last dimension]: the rows of t that `keep` [rows] has, as `_padding.Padding.keep` makes it; None: all."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if keep is None else rows[keep]
