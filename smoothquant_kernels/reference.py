"""The specification: what every kernel of this package computes, in plain PyTorch.

Where a kernel and this file disagree, one of them has a bug. The code is written to be read, not to be fast. It gives
the same bits on every device and at every thread count: integer sums are exact, each float32 operation is rounded once
in the order written, and sums of many terms are taken in float64.

Names follow the glossary of docs/internals/numerics.md: `x` [..., K] activation, `w` [N, K] weight, `M` its rows
(tokens), `inv_smooth` [K] float32 = 1 / s, `x_scale` [M] or [1], `w_scale` [N] or [1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smoothquant_kernels.schemes import MAX_ROTATION as MAX_ROTATION

QMAX = 127
#: |int8 product| <= 2**14, so this many of them always fit a signed 32-bit accumulator.
MAX_K = 131_071
#: Smaller scales count as zero, because their reciprocal would overflow.
MIN_SCALE = torch.finfo(torch.float32).tiny

#: Activation functions of `act_quantize` on float64. The result is rounded once to float32.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
#: Kinds that read one fused [..., 2K] tensor, gate first: kind -> activation.
FUSED_KINDS = {"silu_mul": "silu", "gelu_mul": "gelu", "gelu_tanh_mul": "gelu_tanh"}
#: Channels of gate, then as many of up, in the weight of `gemm_s8_gated`. One thread of a GPU holds the sums of both.
GATE_BLOCK = 8
#: The channels of a head in an int8 cache are padded with zeros to a multiple of this, the bytes of one copy.
HEAD_MULTIPLE = 16


def scale_from_absmax(absmax: Tensor) -> Tensor:
    """`absmax / 127` in float32, or zero where that is below the smallest normal number. NaN and Inf stay."""
    # The divisor is a tensor, because PyTorch divides a CUDA tensor by a Python number with a rounded reciprocal.
    scale = absmax.float() / torch.full_like(absmax, QMAX, dtype=torch.float32)
    return torch.where(scale < MIN_SCALE, torch.zeros_like(scale), scale)


def inverse_scale(scale: Tensor) -> Tensor:
    """`1 / scale` in float32, or 0 where the scale is 0, negative, NaN or Inf, so that such a row quantizes to 0."""
    usable = (scale >= MIN_SCALE) & torch.isfinite(scale)
    return torch.where(usable, torch.ones_like(scale) / scale, torch.zeros_like(scale))


def round_to_int8(x: Tensor) -> Tensor:
    """Round half to even, saturate to [-127, 127], NaN becomes 0."""
    return torch.nan_to_num(torch.round(x), nan=0.0).clamp(-QMAX, QMAX).to(torch.int8)


def padded_k(k: int, k_multiple: int) -> int:
    """K rounded up to a multiple of `k_multiple`."""
    return (k + k_multiple - 1) // k_multiple * k_multiple


def pad_k(x_q: Tensor, k_multiple: int) -> Tensor:
    """`x_q` [..., K] with columns of zeros up to `padded_k`. They add nothing to a GEMM with a weight padded alike."""
    k = x_q.shape[-1]
    return torch.nn.functional.pad(x_q, (0, padded_k(k, k_multiple) - k))


def rotate(v: Tensor, group: int) -> Tensor:
    """Multiplies each `group` adjacent channels of v [..., K] by the Hadamard matrix with entries 1 and -1.

    A rotation times sqrt(group): `rotate(rotate(v, group), group)` is `group * v`. Stage by stage, sums and
    differences of channels that are 1, 2, 4, ..., group / 2 apart, each rounded once. 0 leaves v as it is.
    """
    h = 1
    while h < group:
        low, high = v.unflatten(-1, (v.shape[-1] // (2 * h), 2, h)).unbind(-2)
        v = torch.stack([low + high, low - high], -2).flatten(-3)
        h *= 2
    return v


def rotate_weight(w: Tensor, group: int) -> Tensor:
    """A float32 weight [N, K] for an input that `rotate` changes: `rotate(x, group) @ result.T` is `x @ w.T`."""
    return rotate(w, group) / group if group else w  # exact, because the group is a power of two


def quantize(
    x: Tensor,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    granularity: str = "token",
    k_multiple: int = 1,
    rotation: int = 0,
) -> tuple[Tensor, Tensor]:
    """Divides by the smoothing factors, rotates groups of channels and quantizes. See `ops.quantize`.

    * Dynamic per token: `x_scale[m] = max_k |x * inv_smooth| / 127`. A row with a NaN or Inf gets a NaN or Inf scale
      and zeros, which makes the products of this row alone non-finite.
    * Dynamic per tensor: one scale [1]. A NaN or Inf anywhere makes it, and so every product, non-finite.
    * Static (`scale` given): values saturate. `x_scale[m] = scale`, or NaN for a row with a NaN or Inf, so that NaN
      propagates under a static scale as it does under a dynamic one.

    `pad_k` pads the result to `k_multiple`.
    """
    v = x.float()
    if inv_smooth is not None:
        v = v * inv_smooth
    v = rotate(v, rotation)
    rows = v.reshape(-1, v.shape[-1]).contiguous()
    absmax = rows.abs().amax(dim=-1)  # amax propagates NaN
    if scale is not None:
        inverse = inverse_scale(scale.float())
        x_scale = torch.where(torch.isfinite(absmax), scale.float(), torch.nan)
    else:
        if granularity == "tensor":
            absmax = absmax.amax(dim=0, keepdim=True) if len(absmax) else absmax.new_zeros(1)
        x_scale = scale_from_absmax(absmax)
        inverse = inverse_scale(x_scale)
    x_q = round_to_int8(rows * inverse[:, None]).reshape(x.shape)
    return pad_k(x_q, k_multiple), x_scale


def quantize_weight(w: Tensor, granularity: str = "channel") -> tuple[Tensor, Tensor]:
    """Quantize a weight [N, K] per output channel (`w_scale` [N]) or per tensor (`w_scale` [1])."""
    return quantize(w, granularity={"channel": "token", "tensor": "tensor"}[granularity])


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Correctly rounded float32 `a * b + c`, as the GPU's and CPU's fused multiply-add compute it.

    The float64 product of two float32 numbers is exact. The float64 sum is not, and rounding it to float32 could round
    twice. So its last bit is made odd whenever bits were lost (round to odd, Boldo & Melquiond 2008), which leaves the
    second rounding as the only one.
    """
    p, c64 = torch.broadcast_tensors(a.double() * b.double(), c.double())
    s = p + c64
    t = s - p
    lost = (p - (s - t)) + (c64 - t)  # Knuth's TwoSum: s + lost is the exact sum
    even = (s.contiguous().view(torch.int64) & 1) == 0
    adjust = torch.isfinite(s) & torch.isfinite(lost) & (lost != 0) & even
    towards = torch.where(lost > 0, torch.inf, -torch.inf).to(s.dtype)
    return torch.where(adjust, torch.nextafter(s, towards), s).float()


def gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """INT8 GEMM with fused dequantization: `fma(acc * w_scale, x_scale, bias) + residual`, rounded once."""
    acc = x_q.reshape(-1, x_q.shape[-1]).double() @ w_q.double().T  # exact
    y = acc.to(torch.int32).float() * w_scale.float()  # through int32, which has no -0
    x_column = x_scale.float()[:, None]
    y = y * x_column if bias is None else fma(y, x_column, bias.float())
    if residual is not None:
        y = y + residual.reshape(y.shape).float()
    return y.to(out_dtype).reshape(*x_q.shape[:-1], w_q.shape[0])


def gemm_s8_requant(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`gemm_s8` whose float32 result is quantized by a static scale, after an optional ReLU."""
    y = gemm_s8(x_q, w_q, x_scale, w_scale, bias, out_dtype=torch.float32)
    if relu:
        y = torch.relu(y)
    return round_to_int8(y * inverse_scale(out_scale.float()))


def gate_up_order(channels: int) -> Tensor:
    """The row of gate-then-up [2 * channels] that stands at each row of the interleaved weight of `gemm_s8_gated`.

    Blocks of 8 rows of gate and 8 of up take turns. If 8 does not divide `channels`, the last two are shorter.
    """
    blocks = torch.arange(2 * channels).view(2, channels).split(GATE_BLOCK, dim=1)
    return torch.cat([block.flatten() for block in blocks])


def interleave_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """The rows of gate and up [I, ...] in the order of `gate_up_order`: weights, scales, biases of `gemm_s8_gated`."""
    return torch.cat([gate, up])[gate_up_order(len(gate)).to(gate.device)]


def separate_gate_up(y: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up), each [..., I], of columns [..., 2 I] in the order of `gate_up_order`."""
    order = torch.argsort(gate_up_order(y.shape[-1] // 2)).to(y.device)
    gate, up = y[..., order].chunk(2, dim=-1)
    return gate, up


def gemm_s8_gated(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    kind: str = "silu_mul",
    bias: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """`gemm_s8` with a weight in `gate_up_order`, rounded to `dtype`, then act(gate) * up, quantized."""
    y = gemm_s8(x_q, w_q, x_scale, w_scale, bias, out_dtype=dtype)
    gate, up = separate_gate_up(y)
    return quantize(activation(up, FUSED_KINDS[kind], gate), inv_smooth, out_scale)


def add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """`x + residual` in float32, rounded to x's type, as the unfused model adds it and the next layer reads it."""
    return x if residual is None else (x.float() + residual.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Float32 RMSNorm: `(x * rstd) * weight`, the mean of squares taken in float64."""
    rstd = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps).float()
    return (x.float() * rstd) * weight.float()


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Float32 LayerNorm: `((x - mean) * rstd) * weight + bias`, mean and variance taken in float64."""
    mean = x.double().mean(-1, keepdim=True)
    rstd = torch.rsqrt((x.double() - mean).square().mean(-1, keepdim=True) + eps).float()
    y = (x.float() - mean.float()) * rstd
    if weight is not None:
        y = y * weight.float()
    return y if bias is None else y + bias.float()


def activation(x: Tensor, kind: str, gate: Tensor | None = None) -> Tensor:
    """Float32 `act(x)`, or `act(gate) * x`, or for the fused kinds `act(x[..., :K]) * x[..., K:]`."""
    if kind in FUSED_KINDS:
        gate, x = x.chunk(2, dim=-1)
        kind = FUSED_KINDS[kind]
    act = ACTIVATIONS[kind]
    if gate is None:
        return act(x.double()).float()
    return act(gate.double()).float() * x.float()


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
    """Which slots the newest tokens may attend to: [B, 1 or Hq, T, slots].

    `position` [B, slots] is that of each slot, negative for none; `end` [B, 1] the tokens of each sequence.
    """
    newest = end[..., None] - tokens + torch.arange(tokens, device=end.device)[:, None]  # [B, T, 1]
    allowed = (position[:, None] >= 0) & (position[:, None] <= newest)
    if window:
        allowed = allowed & (position[:, None] > newest - window)
    allowed = allowed[:, None]
    if mask is not None:
        column = (position - (end - capacity).clamp(min=0)).clamp(min=0)[:, None, None]
        mask = mask.expand(len(position), -1, -1, -1)
        allowed = allowed & mask.gather(3, column.expand(*mask.shape[:3], position.shape[1]))
    return allowed


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

    Scores are exact sums of products of int8, times scales in float32. Softmax and the sum over tokens are float64.
    A query that may attend to nothing gives zeros.
    """
    batch, heads, tokens, dim = q.shape
    capacity, device = kv_capacity(k_cache, block_table), q.device
    group = heads // k_cache.shape[1]
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
    q_q, q_scale = quantize(v, rotation=rotation)
    groups = max(rotation, 1)
    k_q = of_cache(k_cache)[..., :dim].double()
    scores = (q_q.double() @ k_q.mT).float()  # exact
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


def smoothing_factors(x_absmax: Tensor, w_absmax: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's `s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)` in float32 (paper, section 3.2, eq. 4).

    A channel that is dead on either side (maximum 0), or whose factor over- or underflows, gets `s = 1`.
    """
    x, w = x_absmax.double(), w_absmax.double()
    smooth = (x.pow(alpha) / w.pow(1.0 - alpha)).float()
    inverse = 1.0 / smooth
    usable = (x > 0) & (w > 0) & (smooth >= MIN_SCALE) & (inverse >= MIN_SCALE) & smooth.isfinite()
    return torch.where(usable, smooth, torch.ones_like(smooth))
