"""W4A8: 4-bit weights that unpack to int8, in groups along K with small integer scales and offsets.

A weight has two levels of scales: `w_scale` [N] float32 per channel, as for int8, and for each group of 128 channels of
the input an integer step and offset, so that all groups add up in one int32:

    int8 weight = q * step + offset,  0 <= q <= 15,  0 <= step <= 15

`w_q4` [N, 64 G] uint8 and `w_group` [G, N, 2] int8 (step, offset) hold them, for G = ceil(K / 128) groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant_kernels.reference.gemm import gemm_s8

#: Channels of the input that share a step and an offset.
W4_GROUP = 128
#: The largest q, and the largest step: a product of both then fits the byte that a kernel computes it in.
W4_MAX = 15


def w4_groups(k: int) -> int:
    """How many groups K channels make. The last one may be shorter."""
    return -(-k // W4_GROUP)


def pack_w4(q: Tensor) -> Tensor:
    """Packs values 0 to 15 [N, K] into `w_q4` [N, 64 G] uint8. Channels beyond K become 0.

    Byte 16 t + 4 i + j of a group's 64 has channel 32 i + 4 t + j in its low half and channel 32 i + 16 + 4 t + j in
    its high half (t, i, j < 4). So lane t of four finds its words of four tensor-core steps in 16 adjacent bytes.
    """
    n, k = q.shape
    padded = torch.nn.functional.pad(q.to(torch.uint8), (0, w4_groups(k) * W4_GROUP - k))
    low, high = padded.view(n, -1, 4, 2, 4, 4).transpose(2, 4).unbind(3)  # [N, G, t, i, j]
    return (low | high << 4).reshape(n, -1)


def unpack_w4(w_q4: Tensor, k: int) -> Tensor:
    """The values 0 to 15 [N, K] uint8 of `pack_w4`."""
    n = len(w_q4)
    lanes = w_q4.view(n, -1, 4, 4, 4)
    both = torch.stack([lanes & W4_MAX, lanes >> 4], 3)  # [N, G, t, half, i, j]
    return both.transpose(2, 4).reshape(n, -1)[:, :k]


def w4_weight(w_q4: Tensor, w_group: Tensor, k: int) -> Tensor:
    """The int8 weight [N, K] that `w_q4` and `w_group` represent. Sums beyond a byte wrap around."""
    step, offset = w_group.transpose(0, 1).repeat_interleave(W4_GROUP, 1)[:, :k].unbind(-1)
    return unpack_w4(w_q4, k).to(torch.int8) * step + offset


def gemm_w4a8(
    x_q: Tensor,
    w_q4: Tensor,
    w_group: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """`gemm_s8` on the unpacked weight."""
    w_q = w4_weight(w_q4, w_group, x_q.shape[-1])
    return gemm_s8(x_q, w_q, x_scale, w_scale, bias, residual, out_dtype)
