"""The INT8 KV cache and attention to it."""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.reference.rows import pad_k, quantize, rotate, round_to_int8

#: The channels of a head in an int8 cache are padded with zeros to a multiple of this, the bytes of one copy.
HEAD_MULTIPLE = 16


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of float32 x [B, H, T, D]: pairs (i, i + R / 2) of the first R channels; cos, sin [B, T, R].

    Two products and a sum, each rounded once. A batch of 1 in cos and sin serves all sequences.
    """
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return torch.cat([turned * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def kv_capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """How many tokens of a sequence a cache [blocks, H, block size, D] holds."""
    return cache.shape[2] * (1 if block_table is None else block_table.shape[1])


def kv_slots(positions: Tensor, cache: Tensor, block_table: Tensor | None) -> tuple[Tensor, Tensor]:
    """(block, slot in it), both [B, T], of the tokens at `positions` [B, T] of their sequences.

    Without a block table, block b is sequence b, and a position wraps around at the end of it.
    """
    block_size = cache.shape[2]
    rows = torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions)
    if block_table is None:
        return rows, positions % block_size
    return block_table.long()[rows, positions // block_size], positions % block_size


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    positions: Tensor | None = None,
    block_table: Tensor | None = None,
    k_inv_smooth: Tensor | None = None,
    v_inv_smooth: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotation: int = 0,
    ring: bool = False,
) -> None:
    """Quantizes k and v [B, H, T, D] and writes them to an int8 cache. See `ops.kv_append`.

    * With scales: `quantize` per token and head, with the marks of NaN and Inf.
    * Without (static): the factors are the scales, and values saturate. A NaN is stored as 0.
    """
    first = torch.zeros(len(k), 1, device=k.device) if positions is None else positions[:, None]
    where = first.long() + torch.arange(k.shape[2], device=k.device)
    block, slot = kv_slots(where, k_cache, block_table)
    if cos is not None and sin is not None:
        k = rope(k.float(), cos, sin)
    for x, cache, scales, inverse in (
        (k, k_cache, k_scale, k_inv_smooth),
        (v, v_cache, v_scale, v_inv_smooth),
    ):
        x = x.float().transpose(1, 2)  # [B, T, H, D]
        x = x if inverse is None else x * inverse
        if scales is None:
            x_q = round_to_int8(rotate(x, rotation))
        else:
            x_q, scale = quantize(x, rotation=rotation)
            scales[block, :, slot] = scale.view(x.shape[:-1])
        cache[block, :, slot] = pad_k(x_q, HEAD_MULTIPLE)


def attendable(
    position: Tensor, end: Tensor, tokens: int, capacity: int, window: int, mask: Tensor | None
) -> Tensor:
    """Which slots, at `position` [B, slots], the last tokens before `end` [B, 1] read: [B, 1 or Hq, T, slots]."""
    newest = end[..., None] - tokens + torch.arange(tokens, device=end.device)[:, None]  # [B, T, 1]
    oldest = (newest - window + 1).clamp(min=0) if window else 0
    allowed = ((position[:, None] >= oldest) & (position[:, None] <= newest))[:, None]
    if mask is None:
        return allowed
    column = (position - (end - capacity).clamp(min=0)).clamp(min=0)[:, None, None]
    mask = mask.expand(len(position), -1, -1, -1)
    return allowed & mask.gather(3, column.expand(*mask.shape[:3], position.shape[1]))


def decode_attention_s8(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    lengths: Tensor | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    k_smooth: Tensor | None = None,
    v_smooth: Tensor | None = None,
    rotation: int = 0,
    window: int = 0,
    ring: bool = False,
) -> Tensor:
    """Attention of the newest T tokens q [B, Hq, T, D] to an int8 cache. See `ops.decode_attention_s8`.

    Scores are exact; softmax and the sum over tokens are float64.
    """
    batch, heads, tokens, dim = q.shape
    capacity, device, group = kv_capacity(k_cache, block_table), q.device, heads // k_cache.shape[1]
    if lengths is None:
        lengths = torch.full((batch,), capacity, device=device)
    end = lengths.long()[:, None]
    position = torch.arange(capacity, device=device).expand(batch, capacity)
    if ring:  # slot j holds the newest position that is j modulo the capacity
        position = end - 1 - (end - 1 - position) % capacity
    if block_table is not None:  # whatever stands in it for tokens that do not exist
        block_table = block_table.clamp(0, len(k_cache) - 1)
    block, slot = kv_slots(position.clamp(min=0), k_cache, block_table)

    def of_cache(t: Tensor) -> Tensor:  # [B, Hq, capacity, ...]
        return t[block, :, slot].transpose(1, 2).repeat_interleave(group, 1)

    allowed = attendable(position, end, tokens, capacity, window, mask)
    v = q.float()
    if k_smooth is not None:
        v = v * k_smooth.repeat_interleave(group, 0)[:, None]
    (q_q, q_scale), groups = quantize(v, rotation=rotation), max(rotation, 1)
    scores = (q_q.double() @ of_cache(k_cache)[..., :dim].double().mT).float()
    if k_scale is not None:
        scores = scores * of_cache(k_scale)[:, :, None]
    scores = scores * (q_scale.view(*q.shape[:-1], 1) * (scale / groups))
    weights = scores.double().masked_fill(~allowed, -torch.inf)
    weights = torch.where(allowed.any(-1, keepdim=True), weights.softmax(-1), 0.0)
    values = of_cache(v_cache)[..., :dim].double()
    if v_scale is not None:
        values = values * of_cache(v_scale)[..., None]
    whole = values.isfinite().all(-1)
    y = rotate((weights @ torch.where(whole[..., None], values, 0.0)).float(), rotation) / groups
    y = torch.where((allowed & ~whole[:, :, None]).any(-1, keepdim=True), torch.nan, y)
    if v_smooth is not None:
        y = y * v_smooth.repeat_interleave(group, 0)[:, None]
    return y.to(q.dtype)
