"""Attention of a few tokens to an int8 cache of keys and values."""

from __future__ import annotations

from torch import Tensor

from smoothquant_kernels.ops import cache_checks as checks
from smoothquant_kernels.ops.registry import op, result
from smoothquant_kernels.reference import kv_capacity


@op()
def decode_attention_s8(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    *,
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
    """Causal attention of the newest tokens of each sequence to an int8 cache: quantizes q, then both products.

    Args:
        q: [B, Hq, T, D] float16, bfloat16 or float32, any strides with adjacent channels; T from 0 to 8, the newest
            tokens, whose keys `kv_append` has written. Quantized per token and head.
        k_cache, v_cache: [blocks, H, block size, D rounded up to a multiple of 16] int8, as `kv_append` writes them; H
            divides Hq, and query head h reads head h // (Hq / H).
        scale: of the scores, usually D ** -0.5.
        k_scale, v_scale: [blocks, H, block size] float32, or None for static scales.
        lengths: [B] int32, the tokens of each sequence, the new ones included; all that the cache holds if not given.
            Read on the device, so that one CUDA graph serves all lengths.
        block_table: [B, n] int32, as in `kv_append`.
        mask: [B or 1, Hq or 1, T, capacity] bool, True where a query may attend to a token, besides causality. Column 0
            is position 0; of a ring that has wrapped around, the oldest token.
        k_smooth, v_smooth: [H, D] float32, the factors whose reciprocals `kv_append` had. Without scales they are the
            static scales, and must be given.
        rotation, ring: as in `kv_append`. A ring that has wrapped around holds all that one query token may read, but
            not what the first of several could have read.
        window: a query attends to so many newest tokens, itself included; 0 for all.

    Returns:
        [B, Hq, T, D] in q's dtype, contiguous. A query that may attend to nothing (an empty cache, for instance) gives
        zeros. A token whose scale is not finite makes the outputs non-finite of those queries that attend to it.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape, stride or device does not fit; on a CPU also a length that the cache does not hold, or a
            block that does not exist. On a GPU no memory outside of the cache is read.

    Equivalent to (contiguous, without factors):
        q_q, q_scale = quantize(q, rotation=rotation)
        scores = (q_q.float() @ k_cache.float().mT) * k_scale[:, :, None] * q_scale[..., None]
        scores = scores * scale / max(rotation, 1)
        y = scores.masked_fill(~allowed, -inf).softmax(-1) @ (v_cache.float() * v_scale[..., None])
        y = rotate(y, rotation) / max(rotation, 1)

    Source: FlashAttention (Dao et al., 2022) and its split over the sequence (Flash-Decoding); int8 scores:
    SageAttention (Zhang et al., 2024).
    """
    name = "decode_attention_s8"
    checks.tokens(name, "q", q)
    checks.query(name, q, k_cache)
    heads = k_cache.shape[1]
    for half, cache, scales, smooth in (
        ("k", k_cache, k_scale, k_smooth),
        ("v", v_cache, v_scale, v_smooth),
    ):
        checks.cache(name, half, cache, scales, q, heads)
        checks.heads(name, f"{half}_smooth", smooth, scales, q, heads)
        checks.rotation(name, rotation, q, scales is None)
    checks.halves(name, k_cache, v_cache, k_scale, v_scale)
    checks.pages(name, k_cache, block_table, ring, q)
    checks.lengths(name, k_cache, lengths, block_table, ring, q)
    checks.mask(name, mask, q, kv_capacity(k_cache, block_table))
    checks.window(name, window)
    return result(q, tuple(q.shape), q.dtype)
