"""Rotations by the C entry: every path is forced, in every group size that it serves; the others are refused."""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.kernels.test_c_entry import POISON, Buffers, call, has_clusters, refused
from tests.support import c_interface, cases, tolerance
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal, count_result

GROUPS = (2, 8, 16, 32, 64, 128, 256, 512)
#: path -> (M, K): one group per row and several, whole and partial warps, several blocks, more than registers hold.
FORCED = {
    "warp": ((5, 512), (9, 1024), (67, 768)),
    "block": ((3, 512), (2, 2560), (3, 7680)),
    "wide": ((2, 512), (3, 8704), (2, 16384)),
    "long": ((2, 512), (2, 24832), (1, 66048), (1, 131072)),
    "element": ((3, 512), (5, 1536), (2, 8704), (1, 33280), (1, 66048)),
    "cluster": ((2, 512), (3, 2560), (2, 8448), (1, 65536)),
}


def largest(path: str, dtype: torch.dtype) -> int:
    """What the registers of a warp hold, up to 512; a thread of "long" has a vector of 16 bytes at a time."""
    vectors = {"block": 8, "cluster": 8, "long": 16 // dtype.itemsize}
    return min(512, 32 * vectors.get(path, 16))


def check(
    library: ctypes.CDLL,
    backend: Backend,
    b: Buffers,
    group: int,
    producer: str,
    scheme: str,
    path: str | None,
) -> None:
    options: dict[str, Any] = cases.quantize_options(scheme)
    m, k = b.x.shape
    norm, gated = producer.endswith("norm"), producer == "silu"
    extra: dict[str, Tensor] = {"other": b.other} if norm or gated else {}
    if norm:
        extra |= {"sum_out": b.sum, "weight": b.weight}
    static = backend.put(options["scale"]) if scheme == "static" else None
    params = c_interface.params_of(
        b.x, b.x_q, b.x_scale, producer=producer, scheme=scheme, path=path, k=k,
        inv_smooth=b.inv_smooth, scale=static, rotation=group, **extra,
    )  # fmt: skip
    status, plan = c_interface.plan(library, params)
    assert status == 0 and path in (None, c_interface.PATHS[plan.path])
    assert call(library, backend, params) == 0
    scales = 1 if scheme == "tensor" else m
    b.check_surroundings(scales)
    found = b.x_q[:, :k], b.x_scale[:scales]
    x, inv_smooth, what = b.x.cpu(), b.inv_smooth.cpu(), f"{path} {producer} {scheme} {group}"
    if producer in ("quantize", "relu"):  # exact
        v = reference.activation(x, "relu") if producer == "relu" else x
        expected_q, expected_scale = reference.quantize(v, inv_smooth, rotation=group, **options)
        assert_bitwise_equal(found[0], expected_q, what)
        assert_bitwise_equal(found[1], expected_scale, what)
        count_result()
        return
    if norm:
        total = reference.add_residual(x, b.other.cpu())
        assert_bitwise_equal(b.sum, total, what)
        expected = tolerance.rms_norm(total, b.weight.cpu(), 1e-5, inv_smooth)
    else:
        expected = tolerance.activation(x, "silu", b.other.cpu(), inv_smooth)
    granularity = options.get("granularity", "token")
    expected = tolerance.rotated(expected, group)
    tolerance.assert_quantized(found, expected, options.get("scale"), granularity, what)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("scheme", cases.SCHEMES)
@pytest.mark.parametrize("path", FORCED)
def test_every_path_rotates(
    compiled: Backend, library: ctypes.CDLL, path: str, scheme: str, dtype: torch.dtype
) -> None:
    if path == "cluster" and not has_clusters():
        pytest.skip("only sm_90 has clusters")
    if path in ("cluster", "block") and scheme == "tensor":
        pytest.skip("this path is not compiled for two launches")
    for m, k in FORCED[path]:
        b = Buffers(compiled, m, k, dtype, pad=5 if path == "element" else 8)
        groups = [group for group in GROUPS if group <= largest(path, dtype) and k % group == 0]
        for group in groups if k <= 4096 else groups[-1:]:
            check(library, compiled, b, group, "quantize", scheme, path)
        for producer in ("relu", "rms_norm", "silu"):
            check(library, compiled, b, groups[-1], producer, scheme, path)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_groups_that_a_path_cannot_hold(
    compiled: Backend, library: ctypes.CDLL, dtype: torch.dtype
) -> None:
    """A forced path refuses them; the rules take another path."""
    for path in ("block", "long"):
        for k in (512, 36864):
            b = Buffers(compiled, 2, k, dtype, pad=0)
            params = c_interface.params_of(b.x, b.x_q, b.x_scale, k=k, path=path, rotation=512)
            status, _ = c_interface.plan(library, params)
            assert status == c_interface.UNSUPPORTED_SHAPE
            assert library.sqk_quantize(byref(params), None) == status
            assert bool((b.wide_q == POISON).all()), "a refused call must not write"
            for producer in ("quantize", "rms_norm"):
                check(library, compiled, b, 512, producer, "token", None)


@pytest.mark.parametrize("group", [256, 512])
def test_few_long_rows_are_split(compiled: Backend, library: ctypes.CDLL, group: int) -> None:
    """Slices begin at whole groups."""
    for m, k in ((2, 36864), (1, 16896)):
        for scheme in cases.SCHEMES:
            b = Buffers(compiled, m, k, torch.float16, pad=8)
            b.x[0, k // 2 + 100] = torch.nan
            check(library, compiled, b, group, "quantize", scheme, None)


def test_slices_too_long_for_registers(compiled: Backend, library: ctypes.CDLL) -> None:
    """As many rows as are split at all, so that slices are long. The long path cannot hold these groups of float32."""
    b = Buffers(compiled, 40, 65792, torch.float32, pad=0)
    for m in range(40, 0, -1):
        params = c_interface.params_of(b.x[:m], b.x_q[:m], b.x_scale, k=65792, rotation=256)
        status, plan = c_interface.plan(library, params)
        assert status == 0
        if plan.splits > 1:
            break
    assert (c_interface.PATHS[plan.path], plan.launches) == ("element", 2)
    check(
        library,
        compiled,
        Buffers(compiled, m, 65792, torch.float32, pad=0),
        256,
        "quantize",
        "token",
        None,
    )


def test_the_sum_may_overwrite_an_input(compiled: Backend, library: ctypes.CDLL) -> None:
    """What does not fit in registers and shared memory is rotated again from the sum."""
    for k, group in ((4096, 256), (70144, 256), (70144, 512)):
        b = Buffers(compiled, 2, k, torch.float16, pad=0)
        total = reference.add_residual(b.x.cpu(), b.other.cpu())
        params = c_interface.params_of(
            b.x, b.x_q, b.x_scale, producer="layer_norm", k=k, other=b.other, sum_out=b.x,
            weight=b.weight, bias=b.bias, rotation=group,
        )  # fmt: skip
        assert call(library, compiled, params) == 0
        assert_bitwise_equal(b.x, total)
        expected = tolerance.layer_norm(total, b.weight.cpu(), b.bias.cpu(), 1e-5, None)
        found = b.x_q, b.x_scale[:2]
        tolerance.assert_quantized(found, tolerance.rotated(expected, group), None, "token")


@pytest.mark.parametrize("group", [-512, -2, 1, 3, 96, 128, 1024, 1 << 30])
def test_statuses(compiled: Backend, library: ctypes.CDLL, group: int) -> None:
    """K = 192."""
    b = Buffers(compiled, 4, 192, torch.float16, pad=0)
    params = refused(c_interface.params_of(b.x, b.x_q, b.x_scale), rotation=group)
    assert library.sqk_quantize(byref(params), None) == c_interface.INVALID_ARGUMENT
    assert bool((b.wide_q == POISON).all()), "a refused call must not write"
    params.m = 0
    assert library.sqk_quantize(byref(params), None) == c_interface.INVALID_ARGUMENT
