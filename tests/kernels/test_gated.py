"""The gated GEMM gives the bits of `gemm_s8`, then `act_quantize`, on every backend."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases
from tests.support.backends import Backend
from tests.support.cases import Gemm
from tests.support.compare import assert_bitwise_equal, count_result

KINDS = tuple(reference.FUSED_KINDS)
#: (M, I, K): blocks of 8 channels with and without a shorter last one; one and several tiles and panels.
SHAPES = (
    (0, 3, 5),
    (1, 1, 1),
    (1, 8, 64),
    (1, 257, 96),
    (2, 4, 31),
    (7, 24, 100),
    (16, 16, 576),
    (17, 33, 257),
    (33, 130, 64),
    (65, 66, 48),
    (129, 264, 80),
)


def two_ops(
    gemm: Gemm,
    out_scale: Tensor,
    kind: str,
    bias: Tensor | None,
    inv_smooth: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The specification, by the ops of the same device."""
    y = ops.gemm_s8(*gemm[:4], bias=bias, out_dtype=dtype)
    y = torch.cat(reference.separate_gate_up(y), dim=-1)
    return ops.act_quantize(y, kind, inv_smooth=inv_smooth, scale=out_scale)


def check(
    backend: Backend,
    gemm: Gemm,
    *,
    out_scale: float = 0.05,
    kind: str = "silu_mul",
    bias: Tensor | None = None,
    inv_smooth: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    what: str = "",
) -> tuple[Tensor, Tensor]:
    put = backend.put
    gemm = Gemm(*map(put, gemm))
    scale = put(torch.tensor([out_scale]))
    bias, factors = (None if t is None else put(t) for t in (bias, inv_smooth))
    found = ops.gemm_s8_gated(
        *gemm[:4], scale, kind=kind, bias=bias, inv_smooth=factors, dtype=dtype
    )
    expected = two_ops(gemm, scale, kind, bias, factors, dtype)
    what = f"{what} {tuple(gemm.x_q.shape)} {tuple(gemm.w_q.shape)} {kind} {dtype} {out_scale}"
    assert found[0].is_contiguous() and found[1].is_contiguous()
    for name, one, other in zip(("y_q", "y_scale"), found, expected, strict=True):
        assert_bitwise_equal(one, other, f"{what} {name}")
    count_result()
    return found[0].cpu(), found[1].cpu()


def operands(m: int, channels: int, k: int, **options: Any) -> Gemm:
    """Products of some units, for which the activation is neither 0 nor the identity."""
    gemm = cases.gemm_operands(m, 2 * channels, k, **options)
    return gemm._replace(w_scale=4 * gemm.w_scale)


@pytest.mark.parametrize("kind", KINDS)
def test_smoke_gated(backend: Backend, kind: str) -> None:
    for (m, channels), dtype in product(((3, 37), (35, 64)), cases.FLOATS):
        gemm = operands(m, channels, 70)
        y_q, _ = check(backend, gemm, kind=kind, dtype=dtype, bias=gemm.bias)
        assert len(y_q.unique()) > 20, "the values must fill the range"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: Backend, shape: tuple[int, int, int]) -> None:
    for i, case in enumerate(
        cases.covering(
            6,
            sum(shape),
            kind=KINDS,
            dtype=cases.FLOATS,
            bias=(None, *cases.FLOATS),
            smooth=(True, False),
            per_token=(True, False),
            per_channel=(True, False),
        )
    ):
        scales = {name: case[name] for name in ("per_token", "per_channel")}
        gemm = operands(*shape, seed=i, **scales)
        bias = None if case["bias"] is None else gemm.bias.to(case["bias"])
        factors = cases.inverse_smooth(shape[1], i) if case["smooth"] else None
        check(backend, gemm, kind=case["kind"], dtype=case["dtype"], bias=bias, inv_smooth=factors)


@pytest.mark.parametrize("channels", [*range(1, 34), 40, 47, 48, 49, 96, 103])
def test_every_end_of_the_last_block(backend: Backend, channels: int) -> None:
    gemm = operands(5, channels, 40)
    factors = cases.inverse_smooth(channels)
    check(backend, gemm, bias=gemm.bias, inv_smooth=factors, dtype=torch.bfloat16)


@pytest.mark.parametrize("m", [1, 2, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 257])
def test_every_number_of_tokens(backend: Backend, m: int) -> None:
    for i, (channels, k) in enumerate(((24, 200), (129, 99))):
        gemm = operands(m, channels, k)
        check(backend, gemm, dtype=cases.FLOATS[(m + i) % 3], kind=KINDS[m % 3])


@pytest.mark.parametrize("m", [3, 20, 40])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nonfinite_rows(backend: Backend, m: int, kind: str, dtype: torch.dtype) -> None:
    """A NaN or Inf in one channel of one row marks this row alone, wherever it arises."""
    channels = 70
    gemm = operands(m, channels, 64)
    bad = {0: torch.nan, 2: torch.inf, m - 1: -torch.inf}
    for row, value in bad.items():
        gemm.x_scale[row] = value
    y_q, y_scale = check(backend, gemm, kind=kind, dtype=dtype)
    assert not y_q[0].any(), "NaN must become 0"
    assert y_scale.isnan().tolist() == [row in bad for row in range(m)]
    # One channel, by the smoothing factor alone: the product is finite.
    gemm = operands(m, channels, 64)
    factors = torch.ones(channels)
    factors[channels - 1] = torch.inf
    _, y_scale = check(backend, gemm, kind=kind, dtype=dtype, inv_smooth=factors)
    assert bool(y_scale.isnan().any())
    # One row overflows the type of the product.
    gemm = operands(m, channels, 64)
    gemm.x_scale[1] *= 1e38 if dtype != torch.float16 else 1e6
    check(backend, gemm, kind=kind, dtype=dtype, inv_smooth=torch.ones(channels))


@pytest.mark.parametrize("m", [5, 40])
def test_scales_of_the_output(backend: Backend, m: int) -> None:
    gemm = operands(m, 33, 64)
    for out_scale in (0.0, -1.0, 1e-39, 1e-30, 1.0, 3e38, torch.nan, torch.inf):
        _, y_scale = check(backend, gemm, out_scale=out_scale)
        assert y_scale.isnan().all() if out_scale != out_scale else not y_scale.isnan().any()


def test_extreme_gates(backend: Backend) -> None:
    """Gates for which exp over- and underflows, signed zeros, and products that saturate or are subnormal."""
    values = [0.0, -0.0, 1e-38, -1e-40, 3.0, -3.0, 20.0, -20.0, 88.0, -88.5, -104.0, 709.0, -750.0]
    gates = torch.tensor(values + [-v for v in values])
    channels = len(gates)
    zero = torch.zeros(7, 4, dtype=torch.int8)
    w_q = torch.zeros(2 * channels, 4, dtype=torch.int8)
    ones = torch.ones(1)
    gemm = Gemm(zero, w_q, ones, ones, ones, ones)
    for up, dtype, kind in product((1.0, -1e-30, 3e38), cases.FLOATS, KINDS):
        bias = reference.interleave_gate_up(gates, torch.full((channels,), up))
        check(backend, gemm, bias=bias, dtype=dtype, kind=kind, out_scale=0.5)


def test_any_layout(backend: Backend) -> None:
    m, channels, k = 19, 20, 80
    gemm = operands(m, channels, k)
    wide = torch.full((2 * m, 3 * k), 99, dtype=torch.int8)
    rows = torch.full((4 * channels, 2 * k), 99, dtype=torch.int8)
    vector = torch.full((4 * channels,), torch.nan)
    factors = torch.full((2 * channels,), torch.nan)
    factors[::2] = cases.inverse_smooth(channels)
    for name, x_q, w_q in (
        ("aligned", wide[:m, 16 : 16 + k], rows[: 2 * channels, 32 : 32 + k]),
        ("unaligned", wide[:m, 3 : 3 + k], rows[: 2 * channels, 5 : 5 + k]),
        ("every second", wide[::2, ::3], rows[::2, ::2]),
    ):
        x_q.copy_(gemm.x_q)
        w_q.copy_(gemm.w_q)
        vector[::2] = gemm.w_scale
        view = Gemm(x_q, w_q, gemm.x_scale, vector[::2], gemm.bias, gemm.residual)
        found = check(backend, view, bias=vector[::2], inv_smooth=factors[::2], what=name)
        expected = check(
            backend, gemm, bias=gemm.w_scale, inv_smooth=factors[::2].clone(), what=name
        )
        assert torch.equal(found[0], expected[0])


def test_any_shape_of_x(backend: Backend) -> None:
    gemm = operands(24, 11, 64)
    flat = check(backend, gemm)[0]
    deep = gemm._replace(x_q=gemm.x_q.view(2, 3, 4, 64))
    put = [backend.put(t) for t in (*deep[:4], torch.tensor([0.05]))]
    y_q, y_scale = ops.gemm_s8_gated(*put)
    assert y_q.shape == (2, 3, 4, 11) and y_scale.shape == (24,)
    assert torch.equal(y_q.cpu().view(24, 11), flat)
    y_q, y_scale = ops.gemm_s8_gated(put[0][0, 0, 0], put[1], put[2][:1], *put[3:])
    assert y_q.shape == (11,) and y_scale.shape == (1,)


G = cases.gemm_operands(4, 6, 8)
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"x_q": G.x_q.float()}, "x_q must be int8, got float32. Quantize it first"),
    ({"w_q": G.w_q[:, :7]}, r"the same K and N >= 1, got \(4, 8\) and \(6, 7\)\."),
    ({"w_q": G.w_q[:5], "w_scale": torch.ones(1)}, r"w_q must have an even number of rows.* got 5\."),
    ({"x_scale": torch.ones(3)}, r"x_scale must have shape \[4\] or \[1\]"),
    ({"w_scale": torch.ones(3)}, r"w_scale must have shape \[6\] or \[1\]"),
    ({"bias": torch.ones(3)}, r"bias must have shape \[6\], got \(3,\)\."),
    ({"kind": "silu"}, "kind must be one of silu_mul, gelu_mul, gelu_tanh_mul; got 'silu'."),
    ({"out_scale": torch.ones(4)}, r"out_scale must have shape \[1\] \(the scale of the int8 output\)"),
    ({"out_scale": torch.ones(1).half()}, "out_scale must be float32, got float16."),
    ({"inv_smooth": torch.ones(6)}, r"inv_smooth must have shape \[3\] \(one factor per output"),
    ({"inv_smooth": torch.ones(3).half()}, "inv_smooth must be float32, got float16."),
    ({"dtype": torch.int8}, "dtype must be float16, bfloat16 or float32, got"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_refusals(backend: Backend, change: dict[str, Any], sentence: str) -> None:
    given = {name: getattr(G, name) for name in ("x_q", "w_q", "x_scale", "w_scale")}
    given |= {"out_scale": torch.ones(1), "dtype": torch.float16, **change}
    # C++ can raise only RuntimeError. The sentence is the same.
    with pytest.raises(
        (RuntimeError, TypeError, ValueError), match=f"^gemm_s8_gated: .*{sentence}"
    ):
        torch.ops.smoothquant_kernels.gemm_s8_gated(**backend.move(given))
