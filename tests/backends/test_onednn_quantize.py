"""The CPU quantizers in Python equal the reference bit for bit, for every type, layout, row and chunk size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from smoothquant_kernels.backends import onednn
from tests.support import cases
from tests.support.compare import assert_all_bitwise_equal, assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("in_python")


def check_quantize(x: Tensor, what: str = "") -> None:
    k = x.shape[-1]
    for rotation in (0, *(g for g in (2, 8, 16, 64, 512) if k % g == 0)):
        check_rotated(x, rotation, f"{what} {rotation}")


def check_rotated(x: Tensor, rotation: int, what: str) -> None:
    for inv_smooth in (None, cases.inverse_smooth(x.shape[-1])):
        for scheme in cases.SCHEMES:
            options: dict[str, Any] = {**cases.quantize_options(scheme), "rotation": rotation}
            for k_multiple in (1, 7, 16):
                found = ops.quantize(x, inv_smooth=inv_smooth, **options, k_multiple=k_multiple)
                expected = reference.quantize(x, inv_smooth, **options, k_multiple=k_multiple)
                assert_all_bitwise_equal(found, expected, f"{what} {scheme} {k_multiple}")
                assert found[0].is_contiguous()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("shape", cases.QUANTIZE_SHAPES, ids=str)
def test_quantize(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_quantize(cases.activations(*shape, dtype))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 31, 64, 127])
def test_quantize_edge_rows(k: int, dtype: torch.dtype) -> None:
    good = cases.rows(cases.FINITE_ROWS, k, dtype)
    bad = cases.rows(cases.NONFINITE_ROWS, k, dtype)
    check_quantize(good, "finite")
    check_quantize(torch.cat([good, bad, good]), "all")
    for name, row in zip(cases.FINITE_ROWS, good, strict=True):
        check_quantize(row[None], name)
    for name, row in zip(cases.NONFINITE_ROWS, bad, strict=True):
        check_quantize(torch.stack([good[2], row]), name)


def test_quantize_random_bits() -> None:
    g = cases.generator(0)
    bits = torch.randint(-(2**31), 2**31, (400, 40), generator=g).to(torch.int32)
    x = bits.view(torch.float32)
    check_quantize(x)
    check_quantize(torch.where(x.isfinite(), x, 1.0))


@pytest.mark.parametrize("rows_at_a_time", [0, 1, 3, 4])
@pytest.mark.parametrize("m", [1, 3, 4, 5, 8, 9])
def test_the_chunk_size_does_not_change_the_rows(
    m: int, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    k = 10
    monkeypatch.setattr(onednn, "_CHUNK_BYTES", 4 * k * rows_at_a_time)
    check_quantize(cases.activations(m, k))
    broken = cases.activations(m, k, torch.float16)
    broken[m // 2, 3] = torch.nan
    check_quantize(broken)


def test_any_layout_of_x() -> None:
    base = cases.activations(24, 40)
    odd = torch.zeros(24 * 40 + 1)
    odd[1:] = base.reshape(-1)
    layouts = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "narrowed": base[:, 3:20],
        "unaligned": odd[1:].view(24, 40),
        "expanded": base[:1].expand(7, 40),
        "expanded columns": base[:, :1].expand(24, 9),
        "permuted": base.view(2, 12, 40).permute(1, 2, 0),
        "deep": base.view(2, 3, 4, 40),
        "vector": base[0],
        "empty": base.view(2, 12, 40)[:, :0],
    }
    for dtype in cases.FLOATS:
        for name, x in layouts.items():
            check_quantize(x if dtype == torch.float32 else x.to(dtype), name)


@pytest.mark.parametrize("k", [1, 16, 21, 50])
def test_padding_k_does_not_change_the_product(k: int) -> None:
    x, w = cases.activations(9, k), cases.activations(5, k, seed=1)
    w_q, w_scale = ops.quantize(w)
    x_q, x_scale = ops.quantize(x)
    expected = ops.gemm_s8(x_q, w_q, x_scale, w_scale, out_dtype=torch.float32)
    for k_multiple in (7, 16):
        padded_w, _ = ops.quantize(w, k_multiple=k_multiple)
        padded_x, x_scale = ops.quantize(x, k_multiple=k_multiple)
        found = ops.gemm_s8(padded_x, padded_w, x_scale, w_scale, out_dtype=torch.float32)
        assert_bitwise_equal(found, expected)


# 17 divides the number of channels, with and without a fused gate; 16 divides neither.
@pytest.mark.parametrize(("m", "k_multiple"), [(6, 1), (6, 16), (6, 17), (0, 1), (0, 16)])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_fused_producers(dtype: torch.dtype, scheme: str, m: int, k_multiple: int) -> None:
    x, other = (cases.activations(m, 34, dtype, seed) for seed in (0, 1))
    weight, bias = cases.inverse_smooth(34).to(dtype), cases.inverse_smooth(34, 3)
    options: dict[str, Any] = {**cases.quantize_options(scheme), "k_multiple": k_multiple}
    inv_smooth = cases.inverse_smooth(34, 7)
    for residual in (None, other):
        total = reference.add_residual(x, residual)
        for found, y in (
            (
                ops.rms_norm_quantize(
                    x, weight, 1e-5, residual=residual, inv_smooth=inv_smooth, **options
                ),
                reference.rms_norm(total, weight, 1e-5),
            ),
            (
                ops.layer_norm_quantize(
                    x, weight, bias, 1e-5, residual=residual, inv_smooth=inv_smooth, **options
                ),
                reference.layer_norm(total, weight, bias, 1e-5),
            ),
        ):
            quantized = reference.quantize(y, inv_smooth, **options)
            expected = quantized if residual is None else (*quantized, total)
            assert_all_bitwise_equal(found, expected)
    for kind in (*reference.ACTIVATIONS, *reference.FUSED_KINDS):
        fused = kind in reference.FUSED_KINDS
        inverse = inv_smooth[:17] if fused else inv_smooth
        for gate in (None,) if fused else (None, other):
            act = ops.act_quantize(x, kind, gate=gate, inv_smooth=inverse, **options)
            y = reference.activation(x, kind, gate)
            assert_all_bitwise_equal(act, reference.quantize(y, inverse, **options), kind)
