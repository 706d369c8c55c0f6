"""The ways in which a quantized layer is copied."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch


def ways_to_copy(empty_like: Callable[..., Any]) -> dict[str, Callable[[Any], Any]]:
    """name -> a function that copies a layer. `empty_like(layer, device)` makes one of its form without its values."""

    def through_torch_save(layer: Any) -> Any:
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = empty_like(layer, "cpu")
        fresh.load_state_dict(torch.load(file, weights_only=True))
        return fresh

    def loaded(layer: Any, device: str, assign: bool) -> Any:
        fresh = empty_like(layer, device)
        fresh.load_state_dict(layer.state_dict(), strict=True, assign=assign)
        return fresh

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
        "torch.save": through_torch_save,
        "load": lambda layer: loaded(layer, "cpu", assign=False),
        "assign": lambda layer: loaded(layer, "cpu", assign=True),
        "assign to meta": lambda layer: loaded(layer, "meta", assign=True),
    }
