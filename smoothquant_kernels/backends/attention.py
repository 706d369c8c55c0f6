"""Attention to an int8 cache on a CPU without compiled kernels: PyTorch's float32 products.

A score is a sum of at most 256 products of int8, so float32 holds it exactly in any order. The softmax and the sum over
tokens are float32, where the reference has float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels import reference
from smoothquant_kernels.ops.registry import cpu_kernel


@cpu_kernel("decode_attention_s8")
def decode_attention_s8(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    lengths: Tensor | None,
    block_table: Tensor | None,
    mask: Tensor | None,
    k_smooth: Tensor | None,
    v_smooth: Tensor | None,
    rotation: int,
    window: int,
    ring: bool,
) -> Tensor:
    batch, heads, tokens, dim = q.shape
    kv_heads, capacity = k_cache.shape[1], reference.kv_capacity(k_cache, block_table)
    group = heads // kv_heads
    if lengths is None:
        lengths = torch.full((batch,), capacity)
    end = lengths.long()[:, None]
    used = capacity if ring or not batch else min(capacity, int(end.max()))
    position = torch.arange(used).expand(batch, used)
    if ring:  # slot j holds the newest position that is j modulo the capacity
        position = end - 1 - (end - 1 - position) % max(capacity, 1)
    table = None if block_table is None else block_table.clamp(0, len(k_cache) - 1)

    def of_cache(t: Tensor) -> Tensor:  # [B, H, used, ...]
        if table is None:
            return t[:, :, :used]
        block, slot = reference.kv_slots(position, k_cache, table)
        return t[block, :, slot].transpose(1, 2)

    def rows(t: Tensor) -> Tensor:  # [B, Hq, T, ...] as [B, H, Hq / H * T, ...]
        return t.unflatten(1, (kv_heads, group)).flatten(2, 3)

    allowed = reference.attendable(position, end, tokens, capacity, window, mask)
    allowed = rows(allowed.expand(batch, heads, tokens, used))
    v = q.float()
    if k_smooth is not None:
        v = v * k_smooth.repeat_interleave(group, 0)[:, None]
    q_q, q_scale = reference.quantize(v, rotation=rotation)
    groups = max(rotation, 1)
    scores = rows(q_q).float() @ of_cache(k_cache)[..., :dim].float().mT  # exact
    if k_scale is not None:
        scores = scores * of_cache(k_scale)[:, :, None]
    scores = scores * rows(q_scale.view(batch, heads, tokens, 1) * (scale / groups))
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    if v_scale is not None:
        weights = weights * of_cache(v_scale)[:, :, None]
    weights = torch.where(allowed, weights, 0.0)  # a row without any token has NaN in all places
    y = (weights @ of_cache(v_cache)[..., :dim].float()).view(batch, heads, tokens, dim)
    y = reference.rotate(y, rotation) / groups
    if v_smooth is not None:
        y = y * v_smooth.repeat_interleave(group, 0)[:, None]
    return y.to(q.dtype)
