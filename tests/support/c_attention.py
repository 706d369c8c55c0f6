"""csrc/include/sqk/attention.h in Python: structs, and calls with raw pointers."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from typing import Any

from torch import Tensor

from smoothquant_kernels import reference
from tests.support.c_interface import DTYPES, Device


class Half(Structure):
    """sqk::KvHalf."""

    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("scale", c_void_p),
        ("scale_block_stride", c_int64),
        ("scale_head_stride", c_int64),
        ("dim", c_int64),
    )


class Cache(Structure):
    """sqk::KvCache."""

    _fields_ = (
        ("k", Half),
        ("v", Half),
        ("blocks", c_int64),
        ("heads", c_int64),
        ("block_size", c_int64),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("ring", c_int32),
    )


class Params(Structure):
    """sqk::AttentionParams."""

    _fields_ = (
        ("dtype", c_int32),
        ("batch", c_int64),
        ("heads", c_int64),
        ("tokens", c_int64),
        ("q", c_void_p),
        ("q_batch_stride", c_int64),
        ("q_head_stride", c_int64),
        ("q_token_stride", c_int64),
        ("y", c_void_p),
        ("cache", Cache),
        ("lengths", c_void_p),
        ("scale", c_float),
        ("k_smooth", c_void_p),
        ("v_smooth", c_void_p),
        ("rotation", c_int32),
        ("window", c_int64),
        ("mask", c_void_p),
        ("mask_batch_stride", c_int64),
        ("mask_head_stride", c_int64),
        ("mask_token_stride", c_int64),
        ("mask_column_stride", c_int64),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
    )


class Plan(Structure):
    """sqk::AttentionPlan."""

    _fields_ = (
        ("splits", c_int32),
        ("threads", c_int32),
        ("blocks", c_int64),
        ("shared_bytes", c_int64),
        ("workspace_bytes", c_int64),
    )


def declare_plans(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of the entries that need no GPU."""
    library.sqk_attention_plan.argtypes = [POINTER(Params), POINTER(Device), POINTER(Plan)]
    return library


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of all entries."""
    library.sqk_decode_attention_s8.argtypes = [POINTER(Params), c_void_p]
    library.sqk_attention_workspace_bytes.argtypes = [POINTER(Params)]
    library.sqk_attention_workspace_bytes.restype = c_int64
    return declare_plans(library)


def plan(library: ctypes.CDLL, params: Params, device: Device | None = None) -> tuple[int, Plan]:
    """(status, plan) on a described GPU, or on the current one."""
    result = Plan()
    where = None if device is None else byref(device)
    return library.sqk_attention_plan(byref(params), where, byref(result)), result


def described(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, positions: int, **more: Any
) -> Params:
    """A contiguous problem with aligned addresses, which are never read."""
    p = Params(batch=batch, heads=heads, tokens=tokens, dtype=1, q=4096, y=4096, scale=1.0)
    padded = reference.padded_k(dim, reference.HEAD_MULTIPLE)
    stride = positions * padded
    half = Half(4096, kv_heads * stride, stride, 4096, kv_heads * positions, positions, dim)
    p.cache = Cache(half, half, batch, kv_heads, positions)
    for name, value in more.items():
        setattr(p, name, value)
    return p


def params_of(given: dict[str, Any], y: Tensor) -> Params:
    """For the arguments of the op without a table or mask. Only addresses are held: the tensors must outlive it."""
    q, cache = given["q"], given["k_cache"]
    p = Params(batch=q.shape[0], heads=q.shape[1], tokens=q.shape[2], dtype=DTYPES[q.dtype])
    p.q, p.y, p.scale = q.data_ptr(), y.data_ptr(), given["scale"]
    p.q_batch_stride, p.q_head_stride, p.q_token_stride = q.stride()[:3]
    halves = []
    for half in ("k", "v"):
        data, scale = given[f"{half}_cache"], given[f"{half}_scale"]
        strides = (*data.stride()[:2], scale.data_ptr(), *scale.stride()[:2])
        halves.append(Half(data.data_ptr(), *strides, q.shape[3]))
    p.cache = Cache(*halves, *cache.shape[:3])
    p.lengths = given["lengths"].data_ptr()
    p.rotation = given.get("rotation", 0)
    return p
