"""Converts what users pass as a batch (arrays, lists, a single sample, a data set's columns) to tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.batches import main_entry


def accepted_names(model: nn.Module | None) -> set[str] | None:
    """The argument names that a model's forward takes, or None if it takes any."""
    if model is None:
        return None
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {n for n, p in parameters.items() if p.kind is not p.VAR_POSITIONAL}


def tensors_of(item: Mapping[Any, Any], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Returns the entries of a batch as tensors with a dimension for rows.

    Arrays and lists of numbers become tensors. Strings and None are left out, as are numbers for each row that the
    model does not take (a data set's columns).

    Raises:
        SmoothQuantError: there is no tensor, an entry is ragged, or the model does not take an entry.
    """
    found = {str(k): t for k, v in item.items() if (t := _as_tensor(str(k), v)) is not None}
    names = accepted_names(model)
    if names is not None and (foreign := {n: t for n, t in found.items() if n not in names}):
        wrong = [n for n, t in foreign.items() if t.dim() > 1 or len(foreign) == len(found)]
        if wrong:
            raise SmoothQuantError(
                f"{type(model).__name__} takes no {', '.join(wrong)}: a calibration batch may hold "
                f"{', '.join(sorted(names)[:30])}."
            )
        found = {n: t for n, t in found.items() if n in names}
    if not any(t.dim() for t in found.values()):
        raise SmoothQuantError(
            f"a calibration batch must hold tensors, got a mapping with {sorted(map(str, item))}."
        )
    return _with_rows(found)


def _as_tensor(name: str, value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if value is None or isinstance(value, (str, bytes)):
        return None
    if isinstance(value, (bool, int, float)) or hasattr(value, "__array__"):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError):  # an array of strings or objects
            return None
    if isinstance(value, (list, tuple)):
        return _from_list(name, value)
    raise SmoothQuantError(
        f"the entry {name!r} of a calibration batch is a {type(value).__name__}: pass tensors, arrays or lists of "
        "numbers."
    )


def _from_list(name: str, value: Sequence[Any]) -> Tensor | None:
    if not value or any(isinstance(v, (str, bytes)) or v is None for v in value):
        return None
    parts: Sequence[Any] = value
    if any(isinstance(v, (list, tuple)) for v in value):
        inner = [_from_list(name, v) if isinstance(v, (list, tuple)) else v for v in value]
        if any(v is None for v in inner):
            return None
        parts = inner
    try:
        if hasattr(parts[0], "__array__"):
            return torch.stack([torch.as_tensor(v) for v in parts])
        return torch.tensor(parts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SmoothQuantError(
            f"the entry {name!r} of a calibration batch is a list that makes no tensor (of unequal shapes, or not of "
            "numbers): pad it to one shape, or pass one row a batch."
        ) from error


def _with_rows(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the dimension for rows to a single sample. The main entry shows, for all entries, whether it is one."""
    main = found.get(name := main_entry(found))
    own = any(n in found for n in ("pixel_attention_mask", "spatial_shapes", "image_grid_thw"))
    single = {"input_ids": 1, "inputs_embeds": 2, "input_features": 2, "input_values": 1}
    single |= {} if own else {"pixel_values": 3}
    if main is None or main.dim() != single.get(name):
        return found
    result = {}
    for n, v in found.items():
        if n == "position_ids" and v.dim() == 2:  # time, height and width
            result[n] = v[:, None]
        else:
            alone = v.dim() <= single.get(n, 1)
            scalar = not v.dim() and n != "labels"  # a flag, such as return_dict
            result[n] = v[None] if alone and not scalar else v
    return result
