"""csrc/include/sqk/grouped.h in Python: structs, and the table of tiles."""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor

from tests.support import c_gemm
from tests.support.c_interface import DTYPES, row_stride
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


@dataclass(frozen=True)
class Tile:
    """A row of csrc/gemm/grouped/tiles.h."""

    row: int
    kernel: str
    m: int
    n: int
    k: int
    stages: int
    name: str


def tiles(kernel: str = "") -> list[Tile]:
    """The rows of the table, or those with this kernel: "mma" or "wgmma"."""
    text = (ROOT / "csrc/gemm/grouped/tiles.h").read_text()
    found = []
    for row, line in enumerate(re.findall(r"^    (w?g?mma\(.*\),)$", text, re.M)):
        kind, *sizes = re.search(r"(\w+)\((\d+), (\d+), (\d+)\)", line).groups()  # type: ignore[union-attr]
        stages = re.search(r"\.stages\((\d+)\)", line)[1]  # type: ignore[index]
        m, n, k = map(int, sizes)
        name = f"{m}x{n}x{k}" + ("_swap" if "swap_ab" in line else "")
        name += f"_{stages}_stages" if "stages_in_name" in line else ""
        found.append(Tile(row, kind, m, n, k, int(stages), name))
    return [tile for tile in found if kernel in ("", tile.kernel)]


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the argument types of the C entries for experts too."""
    c_gemm.declare(library)
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
    """For tensors with adjacent columns. The struct holds only addresses, so the tensors must outlive it."""
    experts, n, k = w_q.shape
    return Params(
        m=len(y),
        n=n,
        k=k,
        experts=experts,
        x_q=x_q.data_ptr(),
        x_rows=len(x_q),
        x_q_stride=row_stride(x_q),
        rows=None if rows is None else rows.data_ptr(),
        offsets=offsets.data_ptr(),
        w_q=w_q.data_ptr(),
        w_q_stride=w_q.stride(1),
        w_q_expert_stride=w_q.stride(0),
        x_scale=x_scale.data_ptr(),
        x_per_token=len(x_scale) > 1,
        w_scale=w_scale.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        y_stride=row_stride(y),
        y_dtype=DTYPES[y.dtype],
        tile=tile,
    )
