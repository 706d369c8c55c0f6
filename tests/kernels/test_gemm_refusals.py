"""The int8 GEMMs refuse wrong arguments with the same sentences on every backend."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.support import c_gemm, cases
from tests.support.backends import Backend

G = cases.gemm_operands(4, 3, 6)
LONG = torch.zeros(1, reference.MAX_K + 1, dtype=torch.int8)
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"x_q": G.residual}, "x_q must be int8, got float32. Quantize it first"),
    ({"w_q": G.w_q.short()}, "w_q must be int8, got "),
    ({"w_q": G.w_q.t()}, r"the same K and N >= 1, got \(4, 6\) and \(6, 3\)\."),
    ({"w_q": G.w_q[:0]}, r"N >= 1, got \(4, 6\) and \(0, 6\)\."),
    ({"x_q": G.x_q[:, :0], "w_q": G.w_q[:, :0]}, r"K must be in \[1, 131071\] so that"),
    ({"x_q": LONG, "w_q": LONG}, "cannot overflow, got 131072; split the layer over K."),
    ({"x_scale": torch.ones(3)}, r"x_scale must have shape \[4\] or \[1\] \(per token or per tensor\), got \(3,\)"),
    ({"x_scale": torch.ones(4).half()}, "x_scale must be float32, got float16. Scales"),
    ({"w_scale": torch.ones(3, 1)}, r"w_scale must have shape \[3\] or \[1\] \(per output channel"),
    ({"w_scale": torch.ones(3).bfloat16()}, "w_scale must be float32, got bfloat16."),
    ({"bias": torch.ones(4)}, r"bias must have shape \[3\], got \(4,\)\."),
    ({"bias": torch.ones(3).int()}, "bias must be float16 or bfloat16 or float32, got int32."),
)  # fmt: skip
FLOAT_OUTPUT: tuple[tuple[dict[str, Any], str], ...] = (
    ({"residual": torch.ones(3)}, r"residual must have shape \(4, 3\), got \(3,\)\."),
    ({"residual": torch.ones(4, 4)}, r"residual must have shape \(4, 3\), got \(4, 4\)\."),
    ({"residual": G.x_q[:, :3]}, "residual must be float16 or bfloat16 or float32, got int8."),
    ({"out_dtype": torch.int8}, "out_dtype must be float16, bfloat16 or float32, got"),
    ({"out_dtype": torch.float64}, "out_dtype must be float16, bfloat16 or float32, got"),
)


def refused(backend: Backend, op: str, change: dict[str, Any], sentence: str) -> None:
    more = {
        "gemm_s8": {"out_dtype": torch.float16},
        "_gemm_s8_tile": {"out_dtype": torch.float16, "tile": 0, "splits": 0},
        "gemm_s8_requant": {"out_scale": torch.ones(1)},
    }
    given = {**G._asdict(), "residual": None, **more[op], **change}
    if op == "gemm_s8_requant":
        del given["residual"]
    moved = {
        k: v.to(backend.device) if isinstance(v, Tensor) and not v.is_meta else v
        for k, v in given.items()
        if v is not None
    }
    # C++ can raise only RuntimeError. The sentence is the same.
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^{op}: .*{sentence}"):
        getattr(torch.ops.smoothquant_kernels, op)(**moved)


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
@pytest.mark.parametrize("op", ["gemm_s8", "gemm_s8_requant"])
def test_refusals(backend: Backend, op: str, change: dict[str, Any], sentence: str) -> None:
    refused(backend, op, change, sentence)


@pytest.mark.parametrize(("change", "sentence"), FLOAT_OUTPUT)
def test_refusals_of_float_outputs(backend: Backend, change: dict[str, Any], sentence: str) -> None:
    refused(backend, "gemm_s8", change, sentence)


@pytest.mark.parametrize("name", G._fields[1:])
def test_operands_on_two_devices_are_refused(backend: Backend, name: str) -> None:
    if backend.device == "cuda":
        pytest.skip("tests/gpu/test_cuda.py tests this on a GPU")
    refused(backend, "gemm_s8", {name: getattr(G, name).to("meta")}, f"{name} is on meta, but")


def test_refusals_of_out_scale_tile_and_splits(backend: Backend) -> None:
    refused(
        backend, "gemm_s8_requant", {"out_scale": torch.ones(2)}, r"out_scale must have shape \[1\]"
    )
    sentence = "tile must be -1 or a row of the table, splits at least 0, got"
    for change, got in (({"tile": -2}, "-2 and 0"), ({"splits": -1}, "0 and -1")):
        refused(backend, "_gemm_s8_tile", change, f"{sentence} {got}")


def test_tiles_that_do_not_exist_or_do_not_fit_are_refused(
    compiled: Backend, library: ctypes.CDLL
) -> None:
    tiles = c_gemm.tiles(library)
    shape = "M 4, N 3, K 6"
    beyond = len(c_gemm.all_tiles(library))
    said = f"an argument is invalid; {shape}, tile {beyond}"
    refused(compiled, "_gemm_s8_tile", {"tile": beyond}, said)
    for tile in c_gemm.all_tiles(library):
        if tile["w4_only"]:
            said = f"no tile covers this shape; {shape}, tile {tile['tile']}"
            refused(compiled, "_gemm_s8_tile", {"tile": tile["tile"]}, said)
    for tile in tiles:
        change = {"tile": tile["tile"], "splits": tile["most_splits"] + 1}
        refused(compiled, "_gemm_s8_tile", change, f"no tile covers this shape; {shape}, tile")
        if tile["kernel"] == "stream":
            m = tile["m"] + 1
            many = {"tile": tile["tile"], "x_q": G.x_q[:1].expand(m, 6), "x_scale": torch.ones(m)}
            refused(compiled, "_gemm_s8_tile", many, f"no tile covers this shape; M {m}, N 3")
