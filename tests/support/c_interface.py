"""csrc/include/sqk/quantize.h in Python: structs, and calls with raw pointers."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

PRODUCERS = ("quantize", "rms_norm", "layer_norm", "relu", "gelu", "gelu_tanh", "silu")
SCHEMES = ("token", "tensor", "static")
PATHS = ("warp", "block", "wide", "long", "element", "cluster")
AUTO = -1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

SUCCESS, INVALID_ARGUMENT, UNSUPPORTED_ARCH, UNSUPPORTED_SHAPE, WORKSPACE_TOO_SMALL = range(5)
EXCLUDED_TILE, UNKNOWN_TILE = 5, 6


class Params(Structure):
    """sqk::QuantizeParams."""

    _fields_ = (
        ("producer", c_int32),
        ("scheme", c_int32),
        ("dtype", c_int32),
        ("path", c_int32),
        ("m", c_int64),
        ("k", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("gate", c_void_p),
        ("gate_stride", c_int64),
        ("residual", c_void_p),
        ("residual_stride", c_int64),
        ("sum", c_void_p),
        ("sum_stride", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_dtype", c_int32),
        ("bias_dtype", c_int32),
        ("eps", c_double),
        ("rotation", c_int32),
        ("inv_smooth", c_void_p),
        ("scale", c_void_p),
        ("x_q", c_void_p),
        ("x_q_stride", c_int64),
        ("k_padded", c_int64),
        ("x_scale", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("interleaved", c_int32),
    )


class Device(Structure):
    """sqk::Device."""

    _fields_ = (
        ("sms", c_int32),
        ("capability", c_int32),
        ("shared_bytes", c_int32),
        ("wgmma", c_int32),
        ("part", c_int32),
    )


class Plan(Structure):
    """sqk::QuantizePlan."""

    _fields_ = (
        ("path", c_int32),
        ("threads", c_int32),
        ("rows", c_int32),
        ("cluster", c_int32),
        ("splits", c_int32),
        ("slice", c_int32),
        ("slots", c_int32),
        ("launches", c_int32),
        ("blocks", c_int64),
        ("shared_bytes", c_int64),
        ("workspace_bytes", c_int64),
    )


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of the C entries."""
    library.sqk_quantize.argtypes = [POINTER(Params), c_void_p]
    library.sqk_quantize_workspace_bytes.argtypes = [POINTER(Params)]
    library.sqk_quantize_workspace_bytes.restype = c_int64
    library.sqk_quantize_plan.argtypes = [POINTER(Params), POINTER(Device), POINTER(Plan)]
    return library


def plan(library: ctypes.CDLL, params: Params, device: Device | None = None) -> tuple[int, Plan]:
    """(status, plan) on a described GPU, or on the current one."""
    result = Plan()
    where = None if device is None else byref(device)
    return library.sqk_quantize_plan(byref(params), where, byref(result)), result


def row_stride(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else 0


def params_of(
    x: Tensor,
    x_q: Tensor,
    x_scale: Tensor,
    *,
    producer: str = "quantize",
    scheme: str = "token",
    path: str | None = None,
    k: int | None = None,
    other: Tensor | None = None,
    sum_out: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    inv_smooth: Tensor | None = None,
    scale: Tensor | None = None,
    workspace: Tensor | None = None,
    rotation: int = 0,
) -> Params:
    """For two-dimensional tensors with adjacent columns. `other` is the gate, or the residual of a norm.

    The struct holds only addresses, so the tensors must outlive it. `k` is the width of x by default.
    """
    p = Params()
    p.producer, p.scheme = PRODUCERS.index(producer), SCHEMES.index(scheme)
    p.dtype = DTYPES[x.dtype]
    p.path = AUTO if path is None else PATHS.index(path)
    p.m, p.k = x.shape[0], x.shape[1] if k is None else k
    p.x, p.x_stride = x.data_ptr(), row_stride(x)
    if other is not None:
        if producer.endswith("norm"):
            p.residual, p.residual_stride = other.data_ptr(), row_stride(other)
        else:
            p.gate, p.gate_stride = other.data_ptr(), row_stride(other)
    if sum_out is not None:
        p.sum, p.sum_stride = sum_out.data_ptr(), row_stride(sum_out)
    if weight is not None:
        p.weight, p.weight_dtype = weight.data_ptr(), DTYPES[weight.dtype]
    if bias is not None:
        p.bias, p.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
    p.eps, p.rotation = eps, rotation
    p.inv_smooth = None if inv_smooth is None else inv_smooth.data_ptr()
    p.scale = None if scale is None else scale.data_ptr()
    p.x_q, p.x_q_stride, p.k_padded = x_q.data_ptr(), row_stride(x_q), x_q.shape[1]
    p.x_scale = x_scale.data_ptr()
    if workspace is not None:
        p.workspace, p.workspace_bytes = workspace.data_ptr(), workspace.numel() * 4
    return p
