"""The writer of an int8 cache of keys and values."""

from __future__ import annotations

from torch import Tensor

from smoothquant_kernels.ops import cache_checks as checks
from smoothquant_kernels.ops.registry import op


@op(writes=("k_cache", "v_cache", "k_scale", "v_scale"))
def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
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
    """Quantizes new keys and values to int8 and writes them to a cache, in one pass.

    Args:
        k: [B, H, T, D] float16, bfloat16 or float32, any strides with adjacent channels; D from 1 to 256.
        v: [B, H, T, Dv], of k's dtype.
        k_cache: [blocks, H, block size, D rounded up to a multiple of 16] int8. Without a block table, block b is
            sequence b. The tokens of a head are adjacent; the strides of blocks and heads may be any, so a slice of
            tokens is a cache too.
        v_cache: likewise, with Dv.
        k_scale, v_scale: [blocks, H, block size] float32, receives a scale per token and head; None for static scales.
        positions: [B] int32, the position of the first new token of each sequence; 0 if not given.
        block_table: [B, n] int32, the block of the positions 0 to block size - 1 of a sequence, and so on.
        k_inv_smooth, v_inv_smooth: [H, D] float32, the reciprocals of factors per head and channel. With scales they
            smooth; without, they are the reciprocals of the static scales, and must be given.
        cos, sin: [B or 1, T, R] float, R even: rotary embedding of the first R channels of k, pairs (i, i + R / 2), in
            float32 without rounding to k's dtype; None if k has it already.
        rotation: as in `quantize`, within a head, of k and v alike; 0 for none. Not with static scales.
        ring: a position that the cache does not hold wraps around, so that it keeps the newest tokens.

    A token with a NaN or Inf has a non-finite scale. Under static scales Inf saturates and a NaN is stored as 0. Padded
    channels are written as 0. Two sequences must not share a block that is written.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: a shape, stride or device does not fit; on a CPU also a position that the cache does not hold, or a
            block that does not exist. On a GPU such a token is not written, because its position is not known to the
            host.

    Equivalent to (contiguous, without rotary embedding):
        for x, cache, scale, inv in ((k, k_cache, k_scale, k_inv_smooth), (v, v_cache, v_scale, v_inv_smooth)):
            x_q, x_scale = quantize(x.float() * inv[:, None], rotation=rotation)
            cache[b, :, positions[b] : positions[b] + T] = x_q[b]
            scale[b, :, positions[b] : positions[b] + T] = x_scale.view(B, H, T)[b]

    Source: SmoothQuant (Xiao et al., 2022); a scale per token and head: vLLM's and TensorRT-LLM's int8 caches; rotation
    of keys and values: QuaRot (Ashkboos et al., 2024), section 4; blocks: PagedAttention (Kwon et al., 2023).
    """
    name = "kv_append"
    checks.tokens(name, "k", k)
    checks.value_tokens(name, v, k)
    heads = k.shape[1]
    for half, x, cache, scale, inverse in (
        ("k", k, k_cache, k_scale, k_inv_smooth),
        ("v", v, v_cache, v_scale, v_inv_smooth),
    ):
        checks.cache(name, half, cache, scale, x, heads)
        checks.heads(name, f"{half}_inv_smooth", inverse, scale, x, heads)
        checks.rotation(name, rotation, x, scale is None)
    checks.halves(name, k_cache, v_cache, k_scale, v_scale)
    checks.rope(name, cos, sin, k)
    checks.pages(name, k_cache, block_table, ring, k)
    checks.positions(name, k_cache, positions, block_table, ring, k)
