"""Layers of an int8 cache with a fixed size, for torch.compile and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.layers import Int8Layer
from smoothquant_kernels.kv_cache.step import Attention, Step
from smoothquant_kernels.kv_cache.tokens import HeadQuantizer, writable_later


class Int8StaticLayer(Int8Layer):
    """Room for `max_cache_len` tokens. How many there are is read on the device."""

    fixed_size = True
    ring = False

    def __init__(
        self, quantizer: HeadQuantizer, attention: Attention, max_cache_len: int, **kwargs: Any
    ) -> None:
        super().__init__(quantizer, attention)
        self.max_cache_len = max_cache_len
        self.lengths: Tensor | None = None  # [B] int32
        #: Whether tokens were stored since the last reset. A number would make torch.compile start again at each step.
        self.started = False

    def first_capacity(self) -> int:
        return self.max_cache_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.batch_size = key_states.shape[0]
        with writable_later():
            self.lengths = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
        if not torch.compiler.is_compiling():
            for t in (*self.buffers.tensors(), self.lengths):
                torch._dynamo.mark_static_address(t)

    def append(self, k: Tensor, v: Tensor) -> Step:
        # An exported program runs for empty and for filled caches alike.
        empty = not self.started and not torch.compiler.is_exporting()
        self._write(k, v)
        return Step(
            self,
            k,
            v,
            empty,
            self.buffers,
            lengths=self.lengths,
            ring=self.ring,
            first=self._first_column(k.shape[2]),
        )

    def _write(self, k: Tensor, v: Tensor, skipped: int = 0) -> None:
        """Stores all new tokens but the first `skipped`."""
        lengths, count = self._lengths, k.shape[2]
        self.quantizer.append(
            self.buffers,
            k[:, :, skipped:],
            v[:, :, skipped:],
            positions=lengths + skipped if skipped else lengths,
            ring=self.ring,
        )
        lengths.add_(count)
        self.started = self.started or count > 0

    @property
    def _lengths(self) -> Tensor:
        assert self.lengths is not None, "lazy_initialization comes first"
        return self.lengths

    def _first_position(self) -> int | Tensor:
        """The position of the first column."""
        return 0

    def _first_column(self, count: int) -> Tensor:
        """The column of the first of the newest tokens."""
        return self._lengths[0] - count - self._first_position()

    def contents(self) -> tuple[Tensor, Tensor]:
        k, v = self.quantizer.dequantize(self.buffers)
        columns = torch.arange(self.max_cache_len, device=self.device)
        there = (columns < self._lengths[0] - self._first_position())[:, None]
        return k.where(there, 0), v.where(there, 0)

    def full(self, step: Step) -> tuple[Tensor, Tensor]:
        k, v = self.contents()
        columns = self._first_column(step.count) + torch.arange(step.count, device=self.device)
        return k.index_copy(2, columns, step.k), v.index_copy(2, columns, step.v)

    @property
    def cumulative_length(self) -> Tensor:
        return self._lengths[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> int | Tensor:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        count = self.removable(tokens_to_remove)
        if self.lengths is not None:
            self.lengths.sub_(count).clamp_(min=0)

    def reset(self) -> None:
        self.forget_steps()
        self.started = False
        if self.lengths is not None:
            for t in (*self.buffers.tensors(), self.lengths):
                t.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        # In place, because a compiled graph knows the address.
        if self.tokens is not None:
            for t in self.tokens.tensors():
                t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def _change_sequences(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._change_sequences(change)
        if self.lengths is not None:
            with writable_later():
                self.lengths = change(self.lengths)
            self.batch_size = len(self.lengths)


class Int8StaticSlidingLayer(Int8StaticLayer):
    """A ring of the newest `sliding_window` tokens: position p at p modulo the window."""

    is_sliding = True
    ring = True

    def __init__(
        self,
        quantizer: HeadQuantizer,
        attention: Attention,
        max_cache_len: int,
        sliding_window: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(quantizer, attention, min(max_cache_len, sliding_window))
        self.never_leaves = max_cache_len <= sliding_window
        self.cumulative_length_int = 0

    @property
    def is_croppable(self) -> bool:
        return self.never_leaves

    def append(self, k: Tensor, v: Tensor) -> Step:
        count, old, window = k.shape[2], self.cumulative_length_int, self.max_cache_len
        self.cumulative_length_int += count
        if count == 1 or old + count <= window:
            return super().append(k, v)
        empty = not self.started
        kept = min(old, window - 1)
        past = self._newest(kept, old)
        self._write(k, v, skipped=max(count - window, 0))
        return Step(self, k, v, empty, None, past, first=kept)

    def _newest(self, count: int, total: int) -> tuple[Tensor, Tensor]:
        """The last tokens of so many, the oldest first."""
        slots = (total - count + torch.arange(count, device=self.device)) % self.max_cache_len
        return self.quantizer.dequantize(self.buffers.map(lambda t: t.index_select(2, slots)))

    def _first_position(self) -> Tensor:
        return (self._lengths[0] - self.max_cache_len).clamp(min=0)

    def contents(self) -> tuple[Tensor, Tensor]:
        columns = torch.arange(self.max_cache_len, device=self.device)
        slots = (self._first_position() + columns) % self.max_cache_len
        k, v = self.quantizer.dequantize(self.buffers.map(lambda t: t.index_select(2, slots)))
        there = (columns < self._lengths[0])[:, None]
        return k.where(there, 0), v.where(there, 0)

    def full(self, step: Step) -> tuple[Tensor, Tensor]:
        if step.past is None:
            return super().full(step)
        return torch.cat([step.past[0], step.k], 2), torch.cat([step.past[1], step.v], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        old, window = self.cumulative_length_int, self.max_cache_len
        offset = max(old - window + 1, 0)
        if old >= window:
            return window - 1 + query_length, offset
        return max(old + query_length, window), offset

    def get_seq_length(self) -> int:
        return self.cumulative_length_int

    def crop(self, tokens_to_remove: int) -> None:
        count = self.removable(tokens_to_remove)
        if self.cumulative_length_int > self.max_cache_len:
            raise SmoothQuantError(
                f"Int8KVCache: crop cannot bring back tokens that have left the window of {self.max_cache_len}; give a "
                "max_cache_len of at most the window, or leave it out."
            )
        super().crop(-count)
        self.cumulative_length_int = max(self.cumulative_length_int - count, 0)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length_int = 0
