"""csrc/include/sqk/grouped.h in Python: structs, and calls with raw pointers."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p

from torch import Tensor

from tests.support.c_interface import DTYPES, row_stride


class Params(Structure):
    """sqk::GroupedParams."""

    _fields_ = (
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("experts", c_int64),
        ("x_q", c_void_p),
        ("x_rows", c_int64),
        ("x_q_stride", c_int64),
        ("rows", c_void_p),
        ("offsets", c_void_p),
        ("w_q", c_void_p),
        ("w_q_stride", c_int64),
        ("w_q_expert_stride", c_int64),
        ("x_scale", c_void_p),
        ("x_per_token", c_int32),
        ("w_scale", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("y_dtype", c_int32),
        ("tile", c_int32),
        ("w_constant", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
    )


class Plan(Structure):
    """sqk::GroupedPlan."""

    _fields_ = (
        ("tile", c_int32),
        ("launches", c_int32),
        ("overlap", c_int32),
        ("weights_first", c_int32),
        ("blocks", c_int64),
        ("shared_bytes", c_int64),
        ("workspace_bytes", c_int64),
    )


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of the C entries."""
    library.sqk_grouped_gemm_s8.argtypes = [POINTER(Params), c_void_p]
    library.sqk_grouped_plan.argtypes = [POINTER(Params), POINTER(Plan)]
    return library


def plan(library: ctypes.CDLL, params: Params) -> tuple[int, Plan]:
    """(status, plan) on the current GPU."""
    result = Plan()
    return library.sqk_grouped_plan(byref(params), byref(result)), result


def params_of(
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    y: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    tile: int = -1,
) -> Params:
    """For tensors with adjacent columns, and bias in float32. The struct holds only addresses: keep the tensors."""
    experts, n, k = w_q.shape
    p = Params(m=y.shape[0], n=n, k=k, experts=experts, x_rows=x_q.shape[0], tile=tile)
    p.x_q, p.x_q_stride = x_q.data_ptr(), row_stride(x_q)
    p.w_q, p.w_q_stride, p.w_q_expert_stride = w_q.data_ptr(), w_q.stride(1), w_q.stride(0)
    p.x_scale, p.x_per_token = x_scale.data_ptr(), x_scale.numel() > 1
    p.w_scale, p.offsets = w_scale.data_ptr(), offsets.data_ptr()
    p.rows = None if rows is None else rows.data_ptr()
    p.bias = None if bias is None else bias.data_ptr()
    p.y, p.y_stride, p.y_dtype = y.data_ptr(), row_stride(y), DTYPES[y.dtype]
    return p
