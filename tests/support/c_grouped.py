"""csrc/include/sqk/grouped.h in Python: structs, and calls with raw pointers."""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor

from tests.support.c_interface import DTYPES, INVALID_ARGUMENT, row_stride
from tools.build.plan import ROOT


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


class CombineParams(Structure):
    """sqk::CombineParams."""

    _fields_ = (
        ("tokens", c_int64),
        ("choices", c_int64),
        ("n", c_int64),
        ("y_rows", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("position", c_void_p),
        ("weights", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("dtype", c_int32),
        ("weights_dtype", c_int32),
    )


@dataclass(frozen=True)
class Tile:
    """A row of csrc/gemm/grouped/tiles.h."""

    row: int
    kernel: str
    m: int
    n: int
    stages: int
    name: str


def wgmma_tiles() -> list[Tile]:
    """Hopper's rows, from the text of the table: pytest's collection needs them before there is a library."""
    text = (ROOT / "csrc/gemm/grouped/tiles.h").read_text()
    found = []
    for row, line in enumerate(re.findall(r"^    ((?:stream|mma|wgmma)\(.*\),)$", text, re.M)):
        kernel, *sizes = re.findall(r"^\w+|\d+", line)
        if kernel != "wgmma":
            continue
        m, n, k = map(int, sizes[:3])
        stages = int(line.partition(".stages(")[2].partition(")")[0])
        name = f"{m}x{n}x{k}" + ("_swap" if "swap_ab" in line else "")
        found.append(Tile(row, kernel, m, n, stages, name))
    return found


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of the C entries."""
    library.sqk_grouped_gemm_s8.argtypes = [POINTER(Params), c_void_p]
    library.sqk_grouped_plan.argtypes = [POINTER(Params), POINTER(Plan)]
    library.sqk_combine_experts.argtypes = [POINTER(CombineParams), c_void_p]
    return library


def plan(library: ctypes.CDLL, params: Params) -> tuple[int, Plan]:
    """(status, plan) on the current GPU."""
    result = Plan()
    return library.sqk_grouped_plan(byref(params), byref(result)), result


def tile_count(library: ctypes.CDLL) -> int:
    """The rows of the table of grouped tiles: the first number that no row has."""
    p = Params(m=1, n=1, k=1, experts=1, x_rows=1, tile=0)
    while plan(library, p)[0] != INVALID_ARGUMENT:
        p.tile += 1
    return p.tile


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
    """For tensors with adjacent elements in their last dimension, and bias in float32.

    The struct holds only addresses, so the tensors must outlive it.
    """
    experts, n, k = w_q.shape
    p = Params(m=y.shape[0], n=n, k=k, experts=experts, tile=tile)
    p.x_q, p.x_rows, p.x_q_stride = x_q.data_ptr(), x_q.shape[0], row_stride(x_q)
    p.rows = None if rows is None else rows.data_ptr()
    p.offsets = offsets.data_ptr()
    p.w_q, p.w_q_expert_stride, p.w_q_stride = w_q.data_ptr(), w_q.stride(0), w_q.stride(1)
    p.x_scale, p.x_per_token = x_scale.data_ptr(), x_scale.numel() > 1
    p.w_scale = w_scale.data_ptr()
    p.bias = None if bias is None else bias.data_ptr()
    p.y, p.y_stride, p.y_dtype = y.data_ptr(), row_stride(y), DTYPES[y.dtype]
    return p


def combine_params_of(y: Tensor, position: Tensor, weights: Tensor, out: Tensor) -> CombineParams:
    """As `params_of`."""
    p = CombineParams(tokens=position.shape[0], choices=position.shape[1])
    p.n, p.y_rows, p.y, p.y_stride = y.shape[1], y.shape[0], y.data_ptr(), row_stride(y)
    p.position, p.weights = position.data_ptr(), weights.data_ptr()
    p.out, p.out_stride = out.data_ptr(), row_stride(out)
    p.dtype, p.weights_dtype = DTYPES[y.dtype], DTYPES[weights.dtype]
    return p
