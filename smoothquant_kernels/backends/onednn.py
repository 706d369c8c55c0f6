"""CPU kernels on oneDNN: the bits of `reference`, as fast as PyTorch's building blocks allow.

oneDNN computes the int8 product (`onednn.qlinear_pointwise`, with float32 output). The processor decides which way of
calling it is exact. A process measures that once, on data that would saturate or round:

* ``onednn_vnni``   8-bit dot products accumulate in int32. One call on x + 128 as uint8 with zero point 128 is exact.
* ``onednn_amx``    The same call of oneDNN's AMX kernels rounds the uint8 sum to float32 before it subtracts the zero
                    point's part. They multiply int8 x int8 as well, so one call on x itself is exact. Other kernels do
                    that slowly.
* ``onednn_split``  Without VNNI, pairs of u8 x s8 products saturate at 16 bits. 7-bit activations cannot reach that
                    limit, so one call on twice the rows is exact: x = max(x, 0) - max(-x, 0), both parts stacked along
                    M.
* ``onednn_float``  Without a usable oneDNN, float32 matrix products over short slices of K are exact.

These kernels serve where the compiled ones (`cpu_native.py`) do not. ``SMOOTHQUANT_KERNELS_CPU=onednn`` chooses them,
and the name of a slower way forces that one. All ways give the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from smoothquant_kernels import reference
from smoothquant_kernels.backends import cpu_choice
from smoothquant_kernels.backends.cpu_choice import ONEDNN_MODES as MODES
from smoothquant_kernels.ops.registry import cpu_kernel
from smoothquant_kernels.ops.rotate import rotated

_WHOLE = ("onednn_vnni", "onednn_amx")  # modes that multiply all of K at once
_EXACT_FLOAT = 2**24  # every integer up to here is a float32 number
_VNNI_MAX_K = (2**31 - 1) // (
    255 * 128
)  # x + 128 reaches 255, so a longer uint8 sum could pass 2**31
_CHUNK_RESULTS = (
    1 << 20
)  # float32 products of one chunk, which stay in the cache until they are scaled
_CHUNK_BYTES = 1 << 20  # float32 rows of one chunk, so that all passes over it hit the L2 cache


# --- int8 GEMM --------------------------------------------------------------------------------------------------------


def _qlinear(u8: Tensor, zero_point: int, packed: Tensor, w_scale: Tensor, zeros: Tensor) -> Tensor:
    """float32(exact int32 sum) * w_scale, one rounding each; u8 is contiguous [M, K]."""
    result: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        u8, 1.0, zero_point, packed, w_scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


def _whole_product(
    mode: str, x_q: Tensor, packed: Tensor, w_scale: Tensor, zeros: Tensor
) -> Tensor:
    """`_qlinear` as a mode of `_WHOLE` calls it."""
    if mode == "onednn_amx":
        return _qlinear(x_q, 0, packed, w_scale, zeros)
    return _qlinear(_to_u8(x_q), 128, packed, w_scale, zeros)


def _to_u8(x_q: Tensor) -> Tensor:
    return x_q.view(torch.uint8).bitwise_xor(128)


def _split_signs(x_q: Tensor) -> Tensor:
    """[2M, K] uint8: the positive parts, then the negative parts (128 for -128, still exact beside any weight)."""
    return torch.cat([x_q.clamp_min(0), x_q.clamp_max(0).neg_()]).view(torch.uint8)


def _prepack(w_q: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack.default(w_q.contiguous(), None)
    return packed


# The caller's default dtype and device must not matter, so each tensor below names its own.
_randn = functools.partial(torch.randn, dtype=torch.float32, device="cpu")
_ones = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
_zero_points = functools.partial(torch.zeros, dtype=torch.int32, device="cpu")
_empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")


def _random_int8(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    shape = (rows, columns)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8, device="cpu")


def _is_exact(mode: str) -> bool:
    """Whether `mode` is exact: tried for several sizes on random operands and on some whose 16-bit sums saturate."""
    if mode == "onednn_amx" and not torch.cpu._is_amx_tile_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    # In the last two sizes, uint8 sums are beyond 2**24. The split mode never multiplies such slices.
    sizes = ((1, 64, 256), (3, 17, 31), (64, 64, 256), (9, 35, 4608), (4, 256, 4608))
    try:
        for m, n, k in sizes[: 3 if mode == "onednn_split" else None]:
            x = _random_int8(m, k, generator)
            w = _random_int8(n, k, generator)
            x[0], w[0], w[-1] = 127, 127, -127
            x[-1, ::2] = -127
            w_scale = _randn(n, generator=generator).abs()
            packed, zeros = _prepack(w), _zero_points(n)
            if mode in _WHOLE:
                y = _whole_product(mode, x, packed, w_scale, zeros)
            else:
                parts = _qlinear(_split_signs(x), 0, packed, _ones(n), zeros)
                y = (parts[:m] - parts[m:]) * w_scale
            if not torch.equal(y, (x.double() @ w.double().T).float() * w_scale):
                return False
    except (RuntimeError, AttributeError):  # this build lacks the op or the type
        return False
    return True


@functools.cache
def gemm_mode() -> str:
    """The member of `MODES` that this process uses: the fastest exact one, unless the environment asks for a slower."""
    wanted = cpu_choice.wanted()
    for mode in MODES[MODES.index(wanted) if wanted in MODES else 0 :]:
        if mode == "onednn_float" or _is_exact(mode):
            return mode
    return "onednn_float"


@functools.cache
def _addcmul_is_fused() -> bool:
    """Whether `torch.addcmul` rounds once for the layouts used below. With FMA instructions it does."""
    generator = torch.Generator().manual_seed(0)
    for m, n in ((1, 1), (7, 1), (1, 67), (5, 7), (33, 131)):
        y = _randn(m, n, generator=generator)
        scale = _randn(m, 1, generator=generator)
        bias = -(y[0] * scale[0])  # cancels in the first row: only a fused result is not zero there
        if not torch.equal(torch.addcmul(bias, y, scale), reference.fma(y, scale, bias)):
            return False
    return True


@dataclass(frozen=True)
class _Packed:
    """A weight in the layout of the chosen mode; `chunks` are (start, stop, packed) along K.

    It holds no view of the weight, which would keep the weight alive and in the cache forever.
    """

    version: int
    address: int
    mode: str
    zeros: Tensor
    chunks: tuple[tuple[int, int, Tensor | None], ...]


def _chunk_bounds(w_q: Tensor) -> list[tuple[int, int]]:
    """The fewest slices of K in which no partial sum can exceed 2**24."""
    k = w_q.shape[1]
    magnitude = w_q.to(torch.int16).abs()  # int16: -128 has no int8 opposite
    for count in range(1, k + 1):
        size = -(-k // count)
        slices = [(i, min(i + size, k)) for i in range(0, k, size)]
        if all(int(magnitude[:, a:b].sum(1).max()) * 128 <= _EXACT_FLOAT for a, b in slices):
            break
    return slices


def _pack(w_q: Tensor, mode: str, version: int) -> _Packed:
    zeros = _zero_points(w_q.shape[0])
    bounds = [(0, w_q.shape[1])] if mode in _WHOLE else _chunk_bounds(w_q)
    # The float mode converts at every call, because float32 copies would take four times the weight's memory.
    chunks = tuple(
        (a, b, None if mode == "onednn_float" else _prepack(w_q[:, a:b])) for a, b in bounds
    )
    return _Packed(version, w_q.data_ptr(), mode, zeros, chunks)


_PACKED: Any = WeakTensorKeyDictionary()


def _packed_weight(w_q: Tensor) -> _Packed:
    """The packed form of w_q. It is made at the first use and kept while w_q lives unchanged.

    The tensor's version reveals a write. A write through `.data` or a NumPy view has no version and goes unnoticed.
    """
    mode = gemm_mode()
    if mode in _WHOLE and w_q.shape[1] > _VNNI_MAX_K:
        mode = "onednn_split"
    if w_q.is_inference():  # it has no version counter to reveal a later write
        return _pack(w_q, mode, -1)
    cached = _PACKED.get(w_q)
    now = (w_q._version, w_q.data_ptr(), mode)
    if cached is not None and (cached.version, cached.address, cached.mode) == now:
        return cached  # type: ignore[no-any-return]
    packed = _pack(w_q, mode, w_q._version)
    _PACKED[w_q] = packed
    return packed


def _scaled_product(x_q: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    """float32 [M, N]: float32(x_q @ w_q.T) * w_scale for contiguous x_q [M, K], w_scale [N] or [1]."""
    m, n = x_q.shape[0], w_q.shape[0]
    if m == 0:
        return _empty(0, n)
    packed = _packed_weight(w_q)
    if packed.mode in _WHOLE:
        scales = w_scale if w_scale.shape[0] == n else w_scale.expand(n).contiguous()
        whole = packed.chunks[0][2]
        assert whole is not None
        return _whole_product(packed.mode, x_q, whole, scales, packed.zeros)
    total: Tensor | None = None
    for start, stop, weight in packed.chunks:
        part = x_q if len(packed.chunks) == 1 else x_q[:, start:stop].contiguous()
        if weight is not None:
            signs = _qlinear(_split_signs(part), 0, weight, _ones(n), packed.zeros)
            product = signs[:m].sub_(signs[m:])
        else:
            with torch.autocast("cpu", enabled=False):
                product = part.float() @ w_q[:, start:stop].float().t()
            product = product.add_(0.0)  # a product may be -0, an int32 sum never is
        if len(packed.chunks) == 1:
            return product.mul_(w_scale)
        exact = product.to(torch.int32)  # each slice is exact in float32, but their sum may not be
        total = exact if total is None else total.add_(exact)
    assert total is not None
    return total.float().mul_(w_scale)


def _dequantized(
    x_q: Tensor, w_q: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    y = _scaled_product(x_q.reshape(-1, x_q.shape[-1]).contiguous(), w_q, w_scale.contiguous())
    column = x_scale[:, None]
    if bias is None:
        return y.mul_(column)
    if _addcmul_is_fused():
        return torch.addcmul(bias.float(), y, column)
    return reference.fma(y, column, bias.float())


@cpu_kernel("gemm_s8")
def gemm_s8(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    rows, n = x_q.reshape(-1, x_q.shape[-1]), w_q.shape[0]
    m = rows.shape[0]
    extra = None if residual is None else residual.reshape(m, n)

    def part(start: int, stop: int) -> Tensor:
        scale = x_scale if x_scale.shape[0] == 1 else x_scale[start:stop]
        y = _dequantized(rows[start:stop], w_q, scale, w_scale, bias)
        return y if extra is None else y.add_(extra[start:stop].float())

    step = max(128, _CHUNK_RESULTS // n)
    if m <= step:
        return part(0, m).to(out_dtype).view(*x_q.shape[:-1], n)
    result = x_q.new_empty((*x_q.shape[:-1], n), dtype=out_dtype)
    for start in range(0, m, step):
        stop = min(start + step, m)
        result.view(m, n)[start:stop] = part(start, stop)
    return result


@cpu_kernel("gemm_s8_requant")
def gemm_s8_requant(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_scale: Tensor,
    bias: Tensor | None,
    relu: bool,
) -> Tensor:
    y = _dequantized(x_q, w_q, x_scale, w_scale, bias)
    if relu:
        y = y.relu_()
    y_q = reference.round_to_int8(y.mul_(reference.inverse_scale(out_scale)))
    return y_q.view(*x_q.shape[:-1], w_q.shape[0])


# --- quantizer --------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, start: int, stop: int, inv_smooth: Tensor | None, rotation: int) -> Tensor:
    """Smoothed and rotated rows of x in float32. They may alias x."""
    v = x[start:stop].float()
    if inv_smooth is not None:
        v = v * inv_smooth
    return rotated(v, rotation)


def _round_rows(v: Tensor, inverse: Tensor, out: Tensor, saturate: bool) -> None:
    """out = int8(rint(v * inverse)), the same as `reference.round_to_int8`.

    A finite dynamic scale saves two passes, because no value is NaN and none rounds beyond 127: |v| <= absmax, and the
    two roundings in 127 / absmax move absmax * (1 / scale) by less than 1e-4.
    """
    v = v * inverse
    if saturate:
        out.copy_(reference.round_to_int8(v))
    else:
        out.copy_(v.round_())


@cpu_kernel("quantize")
def quantize(
    x: Tensor,
    inv_smooth: Tensor | None,
    scale: Tensor | None,
    granularity: str,
    k_multiple: int,
    rotation: int,
) -> tuple[Tensor, Tensor]:
    k = x.shape[-1]
    rows = x.detach().reshape(-1, k)
    m = rows.shape[0]
    step = max(1, _CHUNK_BYTES // (4 * k))
    chunks = [(i, min(i + step, m)) for i in range(0, m, step)]
    padded = reference.padded_k(k, k_multiple)
    values = x_q = x.new_empty((m, padded), dtype=torch.int8)
    if padded > k:
        values = x_q[:, :k]
        x_q[:, k:] = 0

    if scale is None and granularity == "tensor":
        parts = [_rows(rows, a, b, inv_smooth, rotation).abs().amax() for a, b in chunks]
        absmax = torch.stack(parts).amax().view(1) if parts else _empty(1).zero_()
        x_scale = reference.scale_from_absmax(absmax)
        inverse = reference.inverse_scale(x_scale)
        saturate = not bool(x_scale.isfinite())
        for a, b in chunks:
            _round_rows(_rows(rows, a, b, inv_smooth, rotation), inverse, values[a:b], saturate)
        return x_q.view(*x.shape[:-1], padded), x_scale

    x_scale = _empty(m)
    for a, b in chunks:
        v = _rows(rows, a, b, inv_smooth, rotation)
        absmax = v.abs().amax(-1)
        if scale is None:
            chunk_scale = reference.scale_from_absmax(absmax)
            inverse = reference.inverse_scale(chunk_scale)[:, None]
            saturate = not bool(absmax.isfinite().all())
        else:
            chunk_scale = torch.where(absmax.isfinite(), scale, torch.nan)
            inverse, saturate = reference.inverse_scale(scale), True
        _round_rows(v, inverse, values[a:b], saturate)
        x_scale[a:b] = chunk_scale
    return x_q.view(*x.shape[:-1], padded), x_scale
