"""Layers of an int8 cache that grow with the sequence, and what all layers of an int8 cache share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.kv_cache.bases import CacheLayerMixin
from smoothquant_kernels.kv_cache.step import STEP, Attention, Step
from smoothquant_kernels.kv_cache.tokens import HeadQuantizer, Int8Tokens, writable_later
from smoothquant_kernels.ops.cache_checks import MAX_QUERY_TOKENS

#: A layer grows by so many tokens, so that at most 63 stand empty, and copying costs 2 / 64 of what attention reads.
GROWTH = 64


class Int8Layer(CacheLayerMixin):
    """What all layers share. `keys` and `values` are float copies, made at each access."""

    is_sliding = False
    fixed_size = False

    def __init__(self, quantizer: HeadQuantizer, attention: Attention, **kwargs: Any) -> None:
        self.quantizer = quantizer
        self.attention = attention
        self.tokens: Int8Tokens | None = None
        self.is_initialized = False
        #: Whether the attention module passes fresh keys and values on as they are, so that int8 attention can read
        #: the cache itself. None: not known yet.
        self.direct: bool | None = None
        #: The step that attention has yet to take.
        self.waiting: Step | None = None

    @property
    def is_compileable(self) -> bool:
        return self.fixed_size

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def keys(self) -> Tensor | None:
        return None if self.tokens is None else self.contents()[0]

    @property
    def values(self) -> Tensor | None:
        return None if self.tokens is None else self.contents()[1]

    @property
    def buffers(self) -> Int8Tokens:
        assert self.tokens is not None, "lazy_initialization comes first"
        return self.tokens

    @abstractmethod
    def contents(self) -> tuple[Tensor, Tensor]:
        """The float keys and values that a layer of transformers would hold."""

    @abstractmethod
    def append(self, k: Tensor, v: Tensor) -> Step:
        """Stores new tokens."""

    @abstractmethod
    def full(self, step: Step) -> tuple[Tensor, Tensor]:
        """The float keys and values that a layer of transformers would return from `update`."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.quantizer = self.quantizer.bind(key_states, value_states)
        self.tokens = self.quantizer.allocate(key_states, self.first_capacity())
        self.is_initialized = True

    def first_capacity(self) -> int:
        return 0

    @torch.no_grad()
    def _stored(self, k: Tensor, v: Tensor) -> Step:
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        held = self.buffers.k.shape[:2]
        if k.shape[:2] != held:  # growing would copy one sequence to all
            raise SmoothQuantError(
                f"Int8KVCache: layer {self.quantizer.layer} holds {held[0]} sequences of {held[1]} heads, got tokens "
                f"of {k.shape[0]} sequences of {k.shape[1]} heads: make a new cache, or change its sequences with "
                "batch_repeat_interleave or batch_select_indices."
            )
        return self.append(k, v)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        kwargs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens.

        Returns:
            The new tokens alone if int8 attention comes next, which finds the rest in `kwargs`. Otherwise float keys
            and values of all tokens, as any cache returns them.
        """
        if self.waiting is not None:
            self._not_taken(self.waiting)
        step = self._stored(key_states, value_states)
        if kwargs is None or not self.attention.is_int8 or not self._goes_direct(step):
            return self.full(step)
        if not torch.compiler.is_compiling():
            self.waiting = step
        kwargs[STEP] = step
        return key_states, value_states

    def _goes_direct(self, step: Step) -> bool:
        # The first tokens tell whether a model can: whatever it does with them, they are all there are.
        return self.direct or (
            self.direct is None and step.empty and not torch.compiler.is_compiling()
        )

    def _not_taken(self, step: Step) -> None:
        self.waiting = None
        if not step.empty:
            raise SmoothQuantError(
                f"Int8KVCache: the attention of layer {self.quantizer.layer} did not read the cache at the last step. "
                "If an exception stopped it, start again with cache.reset(). Otherwise its results are wrong: call "
                "model.set_attn_implementation('sdpa') and start again with a new cache."
            )
        self.direct = False

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.tokens is not None:
            with writable_later():
                self.tokens = self.tokens.map(change)

    def offload(self) -> None:
        self._change(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.tokens is not None and self.tokens.k.device != self.device:
            self._change(lambda t: t.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def _change_sequences(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the first dimension of all tensors."""
        self._change(change)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_sequences(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_sequences(lambda t: t[indices.to(t.device)])

    def forget_steps(self) -> None:
        """The part of `reset` beside the tokens."""
        self.waiting = None
        if self.direct is False:
            self.direct = (
                None  # it may have been an exception that kept attention from its first tokens
            )

    def removable(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` removes."""
        if tokens_to_remove > 0:
            raise SmoothQuantError(
                f"Int8KVCache: crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}."
            )
        return -tokens_to_remove


class Int8DynamicLayer(Int8Layer):
    """All tokens, in buffers that grow."""

    length = 0

    def append(self, k: Tensor, v: Tensor) -> Step:
        old, count = self.length, k.shape[2]
        self._reserve(k, old + count)
        self.quantizer.append(self.buffers.narrow(old, count), k, v)
        self.length += count
        return Step(self, k, v, old == 0, self.buffers.narrow(0, self.length), first=old)

    def _reserve(self, k: Tensor, needed: int) -> None:
        if needed > self.buffers.count:
            larger = self.quantizer.allocate(k, -(-needed // GROWTH) * GROWTH)
            larger.copy_from(0, self.buffers.narrow(0, self.length))
            self.tokens = larger

    def full(self, step: Step) -> tuple[Tensor, Tensor]:
        if step.empty:
            return step.k, step.v
        if step.past is None:
            assert step.tokens is not None
            past = self.quantizer.dequantize(step.tokens.narrow(0, step.tokens.count - step.count))
        else:
            past = step.past
        return torch.cat([past[0], step.k], 2), torch.cat([past[1], step.v], 2)

    def contents(self) -> tuple[Tensor, Tensor]:
        return self.quantizer.dequantize(self.buffers.narrow(0, self.length))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        self.length = max(self.length - self.removable(tokens_to_remove), 0)

    def reset(self) -> None:
        self.forget_steps()
        self.tokens = None
        self.is_initialized = False
        self.length = 0


class Int8SlidingLayer(Int8DynamicLayer):
    """The tokens that the next one may see, `sliding_window - 1`, at `start` to `start + length` of a buffer.

    When the buffer is full, they move to its front.
    """

    is_sliding = True

    def __init__(
        self, quantizer: HeadQuantizer, attention: Attention, sliding_window: int, **kwargs: Any
    ) -> None:
        super().__init__(quantizer, attention)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.start = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keeps tokens that have left the window until `crop`."""
        self.record_past = True

    @property
    def visible(self) -> int:
        """How many of the tokens a next one sees."""
        return min(self.length, self.sliding_window - 1)

    def append(self, k: Tensor, v: Tensor) -> Step:
        count, past, visible = k.shape[2], None, self.visible
        empty = self.length == 0
        self.cumulative_length += count
        stored = count
        if count > MAX_QUERY_TOKENS and not self.record_past:
            # Most of these may leave the window at once. Attention does not read them from the buffer.
            past = self.quantizer.dequantize(self._newest(visible))
            stored = min(count, self.sliding_window - 1)
            self._keep_newest(min(visible, self.sliding_window - 1 - stored))
        self._reserve(k, stored)
        end = self.start + self.length
        rest = count - stored
        self.quantizer.append(self.buffers.narrow(end, stored), k[:, :, rest:], v[:, :, rest:])
        tokens = self.buffers.narrow(end - visible, visible + count) if past is None else None
        self.length += stored
        if not self.record_past:
            self._keep_newest(self.visible)
        return Step(self, k, v, empty, tokens, past, first=visible)

    def _newest(self, count: int) -> Int8Tokens:
        return self.buffers.narrow(self.start + self.length - count, count)

    def _keep_newest(self, count: int) -> None:
        self.start, self.length = self.start + self.length - count, count

    def _reserve(self, k: Tensor, added: int) -> None:
        if self.start + self.length + added <= self.buffers.count:
            return
        kept = self._newest(self.length)
        needed = self.length + added
        if needed >= self.sliding_window:
            needed += GROWTH - MAX_QUERY_TOKENS  # so that tokens do not move at every step
        if needed > self.buffers.count:
            self.tokens = self.quantizer.allocate(k, -(-needed // GROWTH) * GROWTH)
        self.buffers.copy_from(0, kept)
        self.start = 0

    def contents(self) -> tuple[Tensor, Tensor]:
        return self.quantizer.dequantize(self._newest(self.length))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.cumulative_length, self.sliding_window - 1)
        return past + query_length, self.cumulative_length - past

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        count = self.removable(tokens_to_remove)
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise SmoothQuantError(
                f"Int8KVCache: crop cannot bring back tokens that have left the window of {self.sliding_window}; call "
                "activate_past_recording() on the cache before the tokens that are to be removed."
            )
        count = min(count, self.length)
        self.length -= count
        self.cumulative_length -= count
        self._keep_newest(self.visible)

    def reset(self) -> None:
        super().reset()
        self.start = self.cumulative_length = 0
