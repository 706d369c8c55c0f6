"""The activation producers stay within the derived bound of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import cases, tolerance
from tests.support.backends import Backend

PLAIN = tuple(reference.ACTIVATIONS)
FUSED = tuple(reference.FUSED_KINDS)


def check(
    backend: Backend,
    x: Tensor,
    kind: str,
    gate: Tensor | None = None,
    what: str = "",
    k_multiple: int = 1,
    most: float = 1 / 200,
) -> None:
    """x and gate are on the backend's device, in any layout. At most `most` of the int8 values may differ at all."""
    k = x.shape[-1] // (2 if kind in FUSED else 1)
    differ, elements = 0, 0
    for inv_smooth in (None, cases.inverse_smooth(k)):
        for scheme in cases.SCHEMES:
            options: dict[str, Any] = cases.quantize_options(scheme)
            on_device = backend.options(scheme, inv_smooth)
            found = ops.act_quantize(x, kind, gate=gate, k_multiple=k_multiple, **on_device)
            assert found[0].is_contiguous() and not found[0][..., k:].any()
            rows = x.cpu().reshape(-1, x.shape[-1])
            gate_rows = None if gate is None else gate.cpu().reshape(-1, k)
            differ += tolerance.assert_quantized(
                (found[0][..., :k], found[1]),
                tolerance.activation(rows, kind, gate_rows, inv_smooth),
                options.get("scale"),
                options.get("granularity", "token"),
                f"{what} {kind} {scheme}",
            )
            elements += rows.shape[0] * k
    limit = 0 if kind == "relu" else max(2, elements * most)
    assert differ <= limit, f"{what} {kind}: {differ} of {elements} differ"


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("kind", [*PLAIN, *FUSED])
def test_smoke_activations(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    for m, k in ((3, 144), (2, 2000), (1, 62)):
        x, gate = (backend.put(cases.activations(m, k, dtype, seed)) for seed in (0, 1))
        check(backend, x, kind, None if kind in FUSED else gate, f"{m} x {k}", 16)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize("k", [1, 8, 31, 256, 1024, 4096, 4100])
def test_shapes(backend: Backend, kind: str, m: int, k: int, dtype: torch.dtype) -> None:
    x, gate = (backend.put(cases.activations(m, k, dtype, seed)) for seed in (0, 1))
    check(backend, x, kind)
    check(backend, x, kind, gate)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("shape", [(0, 16), (1, 2), (17, 62), (67, 128), (3, 2048), (2, 9000)])
def test_fused_gates(
    backend: Backend, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check(backend, backend.put(cases.activations(*shape, dtype)), kind)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["gelu", "silu"])
@pytest.mark.parametrize(
    "shape", [(1, 8200), (1, 28672), (17, 8200), (3, 16392), (2, 65536), (3, 70001)]
)
def test_long_rows(
    compiled: Backend, kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, gate = (compiled.put(cases.activations(*shape, dtype, seed)) for seed in (0, 1))
    check(compiled, x, kind, gate, k_multiple=16)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("kind", [*PLAIN, *FUSED])
@pytest.mark.parametrize("k", [2, 62, 64, 2048])
def test_edge_rows(backend: Backend, kind: str, k: int, dtype: torch.dtype) -> None:
    good = cases.rows(cases.FINITE_ROWS, k, dtype)
    bad = cases.rows(cases.NONFINITE_ROWS, k, dtype)
    check(backend, backend.put(good), kind, what="finite")
    check(backend, backend.put(torch.cat([good, bad, good])), kind, what="all")
    if k not in (62, 64):
        return  # these two cover every path and vector with a single row
    for name, row in zip(cases.NONFINITE_ROWS, bad, strict=True):
        check(backend, backend.put(torch.stack([good[2], row])), kind, what=name)
        if kind not in FUSED:
            both = backend.put(torch.stack([good[2], row]))
            ones = torch.ones_like(both)
            check(backend, ones, kind, both, what=f"gate {name}")
            check(backend, both, kind, ones, what=f"up {name}")


@pytest.mark.parametrize("kind", PLAIN)
def test_every_float16_value(backend: Backend, kind: str) -> None:
    """One value per row and scale, so that its own bound applies to each value, not that of a larger one."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()]
    check(backend, backend.put(finite[::43].reshape(-1, 1)), kind)
    pad = finite.new_zeros(-len(finite) % 64)
    check(backend, backend.put(torch.cat([finite, pad]).view(-1, 64)), kind)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_the_negative_tail(backend: Backend, kind: str) -> None:
    """Here 1 + erf and exp(-x) keep few bits or none. The second call has rows with no other values."""
    x = -torch.logspace(-3, 2.5, 1024)
    check(backend, backend.put(x.view(1, -1)), kind)
    check(backend, backend.put(x.view(-1, 8)), kind, most=1 / 50)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_any_layout(backend: Backend, dtype: torch.dtype) -> None:
    base, other = (backend.put(cases.activations(24, 96, dtype, seed)) for seed in (0, 1))
    layouts = {
        "narrowed, aligned": (base[:, 8:32], other[:, 64:88]),
        "halves of one": (base[:, 48:], base[:, :48]),
        "narrowed": (base[:, 3:20], other[:, 8:25]),
        "transposed": (base.t(), other.t()),
        "one transposed": (base[:, :24], other[:, :24].t()),
        "every second row": (base[::2], other[1::2]),
        "expanded gate": (base, other[:1].expand(24, 96)),
        "deep": (base.view(2, 12, 96), other.view(2, 12, 96)),
    }
    for name, (x, gate) in layouts.items():
        check(backend, x, "silu", gate, name)
    check(backend, base[:, :50], "gelu_mul", what="fused, odd half")
    check(backend, base[:, 16:48], "silu_mul", what="fused, narrowed")
    check(backend, base[1::2].t()[:94], "gelu_tanh_mul", what="fused, transposed")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "swish"}, f"act_quantize: kind must be one of {', '.join([*PLAIN, *FUSED])}"),
        ({"gate": torch.ones(1, 6)}, r"gate must have x's shape \(4, 6\), got \(1, 6\)."),
        ({"gate": torch.ones(4, 6).half()}, "gate must be float32, got float16."),
        ({"kind": "silu_mul", "gate": torch.ones(4, 6)}, "reads gate and up from one x"),
        ({"kind": "gelu_mul", "inv_smooth": torch.ones(6)}, r"inv_smooth must have shape \[3\]"),
        ({"kind": "gelu_mul", "x": torch.ones(4, 5)}, r"needs x \[..., 2K\], got an odd size: \(4, 5\)."),
    ],
)  # fmt: skip
def test_refusals(backend: Backend, arguments: dict[str, Any], sentence: str) -> None:
    given: dict[str, Any] = {"x": torch.ones(4, 6), "kind": "silu", **arguments}
    on_device = backend.move(given)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=sentence):
        torch.ops.smoothquant_kernels.act_quantize(
            on_device.pop("x"), on_device.pop("kind"), **on_device
        )
