"""What perplexity and last-word accuracy share: the logits of a window, window sizes, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.text import Window, check_vocabulary
from smoothquant_kernels.modeling.batches import position_limit
from smoothquant_kernels.modeling.run import evaluation_mode, model_device

T = TypeVar("T")
_WINDOW = 512


def _logits(model: nn.Module, window: Window) -> torch.Tensor:
    """[scored, V] logits that predict the last `scored` tokens of the window."""
    with torch.no_grad(), evaluation_mode(model):  # a compiled model stays compiled
        output = model(input_ids=window.input_ids.to(model_device(model)), use_cache=False)
    logits: torch.Tensor = output.logits
    return logits[0, -window.scored - 1 : -1]


def _fitting_window(*models: Any) -> int:
    limits = [position_limit(model)[0] for model in models if isinstance(model, nn.Module)]
    return min([_WINDOW, *(limit for limit in limits if limit is not None)])


def _check_fits(model: nn.Module, windows: Sequence[Window]) -> None:
    positions, _ = position_limit(model)
    longest = max(window.input_ids.shape[1] for window in windows)
    if positions is not None and longest > positions:
        raise SmoothQuantError(
            f"A window of {longest} tokens is longer than the {positions} positions of the model; "
            "give a shorter one."
        )
    greatest = max(int(window.input_ids.max()) for window in windows)
    check_vocabulary(getattr(model, "config", None), greatest)


def _bar(items: Sequence[T], label: str, show: bool) -> Iterable[T]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, label, console=console, transient=True, disable=not show)
