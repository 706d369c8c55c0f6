"""csrc/include/sqk/gemm.h and linear.h in Python: structs, calls with raw pointers, and the tables of tiles."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from tests.support import c_interface, described
from tests.support.c_interface import row_stride
from tools.build.plan import ROOT

Device = c_interface.Device
DTYPES = {**c_interface.DTYPES, torch.int8: 3}
#: The tables that have a file, in the order of their numbers.
TABLES = tuple(
    sorted(
        (file.stem for file in (ROOT / "csrc/gemm/tiles").glob("sm*.h")),
        key=lambda name: int(name[2:]),
    )
)
#: Rows of x_q and w_q, and their strides, must be aligned to this many bytes.
ALIGNMENT = 16


class Params(Structure):
    """sqk::GemmParams."""

    _fields_ = (
        ("m", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("x_q", c_void_p),
        ("x_q_stride", c_int64),
        ("w_q", c_void_p),
        ("w_q_stride", c_int64),
        ("x_scale", c_void_p),
        ("w_scale", c_void_p),
        ("x_per_token", c_int32),
        ("w_per_channel", c_int32),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("out_scale", c_void_p),
        ("y_dtype", c_int32),
        ("residual_dtype", c_int32),
        ("relu", c_int32),
        ("tile", c_int32),
        ("splits", c_int32),
        ("w_constant", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("activation", c_int32),
        ("gate_dtype", c_int32),
        ("inv_smooth", c_void_p),
        ("y_scale", c_void_p),
        ("w_group", c_void_p),
    )


class Plan(Structure):
    """sqk::GemmPlan."""

    _fields_ = (
        ("table", c_int32),
        ("tile", c_int32),
        ("splits", c_int32),
        ("launches", c_int32),
        ("overlap", c_int32),
        ("weights_first", c_int32),
        ("tiles", c_int64),
        ("blocks", c_int64),
        ("shared_bytes", c_int64),
        ("counter_bytes", c_int64),
        ("workspace_bytes", c_int64),
        ("expected_clocks", c_double),
    )


class Measured(Structure):
    """sqk::GemmMeasured."""

    _fields_ = (
        ("n", c_int64),
        ("k", c_int64),
        ("m", c_int64),
        ("tile", c_int32),
        ("splits", c_int32),
    )


class LinearParams(Structure):
    """sqk::LinearParams."""

    _fields_ = (("quantize", c_interface.Params), ("gemm", Params))


class LinearPlan(Structure):
    """sqk::LinearPlan."""

    _fields_ = (
        ("quantize", c_interface.Plan),
        ("gemm", Plan),
        ("fused", c_int32),
        ("workspace_bytes", c_int64),
    )


def declare_plans(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of the C entries that need no GPU."""
    library.sqk_gemm_plan.argtypes = [POINTER(Params), POINTER(Device), POINTER(Plan)]
    library.sqk_gemm_without_tiles.argtypes = [c_char_p]
    return library


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of all C entries."""
    declare_plans(c_interface.declare(library))
    library.sqk_gemm_s8.argtypes = [POINTER(Params), c_void_p]
    library.sqk_device.argtypes = [POINTER(Device)]
    library.sqk_linear_s8.argtypes = [POINTER(LinearParams), c_void_p]
    library.sqk_linear_plan.argtypes = [POINTER(LinearParams), POINTER(LinearPlan)]
    return library


def tables(library: ctypes.CDLL) -> dict[str, Any]:
    """All tables by name."""
    found: dict[str, Any] = described.library(library).gemm_tables()
    return found


def choice(library: ctypes.CDLL, m: int, n: int, k: int, device: Device) -> dict[str, Any]:
    """The library's plan; empty if it launches nothing."""
    facts = {name: getattr(device, name) for name, *_ in Device._fields_}
    here = described.module_of(library).Device(**facts)
    return described.library(library).plan_gemm(m, n, k, here) or {}


def current_device(library: ctypes.CDLL) -> Device:
    """The current GPU, real or simulated."""
    device = Device()
    assert library.sqk_device(byref(device)) == c_interface.SUCCESS
    return device


def all_tiles(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """The rows of the current GPU's table."""
    table = choice(library, 64, 64, 64, current_device(library))["table"]
    rows: list[dict[str, Any]] = tables(library)[table]["tiles"]
    return rows


def tiles(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """The rows that serve int8 weights."""
    return [tile for tile in all_tiles(library) if not tile["w4_only"]]


def w4_tiles(library: ctypes.CDLL) -> list[dict[str, Any]]:
    """The rows that serve weights of 4 bits."""
    return [tile for tile in all_tiles(library) if tile["w4"]]


def plan(library: ctypes.CDLL, params: Params, device: Device | None = None) -> tuple[int, Plan]:
    """(status, plan) on a described GPU, or on the current one."""
    result = Plan()
    where = None if device is None else byref(device)
    return library.sqk_gemm_plan(byref(params), where, byref(result)), result


def linear_plan(library: ctypes.CDLL, params: LinearParams) -> tuple[int, LinearPlan]:
    """(status, plan) on the current GPU."""
    result = LinearPlan()
    return library.sqk_linear_plan(byref(params), byref(result)), result


def params_of(
    x_q: Tensor | None,
    w_q: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor,
    y: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    relu: bool = False,
    w_group: Tensor | None = None,
    tile: int = -1,
    splits: int = 0,
) -> Params:
    """For two-dimensional tensors with adjacent columns, and bias in float32.

    x_q and x_scale are None in a linear layer. With w_group, w_q has 4 bits, and K is that of x_q. The struct holds
    only addresses, so the tensors must outlive it.
    """
    k = w_q.shape[1] if w_group is None or x_q is None else x_q.shape[1]
    p = Params(m=y.shape[0], n=w_q.shape[0], k=k, tile=tile, splits=splits)
    if w_group is not None:
        p.w_group = w_group.data_ptr()
    p.w_q, p.w_q_stride = w_q.data_ptr(), row_stride(w_q)
    p.w_scale, p.w_per_channel = w_scale.data_ptr(), w_scale.numel() > 1
    if x_q is not None and x_scale is not None:
        p.x_q, p.x_q_stride = x_q.data_ptr(), row_stride(x_q)
        p.x_scale, p.x_per_token = x_scale.data_ptr(), x_scale.numel() > 1
    else:
        p.x_q_stride = -(-p.k // ALIGNMENT) * ALIGNMENT
    if bias is not None:
        p.bias = bias.data_ptr()
    if residual is not None:
        p.residual, p.residual_stride = residual.data_ptr(), row_stride(residual)
        p.residual_dtype = DTYPES[residual.dtype]
    if out_scale is not None:
        p.out_scale, p.relu = out_scale.data_ptr(), relu
    p.y, p.y_stride, p.y_dtype = y.data_ptr(), row_stride(y), DTYPES[y.dtype]
    return p
