"""The norm producers stay within the derived bound of the reference, and the sum with the residual is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases, compare, tolerance
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal

NORMS = ("rms_norm", "layer_norm")
EPS = 1e-5


class Parameters:
    """The parameters of a norm for one K. Their dtype may differ from x's."""

    def __init__(
        self, norm: str, k: int, dtype: torch.dtype, *, affine: bool = True, bias: bool = True
    ) -> None:
        needs_weight = affine or norm == "rms_norm"
        self.weight = cases.inverse_smooth(k, 11).to(dtype) if needs_weight else None
        with_bias = bias and norm == "layer_norm"
        self.bias = (cases.inverse_smooth(k, 12) - 1).to(dtype) if with_bias else None
        self.norm = norm

    def expected(self, total: Tensor, inv_smooth: Tensor | None) -> tolerance.Expected:
        if self.norm == "rms_norm":
            assert self.weight is not None
            return tolerance.rms_norm(total, self.weight, EPS, inv_smooth)
        return tolerance.layer_norm(total, self.weight, self.bias, EPS, inv_smooth)

    def run(self, backend: Backend, x: Tensor, **options: Any) -> tuple[Tensor, ...]:
        weight = None if self.weight is None else backend.put(self.weight)
        if self.norm == "rms_norm":
            assert weight is not None
            return ops.rms_norm_quantize(x, weight, EPS, **options)
        bias = None if self.bias is None else backend.put(self.bias)
        return ops.layer_norm_quantize(x, weight, bias, EPS, **options)


def check(
    backend: Backend,
    parameters: Parameters,
    x: Tensor,
    residual: Tensor | None = None,
    what: str = "",
    k_multiple: int = 1,
) -> None:
    """x and residual [M, K] are on the backend's device, in any layout."""
    k = x.shape[-1]
    differ, total_elements = 0, 0
    for inv_smooth in (None, cases.inverse_smooth(k)):
        for scheme in cases.SCHEMES:
            options: dict[str, Any] = cases.quantize_options(scheme)
            total = reference.add_residual(x.cpu(), None if residual is None else residual.cpu())
            on_device = backend.options(scheme, inv_smooth)
            found = parameters.run(
                backend, x, residual=residual, k_multiple=k_multiple, **on_device
            )
            if residual is not None:
                assert_bitwise_equal(found[2], total, f"{what} sum")
            else:
                assert len(found) == 2
            assert not found[0][..., k:].any(), "the padding must be zero"
            rows = total.reshape(-1, k)
            differ += tolerance.assert_quantized(
                (found[0][..., :k], found[1]),
                parameters.expected(rows, inv_smooth),
                options.get("scale"),
                options.get("granularity", "token"),
                f"{what} {scheme}",
            )
            total_elements += rows.numel()
    # Each element is within its bound, and hardly any differs at all.
    assert differ <= max(2, total_elements / 200), f"{what}: {differ} of {total_elements} differ"


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_smoke_norms(backend: Backend, norm: str, dtype: torch.dtype) -> None:
    for m, k in ((3, 72), (2, 1000), (2, 5120), (1, 31)):
        x, residual = (backend.put(cases.activations(m, k, dtype, seed)) for seed in (0, 1))
        check(backend, Parameters(norm, k, dtype), x, residual, f"{m} x {k}", 16)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize("k", [1, 8, 31, 256, 264, 1024, 4096, 4100])
def test_shapes(backend: Backend, norm: str, m: int, k: int, dtype: torch.dtype) -> None:
    x, residual = (backend.put(cases.activations(m, k, dtype, seed)) for seed in (0, 1))
    parameters = Parameters(norm, k, dtype)
    check(backend, parameters, x)
    check(backend, parameters, x, residual)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("k", [8192, 16384, 16392, 33000, 65536, 70000, 70001])
def test_long_rows(compiled: Backend, norm: str, k: int, dtype: torch.dtype) -> None:
    x, residual = (compiled.put(cases.activations(2, k, dtype, seed)) for seed in (0, 1))
    check(compiled, Parameters(norm, k, torch.float32), x, residual, k_multiple=16)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("parameter_dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_parameters_of_any_dtype(
    backend: Backend, norm: str, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    for k in (128, 129):
        x = backend.put(cases.activations(4, k, dtype))
        check(backend, Parameters(norm, k, parameter_dtype), x)
        check(backend, Parameters(norm, k, parameter_dtype, affine=False, bias=False), x)
        check(backend, Parameters(norm, k, parameter_dtype, affine=False), x)
        check(backend, Parameters(norm, k, parameter_dtype, bias=False), x)


def squares_overflow(x: Tensor) -> Tensor:
    """[M]: rows whose sum of squares overflows float32. They give NaN on a GPU, but not on a CPU."""
    return (x.double().square().sum(-1) > 3e38) & x.isfinite().all(-1)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("k", [1, 31, 64, 1024])
def test_edge_rows(backend: Backend, norm: str, k: int, dtype: torch.dtype) -> None:
    good = cases.rows(cases.FINITE_ROWS, k, dtype)
    bad = cases.rows(cases.NONFINITE_ROWS, k, dtype)
    parameters = Parameters(norm, k, dtype)
    huge = squares_overflow(good)
    if norm == "layer_norm" and k == 1:
        huge &= False  # x - mean is 0 there
    check(backend, parameters, backend.put(good[~huge]), what="finite")
    check(backend, parameters, backend.put(torch.cat([good[~huge], bad, good[~huge]])), what="all")
    for name, row in zip(cases.NONFINITE_ROWS, bad, strict=True):
        check(backend, parameters, backend.put(torch.stack([good[2], row])), what=name)
    if backend.compiled and bool(huge.any()):
        x_q, x_scale = parameters.run(backend, backend.put(good[huge]))
        assert bool(x_scale.isnan().all()) and not x_q.any(), "an overflow must give a scale of NaN"


@pytest.mark.parametrize("norm", NORMS)
def test_any_layout(backend: Backend, norm: str) -> None:
    dtype = torch.float16
    base, other = (backend.put(cases.activations(24, 96, dtype, seed)) for seed in (0, 1))
    layouts = {
        "narrowed, aligned": (base[:, 8:32], other[:, 64:88]),
        "narrowed": (base[:, 3:20], other[:, 8:25]),
        "transposed": (base.t(), other.t()),
        "one transposed": (base[:, :24], other[:, :24].t()),
        "every second row": (base[::2], other[1::2]),
        "expanded residual": (base, other[:1].expand(24, 96)),
    }
    for name, (x, residual) in layouts.items():
        check(backend, Parameters(norm, x.shape[-1], dtype), x, residual, name)


@pytest.mark.parametrize("norm", NORMS)
def test_a_token_does_not_depend_on_its_neighbors(backend: Backend, norm: str) -> None:
    for k in (128, 1024, 4096, 8192):
        x = cases.activations(40, k, torch.bfloat16)
        parameters = Parameters(norm, k, torch.bfloat16)
        together = parameters.run(backend, backend.put(x))
        for row in (0, 7, 39):
            alone = parameters.run(backend, backend.put(x[row : row + 1]))
            compare.assert_bitwise_equal(alone[0][0], together[0][row])
            compare.assert_bitwise_equal(alone[1][0], together[1][row])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight": torch.ones(7)}, r"rms_norm_quantize: weight must have shape \[8\], got \(7,\)."),
        ({"weight": torch.ones(8).int()}, "weight must be float16 or bfloat16 or float32, got int32."),
        ({"residual": torch.ones(2, 8).half()}, "residual must be float32, got float16."),
        ({"residual": torch.ones(1, 8)}, r"residual must have x's shape \(2, 8\), got \(1, 8\)."),
        ({"granularity": ""}, "rms_norm_quantize: granularity must be"),
    ],
)  # fmt: skip
def test_refusals(backend: Backend, change: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"weight": torch.ones(8), **change}
    on_device = backend.move(given)
    x = torch.ones(2, 8, device=backend.device)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=sentence):
        torch.ops.smoothquant_kernels.rms_norm_quantize(
            x, on_device.pop("weight"), EPS, **on_device
        )
