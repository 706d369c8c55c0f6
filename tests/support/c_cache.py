"""csrc/include/sqk/kv_cache.h in Python: structs, and calls with raw pointers."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from typing import Any

from tests.support.c_attention import Cache, Half
from tests.support.c_interface import DTYPES


class KvTokens(Structure):
    """sqk::KvTokens."""

    _fields_ = (
        ("data", c_void_p),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("inv_smooth", c_void_p),
    )


class KvAppendParams(Structure):
    """sqk::KvAppendParams."""

    _fields_ = (
        ("dtype", c_int32),
        ("batch", c_int64),
        ("tokens", c_int64),
        ("k", KvTokens),
        ("v", KvTokens),
        ("cache", Cache),
        ("positions", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rope_dtype", c_int32),
        ("rope_dim", c_int64),
        ("cos_batch_stride", c_int64),
        ("cos_token_stride", c_int64),
        ("sin_batch_stride", c_int64),
        ("sin_token_stride", c_int64),
        ("rotation", c_int32),
    )


def params_of(call: dict[str, Any]) -> KvAppendParams:
    """For the arguments of `ops.kv_append`, which must outlive it."""
    p = KvAppendParams(dtype=DTYPES[call["k"].dtype], rotation=call.get("rotation", 0))
    p.batch, _, p.tokens, _ = call["k"].shape
    for half in "kv":
        x, cache, scale = call[half], call[f"{half}_cache"], call.get(f"{half}_scale")
        inverse = call.get(f"{half}_inv_smooth")
        tokens = KvTokens(
            x.data_ptr(), *x.stride()[:3], inverse.data_ptr() if inverse is not None else None
        )
        kept = Half(cache.data_ptr(), *cache.stride()[:2], dim=x.shape[3])
        if scale is not None:
            kept.scale = scale.data_ptr()
            kept.scale_block_stride, kept.scale_head_stride = scale.stride()[:2]
        setattr(p, half, tokens)
        setattr(p.cache, half, kept)
    p.cache.blocks, p.cache.heads, p.cache.block_size = call["k_cache"].shape[:3]
    p.cache.ring = int(call.get("ring", False))
    if (table := call.get("block_table")) is not None:
        p.cache.table, p.cache.table_stride = table.data_ptr(), table.shape[1]
    if (first := call.get("positions")) is not None:
        p.positions = first.data_ptr()
    if (cos := call.get("cos")) is not None:
        sin = call["sin"]
        p.cos, p.sin, p.rope_dtype, p.rope_dim = (
            cos.data_ptr(),
            sin.data_ptr(),
            DTYPES[cos.dtype],
            cos.shape[2],
        )
        p.cos_token_stride, p.sin_token_stride = cos.stride(1), sin.stride(1)
        if cos.shape[0] > 1:
            p.cos_batch_stride, p.sin_batch_stride = cos.stride(0), sin.stride(0)
    return p


def append(library: ctypes.CDLL, params: KvAppendParams) -> int:
    """The status of the C entry."""
    library.sqk_kv_append.argtypes = [POINTER(KvAppendParams), c_void_p]
    status: int = library.sqk_kv_append(byref(params), None)
    return status
