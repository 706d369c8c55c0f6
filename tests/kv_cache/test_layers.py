"""Layers of an int8 cache hold what the layers of transformers would hold after int8, at every step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_kernels import SmoothQuantError
from smoothquant_kernels.kv_cache import attention
from smoothquant_kernels.kv_cache.layers import GROWTH, Int8Layer
from smoothquant_kernels.reference import rotate
from tests.support.compare import assert_bitwise_equal
from tests.support.kv_cache import (
    CAPACITY,
    LAYERS,
    WINDOW,
    after_int8,
    attend,
    make_layer,
    make_twin,
    mask_of,
    tokens,
)

#: Prompts that are shorter than the window, equal to it and longer; then single tokens and chunks, until it wraps.
RUNS = {
    "one_by_one": [1] * 25,
    "prompt": [5, 1, 1, 1, 1, 1, 1, 1],
    "window": [WINDOW, 1, 1, 3, 1],
    "window_less_one": [WINDOW - 1, 1, 1, 2, 1],
    "long_prompt": [30, 1, 1, 1, 20, 1, 8, 1],
    "chunks": [4, 4, 4, 4, 11, 2, 1],
    "pages": [63, 1, 1, 1, 1],
    "empty_step": [0, 3, 0, 1],
}


def step(layer: Int8Layer, twin: Any, k: Tensor, v: Tensor) -> None:
    """Gives both the same tokens, and compares what `update` returns."""
    k_read, v_read = after_int8(layer, k, v)
    count = k.shape[2]
    assert layer.get_mask_sizes(count) == twin.get_mask_sizes(count)
    where = int(layer.get_seq_length()) - layer.get_mask_sizes(count)[1]
    keys, values = (t.clone() for t in twin.update(k_read, v_read))
    keys[:, :, where : where + count], values[:, :, where : where + count] = k, v
    mine = layer.update(k, v)
    assert_bitwise_equal(mine[0], keys, "keys")
    assert_bitwise_equal(mine[1], values, "values")
    assert int(layer.get_seq_length()) == int(twin.get_seq_length())


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rotation", [0, None])
def test_update_returns_what_transformers_returns(
    name: str, run: str, rotation: int | None
) -> None:
    layer, twin = make_layer(name, rotation=rotation), make_twin(name)
    for seed, count in enumerate(RUNS[run]):
        step(layer, twin, tokens(count, seed=seed), tokens(count, dim=16, seed=seed + 100))
    assert layer.get_max_length() == twin.get_max_length()
    assert layer.is_sliding == twin.is_sliding
    assert layer.is_compileable == twin.is_compileable
    assert layer.is_croppable == twin.is_croppable


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "v_dim"), [(20, 20), (24, 8), (1, 1), (256, 256)])
def test_sizes_and_types(name: str, dtype: torch.dtype, dim: int, v_dim: int) -> None:
    layer, twin = make_layer(name), make_twin(name)
    for seed, count in enumerate([4, 1, 9, 1]):
        k, v = tokens(count, dim=dim, seed=seed), tokens(count, dim=v_dim, seed=seed + 9)
        step(layer, twin, k.to(dtype), v.to(dtype))
    assert layer.keys is not None and layer.keys.dtype == dtype
    assert layer.keys.shape == twin.keys.shape
    assert layer.values is not None and layer.values.shape == twin.values.shape


@pytest.mark.parametrize("name", LAYERS)
def test_keys_and_values_are_the_contents(name: str) -> None:
    layer, twin = make_layer(name), make_twin(name)
    assert layer.keys is None and layer.values is None and layer.get_seq_length() == 0
    for seed, count in enumerate([5, 1, 7, 1]):
        k, v = tokens(count, seed=seed), tokens(count, seed=seed + 9)
        layer.update(k, v)
        twin.update(*after_int8(layer, k, v))
        assert layer.keys is not None and layer.values is not None
        assert_bitwise_equal(layer.keys, twin.keys)
        assert_bitwise_equal(layer.values, twin.values)


def rounding_bound(
    layer: Int8Layer, q: Tensor, keys: Tensor, values: Tensor, scale: float
) -> Tensor:
    """The most that rounding q to int8 changes an output.

    A score changes by at most d = scale * q_scale / 2 * |k|_1, where q_scale = max|q| / 127. q and k are rotated by a
    matrix of size g with entries 1 and -1, and the product is divided by g. A weight then changes by a factor of at
    most exp(2 d), so the output by at most (exp(2 d) - 1) * 2 max|v|. Float32 rounding adds less than 1e-5.
    """
    groups = layer.quantizer.groups
    q_max, k_sum = rotate(q, groups).abs().amax(), rotate(keys, groups).abs().sum(-1).amax()
    d = scale / max(groups, 1) * q_max / 127 / 2 * k_sum
    return (torch.exp(2 * d) - 1) * 2 * values.abs().amax() + 1e-5


@pytest.mark.parametrize("run", ["one_by_one", "long_prompt", "chunks", "pages"])
@pytest.mark.parametrize("name", LAYERS)
def test_int8_attention_agrees_with_the_dequantized_cache(
    name: str, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    can = attention._kernel_can

    def counted(*args: Any) -> bool:
        calls.append(can(*args))
        return bool(calls[-1])

    monkeypatch.setattr(attention, "_kernel_can", counted)
    layer, plain = make_layer(name), make_layer(name, attention="sdpa")
    window = WINDOW if layer.is_sliding else None
    for seed, count in enumerate(RUNS[run]):
        k, v = (tokens(count, seed=seed + n) for n in (0, 50))
        q = tokens(count, heads=6, seed=seed + 99) / 8
        mask = mask_of(layer, count, window)
        first = int(plain.get_seq_length()) - plain.get_mask_sizes(count)[1]
        keys, values = plain.update(k, v)
        y = attend(layer, q, k, v, mask)
        if seed and calls[-1]:  # the kernel reads the new tokens, too, from the cache
            new = slice(first, first + count)
            keys[:, :, new], values[:, :, new] = after_int8(layer, k, v)
        expected = nn.functional.scaled_dot_product_attention(
            q, keys, values, mask, enable_gqa=True
        )
        if count:
            bound = rounding_bound(plain, q, keys, values, 16**-0.5)
            assert (y.transpose(1, 2) - expected).abs().amax() <= bound
        assert_bitwise_equal(layer.keys, plain.keys)  # type: ignore[arg-type]
    # Every step of 1 to 8 tokens runs the kernel, but for the first tokens and chunks on a ring that wraps around.
    able = [count <= 8 for count in RUNS[run][1:]]
    if name == "ring":
        seen = torch.tensor(RUNS[run]).cumsum(0)[1:].tolist()
        able = [
            count <= 8 and (count == 1 or total <= WINDOW)
            for count, total in zip(RUNS[run][1:], seen, strict=True)
        ]
    assert calls == able


def test_lengths_around_a_page() -> None:
    """1, 63, 64 and 65 tokens, by prompt and one by one, hold the same bits, with at most 63 empty places."""
    for count in (1, 63, 64, 65, 128):
        k, v = tokens(count, seed=1), tokens(count, seed=2)
        at_once, single = make_layer("dynamic"), make_layer("dynamic")
        at_once.update(k, v)
        for t in range(count):
            single.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
        for one, other in zip(at_once.buffers.tensors(), single.buffers.tensors(), strict=True):
            assert_bitwise_equal(one[:, :, :count], other[:, :, :count])
            assert one.shape[2] == other.shape[2] == -(-count // GROWTH) * GROWTH


@pytest.mark.parametrize("name", ["dynamic", "static", "sliding"])
@pytest.mark.parametrize("removed", [0, 1, 4, 7])
def test_crop_forgets_tokens(name: str, removed: int) -> None:
    """Cropped tokens leave no trace: what comes later is the same, bit for bit, as if they had never been."""
    cropped, never = make_layer(name), make_layer(name)
    k, v = tokens(1, seed=1), tokens(1, seed=2)
    for layer in (cropped, never):
        layer.update(k, v)
    lost = torch.full_like(tokens(removed), torch.nan)
    if removed:
        cropped.update(lost, lost)
    cropped.crop(-removed)
    for seed, count in enumerate([1, 3, 1]):
        k, v = tokens(count, seed=seed), tokens(count, seed=seed + 9)
        q = tokens(count, heads=4, seed=seed + 99)
        masks = [mask_of(layer, count) for layer in (cropped, never)]
        assert torch.equal(*masks)
        assert_bitwise_equal(*(attend(x, q, k, v, masks[0]) for x in (cropped, never)))
        assert_bitwise_equal(cropped.keys, never.keys)  # type: ignore[arg-type]


def test_crop_of_a_window_needs_recording() -> None:
    layer = make_layer("sliding")
    layer.update(tokens(12), tokens(12))
    with pytest.raises(
        SmoothQuantError, match="left the window of 9; call activate_past_recording"
    ):
        layer.crop(-1)
    ring = make_layer("ring")
    ring.update(tokens(12), tokens(12))
    with pytest.raises(SmoothQuantError, match="left the window of 9; give a max_cache_len"):
        ring.crop(-1)
    for name in LAYERS:
        with pytest.raises(SmoothQuantError, match="as a negative number, got 3"):
            make_layer(name).crop(3)


@pytest.mark.parametrize("candidates", [1, 3, 8, 15])
def test_a_recording_window_crops_as_transformers_does(candidates: int) -> None:
    layer, twin = make_layer("sliding"), make_twin("sliding")
    for each in (layer, twin):
        each.activate_past_recording()
    for seed in range(12):
        count = candidates if seed else 7
        step(layer, twin, tokens(count, seed=seed), tokens(count, seed=seed + 99))
        for each in (layer, twin):
            each.crop(-(seed % (candidates + 1) if seed else 0))
        assert_bitwise_equal(layer.keys, twin.keys)  # type: ignore[arg-type]
        assert layer.get_mask_sizes(1) == twin.get_mask_sizes(1)
    buffer = layer.buffers.count
    assert buffer <= WINDOW + candidates + 2 * GROWTH


@pytest.mark.parametrize("name", LAYERS)
def test_sequences_move_as_in_transformers(name: str) -> None:
    layer, twin = make_layer(name), make_twin(name)
    step(layer, twin, tokens(5, batch=3, seed=1), tokens(5, batch=3, seed=2))
    for each in (layer, twin):
        each.reorder_cache(torch.tensor([2, 0, 0]))
    step(layer, twin, tokens(1, batch=3, seed=3), tokens(1, batch=3, seed=4))
    layer.batch_repeat_interleave(2)
    keys = layer.keys
    assert keys is not None and keys.shape[0] == 6
    assert_bitwise_equal(keys[0::2], keys[1::2])
    layer.batch_select_indices(torch.tensor([5, 0]))
    assert_bitwise_equal(layer.keys, keys[[5, 0]])  # type: ignore[arg-type]
    layer.batch_select_indices(torch.tensor([False, True]))
    assert_bitwise_equal(layer.keys, keys[[0]])  # type: ignore[arg-type]
    layer.update(tokens(1, batch=1, seed=7), tokens(1, batch=1, seed=8))


@pytest.mark.parametrize("name", LAYERS)
def test_reset_and_use_again(name: str) -> None:
    layer = make_layer(name)
    k, v = tokens(12, seed=1), tokens(12, seed=2)
    first = layer.update(k, v)
    layer.update(torch.full_like(k[:, :, :1], torch.nan), v[:, :, :1])
    layer.reset()
    assert int(layer.get_seq_length()) == 0
    again = layer.update(k, v)
    assert_bitwise_equal(again[0], first[0])
    assert_bitwise_equal(again[1], first[1])


@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_is_independent(name: str) -> None:
    layer = make_layer(name)
    k, v = tokens(6, seed=1), tokens(6, seed=2)
    layer.update(k, v)
    other = copy.deepcopy(layer)
    kept = layer.keys
    other.update(k[:, :, :1], v[:, :, :1])
    assert other.attention is layer.attention  # of the same model
    assert_bitwise_equal(layer.keys, kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYERS)
def test_nan_stays_in_its_sequence(name: str) -> None:
    clean, layer = make_layer(name), make_layer(name)
    for seed, count in enumerate([4, 1, 1, 2]):
        k, v = tokens(count, seed=seed), tokens(count, seed=seed + 9)
        q = tokens(count, heads=4, seed=seed + 99)
        bad = k.clone()
        if seed == 1:
            bad[1, 0, 0, 3] = torch.nan
        mask = mask_of(clean, count)
        expected = attend(clean, q, k, v, mask)
        y = attend(layer, q, bad, v, mask)
        assert_bitwise_equal(y[0], expected[0])
    assert y[1, :, :2].isnan().all() and not y[1, :, 2:].isnan().any()  # the query heads of head 0


def test_a_wide_window_moves_onto_itself() -> None:
    """The tokens that move to the front of the buffer lie where they go, too."""
    layer, all_of_it = make_layer("sliding", sliding_window=200), make_layer("dynamic")
    for seed, count in enumerate([250, *[2] * 70]):
        k, v = tokens(count, seed=seed), tokens(count, seed=seed + 500)
        layer.update(k, v)
        all_of_it.update(k, v)
    for one, other in zip(layer.contents(), all_of_it.contents(), strict=True):
        assert_bitwise_equal(one, other[:, :, -199:])


def test_a_window_buffer_does_not_grow() -> None:
    layer = make_layer("sliding")
    sizes = set()
    for seed in range(400):
        layer.update(tokens(1, seed=seed), tokens(1, seed=seed))
        sizes.add(layer.buffers.count)
    assert max(sizes) <= WINDOW + 126
    layer.update(tokens(300), tokens(300))
    assert layer.buffers.count <= WINDOW + 126
    wide = make_layer("sliding", sliding_window=200)
    for count in (190, 1, 150, 9, 300, 1, 1):
        wide.update(tokens(count), tokens(count))
    assert wide.buffers.count <= 200 + 126


@pytest.mark.parametrize("name", ["static", "ring"])
def test_an_exported_program_does_not_take_the_cache_for_empty(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    layer = make_layer(name)
    kwargs: dict[str, Any] = {}
    k, v = layer.update(tokens(1), tokens(1), kwargs=kwargs)
    assert not kwargs and k.shape[2] == v.shape[2] == layer.get_max_length()


@pytest.mark.parametrize("name", LAYERS)
def test_tokens_of_inference_mode_can_go_on_without_it(name: str) -> None:
    layer = make_layer(name)
    with torch.inference_mode():
        layer.update(tokens(5, seed=1), tokens(5, seed=2))
    k, v = layer.update(tokens(1, seed=3), tokens(1, seed=4))
    assert int(layer.get_seq_length()) == 6 and not k.is_inference() and not v.is_inference()


def test_offload_moves_int8_and_scales() -> None:
    layer = make_layer("dynamic")
    layer.offload()  # nothing to move yet
    layer.update(tokens(3), tokens(3))
    kept = layer.keys
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {t.device.type for t in layer.buffers.tensors()} == {"meta"}
    layer = make_layer("dynamic")
    layer.update(tokens(3), tokens(3))
    layer.offload()
    layer.prefetch()
    assert_bitwise_equal(layer.keys, kept)  # type: ignore[arg-type]


def test_offload_leaves_the_length_of_a_fixed_size() -> None:
    layer: Any = make_layer("static")
    layer.update(tokens(3), tokens(3))
    length = layer.lengths
    layer.device = torch.device("meta")
    layer.prefetch()
    assert layer.lengths is length


def test_more_tokens_than_a_fixed_size_holds() -> None:
    layer = make_layer("static")
    layer.update(tokens(CAPACITY), tokens(CAPACITY))
    with pytest.raises(ValueError, match=f"the cache holds 0 to {CAPACITY - 1}; make it larger"):
        layer.update(tokens(1), tokens(1))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", [9, GROWTH])
def test_another_number_of_sequences_is_refused(name: str, count: int) -> None:
    """A layer that must grow would copy its one sequence to all, and a layer that need not would not."""
    layer = make_layer(name)
    k = tokens(count, batch=1)
    layer.update(k, k, kwargs={})
    layer.waiting = None
    other, heads = tokens(1, batch=3), tokens(1, batch=1, heads=4)
    with pytest.raises(SmoothQuantError, match=r"layer 0 holds 1 sequences .* of 3 sequences"):
        layer.update(other, other, kwargs={})
    with pytest.raises(SmoothQuantError, match=r"of 2 heads, got tokens .* of 4 heads"):
        layer.update(heads, heads, kwargs={})
    assert int(layer.get_seq_length()) == count
    layer.batch_repeat_interleave(3)
    assert layer.update(other, other)[0].shape[0] == 3


@pytest.mark.parametrize("name", LAYERS)
def test_sequences_that_change_in_inference_mode(name: str) -> None:
    """What was made there could not be written outside of it."""
    layer = make_layer(name)
    k = tokens(3)
    with torch.inference_mode():
        layer.update(k, k)
        layer.reorder_cache(torch.tensor([1, 0]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0, 3]))
    assert not any(t.is_inference() for t in layer.buffers.tensors())
    assert layer.update(k, k)[0].shape[2] >= 6
