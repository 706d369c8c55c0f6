"""Argument checks of the ops with an int8 cache of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.ops.checks import FLOATS, fits_rotation, type_name
from smoothquant_kernels.reference import HEAD_MULTIPLE, kv_capacity, padded_k

#: The most channels of a head.
MAX_HEAD = 256
#: The most query tokens of a sequence in one call.
MAX_QUERY_TOKENS = 8


def _require(
    op: str,
    name: str,
    t: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    what: str,
    like: Tensor,
) -> None:
    if t is None:
        return
    if t.dtype not in dtypes:
        allowed = " or ".join(map(type_name, dtypes))
        raise TypeError(f"{op}: {name} must be {allowed}, got {type_name(t.dtype)}.")
    if t.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {t.device}, but the tokens are on {like.device}; move them to one device."
        )
    if tuple(t.shape) != shape:
        raise ValueError(
            f"{op}: {name} must have shape {list(shape)} ({what}), got {list(t.shape)}."
        )


def tokens(op: str, name: str, x: Tensor) -> None:
    """Requires [B, H, T, D] in a float type, with 1 to 256 channels."""
    if x.dtype not in FLOATS:
        allowed = " or ".join(map(type_name, FLOATS))
        raise TypeError(f"{op}: {name} must be {allowed}, got {type_name(x.dtype)}.")
    if x.dim() != 4 or not 1 <= x.shape[3] <= MAX_HEAD or x.shape[1] < 1:
        raise ValueError(
            f"{op}: {name} must have shape [B, H, T, D] with H >= 1 and D from 1 to {MAX_HEAD}, got {list(x.shape)}."
        )


def cache(op: str, name: str, cache: Tensor, scales: Tensor | None, x: Tensor, heads: int) -> None:
    """Checks one half of a cache, [blocks, H, block size, D padded], and its scales."""
    padded = padded_k(x.shape[3], HEAD_MULTIPLE)
    if cache.dim() != 4:
        raise ValueError(
            f"{op}: {name}_cache must have shape [blocks, {heads}, block size, {padded}], got {list(cache.shape)}."
        )
    blocks, _, block_size, _ = cache.shape
    what = f"heads of {x.shape[3]} channels, padded to a multiple of {HEAD_MULTIPLE}"
    shape = (blocks, heads, block_size, padded)
    _require(op, f"{name}_cache", cache, (torch.int8,), shape, what, x)
    if cache.stride()[2:] != (padded, 1) and cache.numel():
        raise ValueError(
            f"{op}: the tokens of a head must be adjacent in {name}_cache (strides [.., .., {padded}, 1]), "
            f"got strides {list(cache.stride())}; only blocks and heads may be strided."
        )
    what = "one scale per token and head"
    _require(op, f"{name}_scale", scales, (torch.float32,), shape[:3], what, x)
    if scales is not None and scales.stride(2) != 1 and scales.numel():
        raise ValueError(
            f"{op}: the tokens of a head must be adjacent in {name}_scale, got strides {list(scales.stride())}."
        )


def pages(op: str, k_cache: Tensor, block_table: Tensor | None, ring: bool, x: Tensor) -> None:
    """Checks how sequences are laid out in blocks."""
    batch, blocks = x.shape[0], k_cache.shape[0]
    if block_table is None:
        if blocks != batch:
            raise ValueError(
                f"{op}: without a block table each sequence has one block, got {batch} sequences and {blocks} blocks."
            )
        return
    if ring:
        raise ValueError(f"{op}: a ring has no block table; drop one of `ring` and `block_table`.")
    count = block_table.shape[1] if block_table.dim() == 2 else 1
    what = "the blocks of each sequence"
    _require(op, "block_table", block_table, (torch.int32,), (batch, count), what, x)
    if batch > blocks:
        raise ValueError(
            f"{op}: {batch} sequences need at least one block each, but the cache has {blocks} blocks; "
            "make it larger, or run fewer sequences at once."
        )


def heads(
    op: str, name: str, factors: Tensor | None, scales: Tensor | None, x: Tensor, heads: int
) -> None:
    """Checks factors per head and channel. They cannot be left out where there are no scales."""
    what = "a factor per head and channel"
    _require(op, name, factors, (torch.float32,), (heads, x.shape[3]), what, x)
    if factors is None and scales is None:
        raise ValueError(
            f"{op}: without scales per token (dynamic), {name} [{heads}, {x.shape[3]}] must give the static scales."
        )


def rotation(op: str, group: int, x: Tensor, static: bool) -> None:
    """Checks the rotation within a head."""
    if not fits_rotation(group, x.shape[3]):
        raise ValueError(
            f"{op}: rotation must be 0 or a power of two from 2 that divides D = {x.shape[3]}, got {group}."
        )
    if group and static:
        raise ValueError(
            f"{op}: static scales are those of channels before the rotation; drop `rotation`, or give scales per token."
        )


def values_on_cpu(t: Tensor | None) -> list[int] | None:
    """The numbers of a tensor that can be read without waiting for a GPU, or None (also for a fake tensor)."""
    if (
        t is None
        or type(t) is not Tensor
        or t.device.type != "cpu"
        or torch.compiler.is_compiling()
    ):
        return None
    return list(map(int, t.flatten().tolist()))


def positions(
    op: str,
    k_cache: Tensor,
    positions: Tensor | None,
    block_table: Tensor | None,
    ring: bool,
    x: Tensor,
) -> None:
    """Checks where tokens go. On a GPU only shapes: a token that does not fit is not written there."""
    _require(op, "positions", positions, (torch.int32,), x.shape[:1], "of each first token", x)
    count, capacity = x.shape[2], kv_capacity(k_cache, block_table)
    if count > capacity:
        raise ValueError(f"{op}: {count} tokens do not fit into a cache of {capacity}.")
    for row, first in enumerate(values_on_cpu(positions) or ()):
        if first < 0 or (first + count > capacity and not ring):
            raise ValueError(
                f"{op}: sequence {row} writes the positions {first} to {first + count - 1}, "
                f"but the cache holds 0 to {capacity - 1}; make it larger."
            )
    used = values_on_cpu(positions) or [0] * x.shape[0]
    block_numbers(op, k_cache, block_table, [first + count for first in used])


def lengths(
    op: str,
    k_cache: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    ring: bool,
    x: Tensor,
) -> None:
    """Checks how many tokens there are. On a GPU only shapes: the kernel reads no more than there is."""
    _require(op, "lengths", lengths, (torch.int32,), x.shape[:1], "tokens of each sequence", x)
    capacity = kv_capacity(k_cache, block_table)
    for row, length in enumerate(values_on_cpu(lengths) or ()):
        if length < 0 or (length > capacity and not ring):
            raise ValueError(
                f"{op}: sequence {row} has {length} tokens, but the cache holds 0 to {capacity}."
            )
    used = values_on_cpu(lengths) or [capacity] * x.shape[0]
    block_numbers(op, k_cache, block_table, used)


def block_numbers(op: str, k_cache: Tensor, block_table: Tensor | None, lengths: list[int]) -> None:
    """Checks the entries of a block table that are read for so many tokens of each sequence."""
    numbers = values_on_cpu(block_table)
    if numbers is None or block_table is None:
        return
    blocks, _, block_size, _ = k_cache.shape
    width = block_table.shape[1]
    for row, length in enumerate(lengths):
        for block in numbers[row * width :][: -(-length // block_size)]:
            if not 0 <= block < blocks:
                raise ValueError(
                    f"{op}: block_table gives sequence {row} block {block}, but the cache has blocks 0 to {blocks - 1}."
                )


def mask(op: str, mask: Tensor | None, q: Tensor, capacity: int) -> None:
    """Checks a mask [B or 1, Hq or 1, T, capacity]."""
    if mask is None:
        return
    batch, heads, count, _ = q.shape
    sizes = list(mask.shape)
    b, h = (sizes[0], sizes[1]) if len(sizes) == 4 else (1, 1)
    shape = (b if b in (1, batch) else batch, h if h in (1, heads) else heads, count, capacity)
    _require(op, "mask", mask, (torch.bool,), shape, "True: attend", q)


def value_tokens(op: str, v: Tensor, k: Tensor) -> None:
    """Requires v [B, H, T, Dv] to be of k's tokens."""
    tokens(op, "v", v)
    _require(op, "v", v, (k.dtype,), (*k.shape[:3], v.shape[3]), "the tokens and heads of k", k)


def halves(
    op: str, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Requires both halves of a cache to hold the same tokens, under one scheme."""
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"{op}: k_cache and v_cache must hold the same tokens, got {list(k_cache.shape)} and {list(v_cache.shape)}."
        )
    if (k_scale is None) != (v_scale is None):
        raise ValueError(
            f"{op}: give both of k_scale and v_scale (per token), or neither (static)."
        )


def rope(op: str, cos: Tensor | None, sin: Tensor | None, k: Tensor) -> None:
    """Checks the tables [B or 1, T, R] of a rotary embedding."""
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: give both of cos and sin, or neither.")
    if cos is None:
        return
    batch, _, count, dim = k.shape
    rows = 1 if cos.dim() == 3 and cos.shape[0] == 1 else batch
    width = cos.shape[-1] if cos.dim() else 0
    if width % 2 or not 2 <= width <= dim:
        raise ValueError(
            f"{op}: cos and sin must have shape [B or 1, T, R] with R even and from 2 to {dim}, got {list(cos.shape)}."
        )
    for name, table in (("cos", cos), ("sin", sin)):
        what = "of each new token"
        _require(op, name, table, FLOATS, (rows, count, width), what, k)


def query(op: str, q: Tensor, k_cache: Tensor) -> None:
    """Checks the number of query tokens and heads."""
    if q.shape[2] > MAX_QUERY_TOKENS:
        raise ValueError(
            f"{op}: q has {q.shape[2]} tokens of a sequence, at most {MAX_QUERY_TOKENS} are allowed; "
            "run a prompt on its float keys and values."
        )
    heads = k_cache.shape[1] if k_cache.dim() == 4 else 0
    if heads < 1 or q.shape[1] % heads:
        raise ValueError(
            f"{op}: the heads of k_cache [blocks, H, block size, D] must divide those of q [B, Hq, T, D], "
            f"got {list(k_cache.shape)} and {list(q.shape)}."
        )


def window(op: str, window: int) -> None:
    """Requires a number of tokens."""
    if window < 0:
        raise ValueError(f"{op}: window must be at least 0, got {window}.")
