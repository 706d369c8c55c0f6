"""`fused_linear_s8` equals its producer followed by the reference's GEMM bit for bit, for every kind and any layout.

The producers themselves are compared with the reference in test_norms.py and test_activations.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from smoothquant_kernels.ops import checks
from tests.support import cases
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal, count_result

#: Every kind, gated where it can be, and a layer_norm without parameters.
PRODUCERS = (
    *checks.NORMS, "layer_norm bare", *checks.KINDS, *(f"{kind} gated" for kind in reference.ACTIVATIONS),
)  # fmt: skip
#: One of each code path: norm, activation, two tensors, two halves of one tensor.
FEW = ("rms_norm", "layer_norm", "gelu_tanh", "silu gated", "silu_mul")


def width(producer: str, k: int) -> int:
    """The columns of x."""
    return 2 * k if producer in reference.FUSED_KINDS else k


def arguments(backend: Backend, producer: str, k: int, gate: Tensor) -> dict[str, Any]:
    """What a producer takes besides x: `gate` is for those that are gated."""
    kind, _, variant = producer.partition(" ")
    if kind in checks.NORMS:
        given: dict[str, Any] = {"eps": 1e-3}
        if variant != "bare":
            given["norm_weight"] = backend.put(cases.inverse_smooth(k, 4).to(gate.dtype))
        if producer == "layer_norm":
            given["norm_bias"] = backend.put(cases.inverse_smooth(k, 5))
        return given
    return {"gate": gate} if variant else {}


def produced(x: Tensor, kind: str, given: dict[str, Any], options: dict[str, Any]) -> Any:
    """(x_q, x_scale, ...) of the producer's own op."""
    norm = [given.get(name) for name in ("norm_weight", "norm_bias", "eps")]
    if kind == "rms_norm":
        return ops.rms_norm_quantize(x, norm[0], norm[2], **options)
    if kind == "layer_norm":
        return ops.layer_norm_quantize(x, *norm, **options)
    return ops.act_quantize(x, kind, gate=given.get("gate"), **options)


def check(
    backend: Backend,
    producer: str,
    x: Tensor,
    gate: Tensor,
    n: int,
    scheme: str,
    *,
    smooth: bool = False,
    rotation: int = 0,
    bias: bool = False,
    residual: Tensor | None = None,
    per_channel: bool = True,
    what: str = "",
) -> Tensor:
    """x, gate and residual are on the backend's device, in any layout. Returns y on the CPU."""
    kind = producer.split()[0]
    k = gate.shape[-1]
    given = arguments(backend, producer, k, gate)
    options = backend.options(scheme, cases.inverse_smooth(k) if smooth else None)
    options["rotation"] = rotation
    gemm = cases.gemm_operands(1, n, k, per_channel=per_channel)
    added = gemm.bias if bias else None
    # The producer gets copies, because it would read a view in the same way, right or wrong. But on a GPU the order in
    # which a norm adds up a row depends on the alignment of x.
    whole = x if backend.compiled and kind in checks.NORMS else backend.put(x)
    dense = {**given, "gate": backend.put(gate)} if "gate" in given else given
    x_q, x_scale = (t.cpu() for t in produced(whole, kind, dense, options)[:2])
    expected = reference.gemm_s8(
        x_q, gemm.w_q, x_scale, gemm.w_scale, bias=added,
        residual=None if residual is None else residual.cpu(), out_dtype=x.dtype,
    )  # fmt: skip
    found = ops.fused_linear_s8(
        x, kind, backend.put(gemm.w_q), backend.put(gemm.w_scale),
        bias=None if added is None else backend.put(added), residual=residual, **given, **options,
    )  # fmt: skip
    assert found.is_contiguous()
    assert_bitwise_equal(found, expected, f"{what} {producer} {scheme}")
    count_result()
    return expected


def check_all(backend: Backend, producer: str, x: Tensor, gate: Tensor, n: int, what: str) -> None:
    """Every scheme, with and without what is optional."""
    k = gate.shape[-1]
    rotation = 2 if k % 2 == 0 else 0
    residual = backend.put(torch.randn(*x.shape[:-1], n, generator=cases.generator(6)))
    for i, scheme in enumerate(cases.SCHEMES):
        options: list[dict[str, Any]] = [
            {"bias": i == 1, "residual": residual if i == 2 else None},
            {
                "smooth": True,
                "rotation": rotation,
                "bias": i != 1,
                "residual": residual.to(x.dtype),
            },
        ]
        for some in options:
            check(backend, producer, x, gate, n, scheme, per_channel=i > 0, what=what, **some)


def inputs(backend: Backend, producer: str, m: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    """x and a gate."""
    return [
        backend.put(cases.activations(m, columns, dtype, seed))
        for seed, columns in enumerate((width(producer, k), k))
    ]


@pytest.mark.parametrize("producer", PRODUCERS)
def test_smoke_every_kind(backend: Backend, producer: str) -> None:
    for m, n, k in ((3, 35, 138), (20, 33, 64)):
        x, gate = inputs(backend, producer, m, k, torch.float16)
        check_all(backend, producer, x, gate, n, f"{m} {n} {k}")


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("producer", FEW)
@pytest.mark.parametrize("m", [0, 1, 17, 65])
def test_numbers_of_tokens_and_channels(
    backend: Backend, m: int, producer: str, dtype: torch.dtype
) -> None:
    for n, k in ((1, 1), (17, 31), (130, 256), (5, 1000))[: 4 if m < 65 else 3]:
        x, gate = inputs(backend, producer, m, k, dtype)
        check_all(backend, producer, x, gate, n, f"{m} {n} {k}")


@pytest.mark.parametrize("producer", PRODUCERS)
@pytest.mark.parametrize("rotation", [16, 256])
def test_rotation(backend: Backend, producer: str, rotation: int) -> None:
    x, gate = inputs(backend, producer, 5, 512, torch.bfloat16)
    for scheme in cases.SCHEMES:
        check(backend, producer, x, gate, 19, scheme, smooth=True, rotation=rotation, bias=True)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_edge_rows(backend: Backend, producer: str, dtype: torch.dtype) -> None:
    """Zeros, subnormal and nonfinite values in x and in the gate."""
    k = 62
    good, bad = cases.rows(cases.FINITE_ROWS, k, dtype), cases.rows(cases.NONFINITE_ROWS, k, dtype)
    gate = torch.cat([good, bad, bad, good[:3]])
    x = torch.cat([good, good[: len(bad)], bad, bad[:3]])
    wide = torch.cat([gate, x], -1) if producer in reference.FUSED_KINDS else x
    for rows in (slice(None), slice(-9, None)):
        put = backend.put(wide[rows]), backend.put(gate[rows])
        for scheme in cases.SCHEMES:
            y = check(backend, producer, *put, 21, scheme, bias=True, what=str(rows))
            if scheme == "token" and producer in checks.NORMS and dtype != torch.float16:
                # On a GPU the squares of a row of huge values are infinite in float32.
                largest = wide[rows].float().abs().amax(-1)
                assert bool((~y.isfinite()).any(-1)[~largest.isfinite()].all())
                assert not y[largest < 1e15].isnan().any()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("producer", FEW)
def test_any_layout(backend: Backend, producer: str, dtype: torch.dtype) -> None:
    """x, the gate and the residual are views with strides of their own."""
    k, n = 48, 19
    wide = width(producer, k)
    base, other = (backend.put(cases.activations(24, 3 * k, dtype, seed)) for seed in (0, 1))
    more = backend.put(torch.randn(24, 2 * n + 1, generator=cases.generator(2)))
    odd = backend.put(cases.activations(24, wide + 1, dtype, 3))
    views: dict[str, tuple[Tensor, Tensor, Tensor]] = {
        "slices": (base[:, :wide], other[:, k : 2 * k], more[:, :n]),
        "unaligned slices": (base[:, 5 : 5 + wide], other[:, 3 : 3 + k], more[:, n + 1 :]),
        "another stride": (odd[:, 1:], other[:, 2 * k :], more[:, ::2][:, :n]),
        "every second row": (base[1:13:2, :wide], other[:6, :k], more[::4, :n]),
        "repeated": (base[:1, :wide].expand(7, wide), other[:7, :k], more[2:3, :n].expand(7, n)),
        "one of three": (base[:, :wide], base[:, k : 2 * k], more[:, :n].t().contiguous().t()),
        "transposed": (
            base[:wide, :9].t() if wide <= 24 else base.t().contiguous().t()[:9, :wide],
            other[:9, :k].t().contiguous().t(), more[:9, :n],
        ),
    }  # fmt: skip
    for name, (x, gate, residual) in views.items():
        for scheme in cases.SCHEMES:
            check(backend, producer, x, gate, n, scheme, smooth=True, residual=residual, what=name)
    split = [t.unflatten(0, (2, 3, 4)) for t in (base[:, :wide], other[:, k : 2 * k], more[:, :n])]
    check(backend, producer, split[0], split[1], n, "token", residual=split[2], what="deep")
    swapped = [t.transpose(0, 1) for t in split]
    check(
        backend, producer, swapped[0], swapped[1], n, "token", residual=swapped[2], what="swapped"
    )
    vector = [t[4] for t in (base[:, :wide], other[:, k : 2 * k], more[:, :n])]
    check(backend, producer, vector[0], vector[1], n, "token", residual=vector[2], what="vector")


COPIES = {"aten::contiguous", "aten::clone", "aten::copy_", "aten::to", "aten::_to_copy"}


@pytest.mark.parametrize("producer", FEW)
def test_slices_are_read_in_place(backend: Backend, producer: str) -> None:
    if backend.library is None:
        pytest.skip("the kernels in Python make copies")
    m, n, k = 17, 24, 64
    wide = width(producer, k)
    merged, other = (
        backend.put(cases.activations(m, 3 * k, torch.float16, s)).unflatten(0, (1, m))
        for s in (0, 1)
    )
    more = backend.put(torch.randn(1, m, 2 * n, generator=cases.generator(2))).half()
    gemm = cases.gemm_operands(1, n, k)
    w_q, w_scale = backend.put(gemm.w_q), backend.put(gemm.w_scale)
    given = arguments(backend, producer, k, other[..., k : 2 * k])

    def copies(x: Tensor) -> set[str]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            ops.fused_linear_s8(
                x, producer.split()[0], w_q, w_scale, residual=more[..., n:], **given
            )
        names = {event.name for event in seen.events() or ()}
        assert "smoothquant_kernels::fused_linear_s8" in names
        return names & COPIES

    assert not copies(merged[..., 8 : 8 + wide])
    assert copies(merged[..., :wide].transpose(1, 2).contiguous().transpose(1, 2))
