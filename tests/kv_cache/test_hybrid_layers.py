"""Layers with linear attention beside attention: both halves follow every change, as in transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import cache_utils

from smoothquant_kernels.kv_cache import hybrid_layers
from smoothquant_kernels.kv_cache.step import ATTENTION, Attention
from smoothquant_kernels.kv_cache.tokens import HeadQuantizer
from tests.support.compare import assert_bitwise_equal
from tests.support.kv_cache import CAPACITY, WINDOW, after_int8, tokens

SIZE, SLIDE = {"max_cache_len": CAPACITY}, {"sliding_window": WINDOW}
LAYERS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "dynamic": (
        hybrid_layers.Int8HybridLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
        {},
    ),
    "sliding": (
        hybrid_layers.Int8HybridSlidingLayer,
        cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
        SLIDE,
    ),
    "static": (
        hybrid_layers.Int8HybridStaticLayer,
        cache_utils.LinearAttentionAndStaticFullAttentionLayer,
        SIZE,
    ),
    "ring": (
        hybrid_layers.Int8HybridStaticSlidingLayer,
        cache_utils.LinearAttentionAndStaticSlidingWindowAttentionLayer,
        {**SIZE, **SLIDE},
    ),
}


class Both:
    """Our layer and that of transformers, which get the same."""

    def __init__(self, name: str) -> None:
        ours, theirs, arguments = LAYERS[name]
        config = SimpleNamespace(_attn_implementation=ATTENTION)
        self.ours = ours(HeadQuantizer(0, None), Attention(config), number_of_states=2, **arguments)
        self.theirs = theirs(number_of_states=2, **arguments)

    def feed(self, count: int, seed: int) -> None:
        k, v = tokens(count, seed=seed), tokens(count, seed=seed + 50)
        self.ours.update(k, v)
        self.theirs.update(*after_int8(self.ours, k, v))
        for layer in (self.ours, self.theirs):
            for state in range(2):
                layer.update_conv_state(tokens(4, dim=3, seed=seed)[..., 0, :, 0], state_idx=state)
                layer.update_recurrent_state(tokens(4, seed=seed + state), state_idx=state)

    def call(self, name: str, *args: Any) -> None:
        for layer in (self.ours, self.theirs):
            getattr(layer, name)(*args)

    def check(self) -> None:
        assert_bitwise_equal(self.ours.keys, self.theirs.keys)
        assert_bitwise_equal(self.ours.values, self.theirs.values)
        for states in ("conv_states", "recurrent_states"):
            for state in range(2):
                assert_bitwise_equal(
                    getattr(self.ours, states)[state], getattr(self.theirs, states)[state]
                )
        for fact in ("is_compileable", "is_croppable", "is_sliding", "has_previous_state"):
            assert getattr(self.ours, fact) == getattr(self.theirs, fact), fact
        assert int(self.ours.get_seq_length()) == int(self.theirs.get_seq_length())
        assert self.ours.get_mask_sizes(1) == self.theirs.get_mask_sizes(1)


@pytest.mark.parametrize("name", LAYERS)
def test_both_halves_follow(name: str) -> None:
    both = Both(name)
    for seed, count in enumerate((5, 1, 7, 1)):
        both.feed(count, seed)
        both.check()
    both.call("reorder_cache", torch.tensor([1, 1]))
    both.check()
    both.call("offload")
    both.call("prefetch")
    both.check()
    both.call("reset")
    assert int(both.ours.get_seq_length()) == int(both.theirs.get_seq_length()) == 0
    assert not any(both.ours.has_previous_state.values())
    both.feed(4, 9)
    both.check()
    assert both.ours.get_max_length() == {"dynamic": -1, "static": CAPACITY}.get(name, WINDOW)


@pytest.mark.parametrize("name", ["dynamic", "sliding"])
def test_both_halves_crop(name: str) -> None:
    both = Both(name)
    both.feed(5, 1)
    both.call("activate_past_recording")
    assert not both.ours.is_compileable
    for seed, removed in enumerate((2, 0, 1, 3), 2):
        both.feed(4, seed)
        both.call("crop", -removed)
        both.check()
