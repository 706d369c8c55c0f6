"""`linear_s8`, fused or not, equals the reference's quantizer followed by its GEMM bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal, count_result

#: M on both sides of the largest fused launch, and of the tiles for more tokens.
TOKENS = (0, 1, 2, 5, 8, 9, 16, 17, 65)
#: K: one channel, odd sizes, whole and partial vectors, and several parts of a row for each warp. The longest rows are
#: quantized in a launch of their own.
CHANNELS = (1, 31, 64, 257, 1000, 2056, 4099)


def weights(backend: Backend, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(w_q, w_scale, bias) on the backend's device."""
    gemm = cases.gemm_operands(1, n, k)
    return backend.put(gemm.w_q), backend.put(gemm.w_scale), backend.put(gemm.bias)


def check(
    backend: Backend,
    x: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    inv_smooth: Tensor | None,
    scheme: str,
    what: str = "",
    scale: float = 0.013,
    residual: Tensor | None = None,
) -> Tensor:
    """All but inv_smooth are on the backend's device, in any layout. Returns y on the CPU."""
    options: dict[str, Any] = cases.quantize_options(scheme, scale)
    x_q, x_scale = reference.quantize(x.cpu(), inv_smooth, **options)
    added, last = (None if t is None else t.cpu() for t in (bias, residual))
    expected = reference.gemm_s8(
        x_q, w_q.cpu(), x_scale, w_scale.cpu(), added, last, out_dtype=x.dtype
    )  # fmt: skip
    given = {k: backend.put(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    smooth = None if inv_smooth is None else backend.put(inv_smooth)
    found = ops.linear_s8(
        x, w_q, w_scale, bias=bias, residual=residual, inv_smooth=smooth, **given
    )  # fmt: skip
    assert found.is_contiguous()
    assert_bitwise_equal(found, expected, f"{what} {scheme}")
    count_result()
    return expected


def check_all(backend: Backend, x: Tensor, n: int, what: str) -> None:
    """Every scheme, with and without smoothing, bias and a residual of any type."""
    w_q, w_scale, bias = weights(backend, n, x.shape[-1])
    residual = backend.put(torch.randn(*x.shape[:-1], n, generator=cases.generator(5)))
    for i, scheme in enumerate(cases.SCHEMES):
        for smooth in (False, True):
            inv_smooth = cases.inverse_smooth(x.shape[-1]) if smooth else None
            added = bias if smooth ^ (i == 1) else None
            last = (
                None if smooth ^ (i == 2) else residual.to(cases.FLOATS[i] if smooth else x.dtype)
            )
            check(
                backend, x, w_q, w_scale if i else w_scale[:1], added, inv_smooth, scheme, what,
                residual=last,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_smoke_linear(backend: Backend, dtype: torch.dtype) -> None:
    for m, n, k in ((3, 35, 139), (12, 48, 320), (40, 33, 64)):
        check_all(backend, backend.put(cases.activations(m, k, dtype)), n, f"{m} {n} {k}")


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens_and_channels(backend: Backend, m: int, dtype: torch.dtype) -> None:
    for i, k in enumerate(CHANNELS if m < 17 else CHANNELS[:5]):
        n = (1, 17, 33, 64, 35, 16, 130)[(i + m) % 7]
        check_all(backend, backend.put(cases.activations(m, k, dtype)), n, f"{m} {n} {k}")


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize(
    ("m", "k"), [(1, 16384), (3, 9000), (8, 5120), (8, 5128), (5, 8195), (9, 5120), (1, 50000)]
)
def test_long_rows(backend: Backend, m: int, k: int, dtype: torch.dtype) -> None:
    """Rows on both sides of the longest that a block quantizes itself, for which its warps need several rounds."""
    check_all(backend, backend.put(cases.activations(m, k, dtype)), 20, f"{m} {k}")


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 31, 64, 1000])
def test_edge_rows(backend: Backend, k: int, dtype: torch.dtype) -> None:
    """Rows of ties, zeros, subnormal and nonfinite values: some at a time, and all together."""
    w_q, w_scale, bias = weights(backend, 21, k)
    good, bad = cases.rows(cases.FINITE_ROWS, k, dtype), cases.rows(cases.NONFINITE_ROWS, k, dtype)
    every = torch.cat([good, bad])
    groups = {"all": torch.cat([every, good])}
    for i in range(0, len(every), 3):
        groups[f"rows {i} ..."] = every[i : i + 3]
    groups["ties and broken"] = torch.stack([good[4], *bad, good[4]])
    for name, x in groups.items():
        broken = ~x.isfinite().all(-1)
        for scheme in cases.SCHEMES:
            # Under a scale of 1 the ties are exact.
            y = check(backend, backend.put(x), w_q, w_scale, bias, None, scheme, name, scale=1.0)
            if scheme == "token" and dtype != torch.float16:
                # A token that is not finite gives a nonfinite output, and no other token gives a NaN.
                assert bool((~y.isfinite()).any(-1)[broken].all()), name
                assert not y[~broken].isnan().any(), name


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-39, 1e-3, float("nan"), float("inf")])
def test_static_scales(backend: Backend, scale: float) -> None:
    for m in (4, 20):
        x = cases.activations(m, 100)
        x[2, 5] = torch.nan
        check(backend, backend.put(x), *weights(backend, 19, 100), None, "static", scale=scale)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_any_layout_of_x(backend: Backend, dtype: torch.dtype) -> None:
    base = backend.put(cases.activations(24, 48, dtype))
    odd = torch.zeros(24 * 48 + 1, dtype=dtype, device=backend.device)
    odd[1:] = base.reshape(-1)
    for name, x in {
        "transposed": base[:, :7].t(),
        "strided": base[::4, 1::3],
        "every second row": base[1::2],
        "narrowed, aligned": base[:8, 8:32],
        "narrowed": base[:8, 3:20],
        "unaligned": odd[1 : 1 + 5 * 48].view(5, 48),
        "many unaligned": odd[1:].view(24, 48),
        "expanded": base[:1].expand(7, 48),
        "expanded columns": base[:6, :1].expand(6, 9),
        "deep": base[:6].view(2, 3, 48),
        "deeper": base.view(2, 3, 4, 48),
        "permuted": base.view(2, 12, 48).permute(1, 2, 0),
        "rows swapped": base[:8].view(2, 4, 48).transpose(0, 1),
        "vector": base[0],
        "vector, strided": base[:, 0],
        "empty": base.view(2, 12, 48)[:, :0],
    }.items():
        check_all(backend, x, 19, name)


@pytest.mark.parametrize("m", [4, 30])
def test_any_layout_of_the_weights(backend: Backend, m: int) -> None:
    base = backend.put(cases.random_int8(70, 70))
    factors = backend.put(cases.inverse_smooth(200))
    for name, w_q in {
        "transposed": base.t(),
        "narrowed": base[:21, 5:38],
        "narrowed, aligned": base[1:22, :64],
        "strided": base[::2, ::2],
        "expanded": base[:1].expand(9, 70),
        "unaligned": base.reshape(-1)[3 : 3 + 9 * 64].view(9, 64),
    }.items():
        n, k = w_q.shape
        x = backend.put(cases.activations(m, k, torch.float16))
        inv_smooth = cases.inverse_smooth(k)
        check(backend, x, w_q, factors[1 : n + 1], factors[::2][:n], inv_smooth, "token", name)


def test_bias_of_any_type_and_unaligned_factors(backend: Backend) -> None:
    x, k = cases.activations(3, 64, torch.bfloat16), 64
    w_q, w_scale, bias = weights(backend, 18, k)
    for dtype in cases.FLOATS:
        check(backend, backend.put(x), w_q, w_scale, bias.to(dtype), None, "token", str(dtype))
    longer = cases.inverse_smooth(3 * k)
    for name, view in (("unaligned", slice(1, k + 1)), ("strided", slice(0, 2 * k, 2))):
        found = ops.linear_s8(backend.put(x), w_q, w_scale, inv_smooth=backend.put(longer)[view])
        expected = ops.linear_s8(backend.put(x), w_q, w_scale, inv_smooth=backend.put(longer[view]))
        assert_bitwise_equal(found, expected, name)


@pytest.mark.parametrize("m", [4, 30])
def test_any_layout_of_the_residual(backend: Backend, m: int) -> None:
    x = backend.put(cases.activations(m, 64, torch.bfloat16))
    w_q, w_scale, bias = weights(backend, 18, 64)
    base = backend.put(torch.randn(m, 60, generator=cases.generator(7)))
    for dtype in cases.FLOATS:
        typed = base.to(dtype)
        for name, residual in {
            "slice": typed[:, 18:36],
            "unaligned slice": typed[:, 5:23],
            "strided": typed[:, ::3][:, :18],
            "transposed": typed[:, :18].t().contiguous().t(),
            "repeated": typed[:1, :18].expand(m, 18),
            "one column": typed[:, :1].expand(m, 18),
        }.items():
            what = f"{name} {dtype}"
            check(backend, x, w_q, w_scale, bias, None, "token", what, residual=residual)


def test_random_bits(backend: Backend) -> None:
    g = cases.generator(0)
    bits = torch.randint(-(2**31), 2**31, (300, 40), generator=g).to(torch.int32)
    for dtype in cases.FLOATS:
        kind = torch.int32 if dtype == torch.float32 else torch.int16
        x = bits.view(kind).view(dtype)[:, :40].contiguous()
        w_q, w_scale, bias = weights(backend, 17, 40)
        for m in (8, 300):
            for finite in (False, True):
                rows = torch.where(x.isfinite(), x, 1.0)[:m] if finite else x[:m]
                for scheme in cases.SCHEMES:
                    check(backend, backend.put(rows), w_q, w_scale, bias, None, scheme, str(dtype))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.ones(2, 8).double()}, "x must be float16 or bfloat16 or float32, got float64."),
        ({"x": torch.ones(2, 0)}, r"x must have shape \[..., K\] with K >= 1, got \(2, 0\)."),
        ({"x": torch.ones(2, 7)}, r"the same K and N >= 1, got \(2, 7\) and \(3, 8\)\."),
        ({"w_q": torch.ones(3, 8)}, "w_q must be int8, got float32. Quantize it first"),
        ({"w_scale": torch.ones(2)}, r"w_scale must have shape \[3\] or \[1\] \(per output channel"),
        ({"bias": torch.ones(2)}, r"bias must have shape \[3\], got \(2,\)\."),
        ({"residual": torch.ones(2, 4)}, r"residual must have shape \(2, 3\), got \(2, 4\)\."),
        ({"residual": torch.ones(3)}, r"residual must have shape \(2, 3\), got \(3,\)\."),
        ({"residual": torch.ones(2, 3).int()}, "residual must be float16 or bfloat16 or float32, got int32."),
        ({"inv_smooth": torch.ones(7)}, r"inv_smooth must have shape \[8\] \(one factor per channel of x\), got"),
        ({"inv_smooth": torch.ones(8).half()}, "inv_smooth must be float32, got float16. Scales and smoothing"),
        ({"scale": torch.ones(2)}, r"scale must have shape \[1\] \(a static scale for the whole tensor\), got \(2,\)."),
        ({"granularity": "row"}, "granularity must be 'token' or 'tensor', got 'row'; give `scale` for the static"),
        (
            {"x": torch.ones(1, 131072), "w_q": torch.ones(1, 131072, dtype=torch.int8), "w_scale": torch.ones(1)},
            "cannot overflow, got 131072; split the layer over K.",
        ),
    ],
)  # fmt: skip
def test_refusals(backend: Backend, change: dict[str, Any], sentence: str) -> None:
    w_q = torch.ones(3, 8, dtype=torch.int8)
    given = {"x": torch.ones(2, 8), "w_q": w_q, "w_scale": torch.ones(3), **change}
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^linear_s8: .*{sentence}"):
        torch.ops.smoothquant_kernels.linear_s8(**backend.move(given))
