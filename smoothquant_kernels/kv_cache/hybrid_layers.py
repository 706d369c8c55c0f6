"""Layers that have linear attention, kept as transformers keeps it, beside attention to an int8 cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smoothquant_kernels.kv_cache.bases import LinearAttentionLayer
from smoothquant_kernels.kv_cache.layers import Int8DynamicLayer, Int8SlidingLayer
from smoothquant_kernels.kv_cache.static_layers import Int8StaticLayer, Int8StaticSlidingLayer


class _Both(LinearAttentionLayer):
    """Calls both halves. A subclass names its other half second."""

    int8: Any  # the class

    def __init__(self, *args: Any, number_of_states: int = 1, **kwargs: Any) -> None:
        self.int8.__init__(self, *args, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        half: Any = self.int8 if args else LinearAttentionLayer  # transformers names linear states
        half.lazy_initialization(self, *args, **kwargs)

    def offload(self) -> None:
        self._call("offload")

    def prefetch(self) -> None:
        self._call("prefetch")

    def reset(self) -> None:
        self._call("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._call("reorder_cache", beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self._call("crop", tokens_to_remove)

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def is_croppable(self) -> bool:
        linear: Any = LinearAttentionLayer
        return bool(linear.is_croppable.fget(self)) and getattr(self, "never_leaves", True)

    @property
    def is_compileable(self) -> bool:
        return bool(self.int8.fixed_size) and not self.record_past

    def get_max_length(self) -> int:
        return int(self.int8.get_max_length(self))

    def _call(self, name: str, *args: Any) -> None:
        for half in (LinearAttentionLayer, self.int8):
            getattr(half, name)(self, *args)


class Int8HybridLayer(_Both, Int8DynamicLayer):
    int8 = Int8DynamicLayer


class Int8HybridSlidingLayer(_Both, Int8SlidingLayer):
    int8 = Int8SlidingLayer


class Int8HybridStaticLayer(_Both, Int8StaticLayer):
    int8 = Int8StaticLayer


class Int8HybridStaticSlidingLayer(_Both, Int8StaticSlidingLayer):
    int8 = Int8StaticSlidingLayer
