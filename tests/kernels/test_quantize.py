"""`quantize` equals the reference bit for bit, for every dtype, scheme, layout and row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases
from tests.support.backends import Backend
from tests.support.compare import assert_all_bitwise_equal, count_result

#: (M, K). K is on both sides of every change of path (csrc/quantize/table.h), with whole and partial vectors, and also
#: beyond the longest row. M is on both sides of "few rows", for real GPUs and for the simulated one of 8 processors.
LONG_ROWS = (
    (1, 8192), (1, 8200), (2, 16384), (1, 16392), (17, 5120), (17, 8200), (9, 16400), (3, 33024),
    (1, 24577), (3, 49160), (1, 65536), (3, 65536), (2, 65544), (3, 70000), (1, 70001), (270, 2056),
)  # fmt: skip


def check(backend: Backend, x: Tensor, what: str = "", multiples: tuple[int, ...] = (1,)) -> None:
    """x is on the backend's device, in any layout."""
    for inv_smooth in (None, cases.inverse_smooth(x.shape[-1])):
        for scheme in cases.SCHEMES:
            options: dict[str, Any] = cases.quantize_options(scheme)
            expected = reference.quantize(x.cpu(), inv_smooth, **options)
            on_device = backend.options(scheme, inv_smooth)
            for k_multiple in multiples:
                found = ops.quantize(x, **on_device, k_multiple=k_multiple)
                padded = (reference.pad_k(expected[0], k_multiple), expected[1])
                assert_all_bitwise_equal(found, padded, f"{what} {scheme} {k_multiple}")
                assert found[0].is_contiguous()
                count_result()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_smoke_quantize(backend: Backend, dtype: torch.dtype) -> None:
    for m, k in ((5, 72), (3, 1000), (2, 4099), (1, 16384)):
        check(backend, backend.put(cases.activations(m, k, dtype)), f"{m} x {k}", (1, 16))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("shape", cases.QUANTIZE_SHAPES, ids=str)
def test_shapes(backend: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(backend, backend.put(cases.activations(*shape, dtype)), multiples=(1, 7, 16))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("m", [0, 1, 17, 67, 531])
@pytest.mark.parametrize("k", [1, 8, 31, 248, 256, 264, 1000, 1024, 1032, 2049])
def test_every_number_of_rows_and_channels(
    backend: Backend, m: int, k: int, dtype: torch.dtype
) -> None:
    if m > 100 and k > 256:
        pytest.skip("many rows are tested with few channels only")
    check(backend, backend.put(cases.activations(m, k, dtype)))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("shape", LONG_ROWS, ids=str)
def test_long_rows(compiled: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(compiled, compiled.put(cases.activations(*shape, dtype)), multiples=(128,))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 31, 64, 127, 1024, 5120])
def test_edge_rows(backend: Backend, k: int, dtype: torch.dtype) -> None:
    good = cases.rows(cases.FINITE_ROWS, k, dtype)
    bad = cases.rows(cases.NONFINITE_ROWS, k, dtype)
    check(backend, backend.put(good), "finite")
    check(backend, backend.put(torch.cat([good, bad, good])), "all")
    for name, row in zip(cases.FINITE_ROWS, good, strict=True):
        check(backend, backend.put(row[None]), name)
    for name, row in zip(cases.NONFINITE_ROWS, bad, strict=True):
        check(backend, backend.put(torch.stack([good[2], row])), name)


@pytest.mark.parametrize("k", [5120, 9000, 20480])
@pytest.mark.parametrize("position", [0, 7, 8, 4095, 4097, -1])
def test_one_nan_anywhere_spoils_only_its_row(backend: Backend, k: int, position: int) -> None:
    x = cases.activations(3, k, torch.float16)
    x[1, position] = torch.nan
    check(backend, backend.put(x))
    x[1, position] = torch.inf
    check(backend, backend.put(x))


def test_random_bits(backend: Backend) -> None:
    g = cases.generator(0)
    bits = torch.randint(-(2**31), 2**31, (400, 40), generator=g).to(torch.int32)
    x = bits.view(torch.float32)
    check(backend, backend.put(x))
    check(backend, backend.put(torch.where(x.isfinite(), x, 1.0)))
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        check(backend, backend.put(every.view(256, 256)), str(dtype))
        check(backend, backend.put(torch.where(every.isfinite(), every, 1.0).view(64, 1024)))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_any_layout_of_x(backend: Backend, dtype: torch.dtype) -> None:
    base = backend.put(cases.activations(24, 48, dtype))
    odd = torch.zeros(24 * 48 + 1, dtype=dtype, device=backend.device)
    odd[1:] = base.reshape(-1)
    layouts = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "every second row": base[1::2],
        "narrowed, aligned": base[:, 8:32],
        "narrowed": base[:, 3:20],
        "unaligned": odd[1:].view(24, 48),
        "expanded": base[:1].expand(7, 48),
        "expanded columns": base[:, :1].expand(24, 9),
        "permuted": base.view(2, 12, 48).permute(1, 2, 0),
        "rows swapped": base.view(2, 12, 48).transpose(0, 1),
        "deep": base.view(2, 3, 4, 48),
        "deep, with ones": base.view(24, 1, 1, 48)[::2],
        "vector": base[0],
        "vector, strided": base[:, 0],
        "empty": base.view(2, 12, 48)[:, :0],
    }
    for name, x in layouts.items():
        check(backend, x, name, (1, 16))


def test_unaligned_parameters(backend: Backend) -> None:
    x = backend.put(cases.activations(5, 64, torch.float16))
    longer = backend.put(cases.inverse_smooth(130))
    for name, inv_smooth in (("unaligned", longer[1:65]), ("strided", longer[::2][:64])):
        found = ops.quantize(x, inv_smooth=inv_smooth)
        expected = reference.quantize(x.cpu(), inv_smooth.cpu())
        assert_all_bitwise_equal(found, expected, name)
    found = ops.quantize(x, scale=longer[3:4])
    assert_all_bitwise_equal(found, reference.quantize(x.cpu(), scale=longer[3:4].cpu()))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-39, 1e-3, float("nan"), float("inf")])
def test_static_scales(backend: Backend, scale: float) -> None:
    x = cases.activations(4, 100)
    x[2, 5] = torch.nan
    static = torch.tensor([scale])
    found = ops.quantize(backend.put(x), scale=backend.put(static), granularity="tensor")
    assert_all_bitwise_equal(found, reference.quantize(x, scale=static))


def test_the_order_of_the_multiplications(backend: Backend) -> None:
    """The order is (x * inv_smooth) * inverse. Near ties, another order would round differently."""
    k, scale = 1024, 0.013
    inv_smooth = cases.inverse_smooth(k)
    x = (cases.rows({"ties": cases.FINITE_ROWS["ties"]}, k, torch.float32) * scale) / inv_smooth
    static = torch.tensor([scale])
    expected = reference.quantize(x, inv_smooth, scale=static)
    inverse = reference.inverse_scale(static)
    other = reference.round_to_int8((x * inverse) * inv_smooth)
    joint = reference.round_to_int8(x * (inverse * inv_smooth))
    assert int((other != expected[0]).sum()) > 50 and int((joint != expected[0]).sum()) > 50
    put = backend.put
    found = ops.quantize(put(x), inv_smooth=put(inv_smooth), scale=put(static))
    assert_all_bitwise_equal(found, expected)


def test_results_are_reproducible(backend: Backend) -> None:
    x = backend.put(cases.activations(300, 1096, torch.bfloat16))
    for granularity in ("token", "tensor"):
        first = ops.quantize(x, granularity=granularity)
        for _ in range(3):
            assert_all_bitwise_equal(ops.quantize(x, granularity=granularity), first)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.ones(2, 8).double()}, "quantize: x must be float16 or bfloat16 or float32, got float64."),
        ({"x": torch.ones(2, 0)}, r"quantize: x must have shape \[..., K\] with K >= 1, got \(2, 0\)."),
        ({"inv_smooth": torch.ones(7)}, r"must have shape \[8\] \(one factor per channel of x\), got \(7,\)."),
        ({"inv_smooth": torch.ones(8).half()}, "inv_smooth must be float32, got float16. Scales and smoothing"),
        ({"scale": torch.ones(2)}, r"scale must have shape \[1\] \(a static scale for the whole tensor\), got \(2,\)."),
        ({"granularity": "row"}, "granularity must be 'token' or 'tensor', got 'row'; give `scale` for the static"),
        ({"k_multiple": 0}, "quantize: k_multiple must be at least 1, got 0."),
    ],
)  # fmt: skip
def test_refusals(backend: Backend, change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 8), **change}
    on_device = backend.move(arguments)
    # C++ can raise only RuntimeError. The sentence is the same.
    with pytest.raises((RuntimeError, TypeError, ValueError), match=sentence):
        torch.ops.smoothquant_kernels.quantize(on_device.pop("x"), **on_device)
