"""Rotated groups of channels: the reference bit for bit, for every group, dtype, scheme, path and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases, tolerance
from tests.support.backends import Backend
from tests.support.compare import assert_all_bitwise_equal, assert_bitwise_equal, count_result

GROUPS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
EPS = 1e-5
#: Beyond the registers of the longest path, and beyond shared memory, on both sides of "few rows". 2056 = 8 * 257.
LONG_ROWS = (
    (1, 8192),
    (2, 16384),
    (17, 5120),
    (9, 16640),
    (3, 33280),
    (1, 24832),
    (1, 65536),
    (3, 66048),
    (90, 2056),
)


def check(
    backend: Backend, x: Tensor, group: int, what: str = "", multiples: tuple[int, ...] = (1,)
) -> None:
    """x is on the backend's device, in any layout."""
    for inv_smooth in (None, cases.inverse_smooth(x.shape[-1])):
        for scheme in cases.SCHEMES:
            options: dict[str, Any] = cases.quantize_options(scheme)
            expected = reference.quantize(x.cpu(), inv_smooth, rotation=group, **options)
            on_device = backend.options(scheme, inv_smooth)
            for k_multiple in multiples:
                found = ops.quantize(x, **on_device, k_multiple=k_multiple, rotation=group)
                padded = (reference.pad_k(expected[0], k_multiple), expected[1])
                assert_all_bitwise_equal(found, padded, f"{what} {group} {scheme} {k_multiple}")
                count_result()


def groups_of(k: int) -> list[int]:
    return [group for group in GROUPS if k % group == 0]


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_smoke_rotation(backend: Backend, dtype: torch.dtype) -> None:
    for group in (2, 16, 256, 512):
        x = backend.put(cases.activations(3, 3 * group, dtype))
        check(backend, x, group, f"3 x {3 * group}", (1, 7))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("m", [0, 1, 17, 67])
def test_every_group(backend: Backend, m: int, group: int, dtype: torch.dtype) -> None:
    for k in {group, 3 * group, 576, 1536}:
        if k % group == 0 and (m <= 17 or k <= 256):
            check(backend, backend.put(cases.activations(m, k, dtype)), group, f"{m} x {k}", (16,))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("shape", LONG_ROWS, ids=str)
def test_long_rows(compiled: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = compiled.put(cases.activations(*shape, dtype))
    for group in groups_of(shape[1])[-2:]:
        check(compiled, x, group, multiples=(128,))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize(("k", "group"), [(64, 2), (64, 64), (1024, 16), (1024, 512), (5120, 256)])
def test_edge_rows(backend: Backend, k: int, group: int, dtype: torch.dtype) -> None:
    """Ties, zeros, subnormal numbers, and sums that overflow float32. A broken token spoils no other."""
    good = cases.rows(cases.FINITE_ROWS, k, dtype)
    bad = cases.rows(cases.NONFINITE_ROWS, k, dtype)
    check(backend, backend.put(good), group, "finite")
    check(backend, backend.put(torch.cat([good, bad, good])), group, "all")
    for scheme in ("token", "static"):
        x = backend.put(torch.cat([good, bad, good]))
        scales = ops.quantize(x, **backend.options(scheme, None), rotation=group)[1].cpu()
        fine = reference.rotate(x.cpu().float(), group).isfinite().all(-1)
        assert torch.equal(scales.isfinite(), fine), scheme
        assert not fine[len(good) : -len(good)].any() and bool(fine.any())


def test_random_bits(backend: Backend) -> None:
    g = cases.generator(0)
    x = torch.randint(-(2**31), 2**31, (300, 64), generator=g).to(torch.int32).view(torch.float32)
    for group in (2, 8, 64):
        check(backend, backend.put(x), group)
        check(backend, backend.put(torch.where(x.isfinite(), x, 1.0)), group)
        # half of the exponents: hardly any sum overflows
        check(backend, backend.put(torch.where(x.abs() < 1e9, x, 1.0)), group)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        rows = every.view(dtype).view(256, 256)
        check(backend, backend.put(rows), 256, str(dtype))
        check(backend, backend.put(torch.where(rows.isfinite(), rows, 1.0)), 32, str(dtype))


def test_sums_that_overflow(backend: Backend) -> None:
    x = torch.full((3, 64), 1e37)
    x[1, 32:] = 3e38
    check(backend, backend.put(x), 64)
    scale = ops.quantize(backend.put(x), rotation=64)[1].cpu()
    assert scale.isfinite().tolist() == [False, False, False], "64 * 1e37 exceeds float32"
    scale = ops.quantize(backend.put(x), rotation=16)[1].cpu()
    assert scale.isfinite().tolist() == [True, False, True]


def test_the_order_of_the_stages(backend: Backend) -> None:
    """Stages in another order round differently, and so does a rotation before the smoothing."""
    k = group = 512
    x = cases.activations(40, k)
    expected = reference.quantize(x, rotation=group)
    v = x
    h = group // 2
    while h:
        low, high = v.unflatten(-1, (k // (2 * h), 2, h)).unbind(-2)
        v = torch.stack([low + high, low - high], -2).flatten(-3)
        h //= 2
    assert not torch.equal(reference.quantize(v)[1], expected[1])
    assert_all_bitwise_equal(ops.quantize(backend.put(x), rotation=group), expected)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_any_layout_of_x(backend: Backend, dtype: torch.dtype) -> None:
    base = backend.put(cases.activations(24, 96, dtype))
    odd = torch.zeros(24 * 96 + 1, dtype=dtype, device=backend.device)
    odd[1:] = base.reshape(-1)
    layouts = {
        "transposed": (base.t(), 8),
        "every second row": (base[1::2], 32),
        "narrowed, aligned": (base[:, 8:72], 64),
        "narrowed": (base[:, 3:19], 16),
        "unaligned": (odd[1:].view(24, 96), 32),
        "unaligned, long": (odd[1:2049].view(2, 1024), 512),
        "expanded": (base[:1].expand(7, 96), 4),
        "deep": (base.view(2, 3, 4, 96), 16),
        "vector": (base[0], 2),
        "odd vectors": (base[:, :6], 2),
    }
    for name, (x, group) in layouts.items():
        check(backend, x, group, name, (1, 16))
    x = backend.put(cases.activations(5, 64, torch.float16))
    longer = backend.put(cases.inverse_smooth(130))
    for inv_smooth in (longer[1:65], longer[::2][:64]):
        found = ops.quantize(x, inv_smooth=inv_smooth, rotation=32)
        expected = reference.quantize(x.cpu(), inv_smooth.cpu(), rotation=32)
        assert_all_bitwise_equal(found, expected, "unaligned factors")


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize(("k", "group"), [(64, 64), (576, 32), (1536, 512), (9216, 256), (9216, 2)])
def test_norms_and_activations(backend: Backend, k: int, group: int, dtype: torch.dtype) -> None:
    x, other = (backend.put(cases.activations(5, k, dtype, seed)) for seed in (0, 1))
    weight, bias = (
        backend.put(cases.inverse_smooth(k, 11)),
        backend.put(cases.inverse_smooth(k, 12)),
    )
    inv_smooth = cases.inverse_smooth(k)
    total = reference.add_residual(x.cpu(), other.cpu())
    w, b = weight.cpu(), bias.cpu()
    differ = elements = 0
    for scheme in cases.SCHEMES:
        options: dict[str, Any] = cases.quantize_options(scheme)
        given = {**backend.options(scheme, inv_smooth), "rotation": group}
        relu = ops.act_quantize(x, "relu", **given)
        v = reference.activation(x.cpu(), "relu")
        exact = reference.quantize(v, inv_smooth, rotation=group, **options)
        assert_all_bitwise_equal(relu, exact, f"relu {scheme}")
        count_result()
        results = {
            "rms_norm": (
                ops.rms_norm_quantize(x, weight, EPS, residual=other, **given),
                tolerance.rms_norm(total, w, EPS, inv_smooth),
            ),
            "layer_norm": (
                ops.layer_norm_quantize(x, weight, bias, EPS, residual=other, **given),
                tolerance.layer_norm(total, w, b, EPS, inv_smooth),
            ),
            "silu": (
                ops.act_quantize(x, "silu", gate=other, **given),
                tolerance.activation(x.cpu(), "silu", other.cpu(), inv_smooth),
            ),
        }
        for name, (found, expected) in results.items():
            if name.endswith("norm"):
                assert_bitwise_equal(found[2], total, name)
            differ += tolerance.assert_quantized(
                found,
                tolerance.rotated(expected, group),
                options.get("scale"),
                options.get("granularity", "token"),
                f"{name} {scheme}",
            )
            elements += total.numel()
    assert differ <= elements / 200, f"{differ} of {elements} differ"


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("m", [0, 1, 5, 8, 9, 16, 17])
def test_linear(backend: Backend, m: int, dtype: torch.dtype) -> None:
    """Fused into the streaming GEMM, and launched before it."""
    for k, group in ((64, 64), (96, 2), (576, 64), (1536, 512), (3072, 256), (4608, 512)):
        gemm = cases.gemm_operands(1, 35, k)
        w_q, w_scale = backend.put(gemm.w_q), backend.put(gemm.w_scale)
        wide = backend.put(cases.activations(m, k + 3, dtype))
        inv_smooth = cases.inverse_smooth(k)
        for x in (wide[:, :k].contiguous(), wide[:, 3:]):
            for scheme in cases.SCHEMES:
                options: dict[str, Any] = cases.quantize_options(scheme)
                x_q, x_scale = reference.quantize(x.cpu(), inv_smooth, rotation=group, **options)
                expected = reference.gemm_s8(
                    x_q, gemm.w_q, x_scale, gemm.w_scale, out_dtype=dtype
                )  # fmt: skip
                given = backend.options(scheme, inv_smooth)
                found = ops.linear_s8(x, w_q, w_scale, rotation=group, **given)
                assert_bitwise_equal(found, expected, f"{m} {k} {group} {scheme}")
                count_result()


def test_results_are_reproducible(backend: Backend) -> None:
    x = backend.put(cases.activations(300, 1024, torch.bfloat16))
    for granularity in ("token", "tensor"):
        first = ops.quantize(x, granularity=granularity, rotation=256)
        for _ in range(2):
            again = ops.quantize(x, granularity=granularity, rotation=256)
            assert_all_bitwise_equal(again, first)


@pytest.mark.parametrize("group", [-2, 1, 3, 12, 64, 1024, 2**32 + 2])
def test_refusals(backend: Backend, group: int) -> None:
    """64 does not divide K = 96. The sentence names the op."""
    sentence = (
        f"rotation must be 0 or a power of two from 2 to 512 that divides K = 96, got {group}."
    )
    x, w = backend.put(torch.ones(2, 96)), backend.put(torch.ones(96))
    w_q = backend.put(torch.ones(3, 96, dtype=torch.int8))
    ops_of = torch.ops.smoothquant_kernels
    calls = {
        "quantize": lambda: ops_of.quantize(x, rotation=group),
        "rms_norm_quantize": lambda: ops_of.rms_norm_quantize(x, w, EPS, rotation=group),
        "layer_norm_quantize": lambda: ops_of.layer_norm_quantize(x, w, w, EPS, rotation=group),
        "act_quantize": lambda: ops_of.act_quantize(x, "silu", rotation=group),
        "linear_s8": lambda: ops_of.linear_s8(x, w_q, backend.put(torch.ones(3)), rotation=group),
    }
    for op, call in calls.items():
        with pytest.raises((RuntimeError, ValueError), match=f"{op}: {sentence}"):
            call()
