"""The quantizers' C entry with raw pointers: every path is forced, outputs lie in wider buffers, and statuses."""

from __future__ import annotations

import ctypes
import os
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.support import c_interface, cases, tolerance
from tests.support.backends import Backend
from tests.support.compare import assert_bitwise_equal, count_result

#: Small and large shapes that a path can take: (path, M, K).
FORCED = (
    ("warp", 9, 8), ("warp", 5, 1024), ("warp", 700, 136),
    ("block", 3, 8), ("block", 2, 264), ("block", 5, 8192), ("block", 300, 512),
    ("wide", 2, 64), ("wide", 3, 8200), ("wide", 2, 16384), ("wide", 200, 1096),
    ("long", 2, 64), ("long", 2, 24584), ("long", 3, 33000), ("long", 1, 66000), ("long", 1, 131072),
    ("element", 7, 1), ("element", 5, 33), ("element", 3, 4099), ("element", 2, 8200),
    ("element", 2, 24587), ("element", 1, 100003),
    ("cluster", 2, 8), ("cluster", 3, 2056), ("cluster", 2, 8192), ("cluster", 40, 4104), ("cluster", 1, 65536),
)  # fmt: skip
POISON = 99


def has_clusters() -> bool:
    """Whether the simulated or real GPU runs the cluster kernels."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() == (9, 0)
    return os.environ.get("PTXSIM_ARCH") == "sm_90"


class Buffers:
    """The parameters of a producer, and outputs inside wider, poisoned buffers."""

    def __init__(self, backend: Backend, m: int, k: int, dtype: torch.dtype, pad: int) -> None:
        put = backend.put
        self.x = put(cases.activations(m, k, dtype))
        self.other = put(cases.activations(m, k, dtype, 1))
        self.weight = put(cases.inverse_smooth(k, 3).to(dtype))
        self.bias = put(cases.inverse_smooth(k, 4))
        self.inv_smooth = put(cases.inverse_smooth(k))
        self.wide_q = put(torch.full((m, k + pad + 16), POISON, dtype=torch.int8))
        self.x_q = self.wide_q[:, : k + pad]
        self.sum = put(torch.full((m, k), 7.0, dtype=dtype))
        self.x_scale = put(torch.full((m + 1,), -5.0))
        self.k = k

    def check_surroundings(self, scales: int) -> None:
        assert bool((self.wide_q[:, self.x_q.shape[1] :] == POISON).all()), "wrote past a row"
        assert not self.x_q[:, self.k :].any(), "the padding must be zero"
        assert bool((self.x_scale[scales:] == -5.0).all()), "wrote past the scales"


def call(library: ctypes.CDLL, backend: Backend, params: c_interface.Params) -> int:
    """Runs the kernel with a workspace of exactly the required size, which is not cleared. Returns the status."""
    workspace = None
    size = library.sqk_quantize_workspace_bytes(byref(params))
    if size > 0:
        # A maximum that reads an entry before it is written gets a NaN.
        workspace = backend.put(torch.full((size // 4,), torch.nan))
        params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    status: int = library.sqk_quantize(byref(params), None)
    if backend.device == "cuda":
        torch.cuda.synchronize()
    return status


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("scheme", cases.SCHEMES)
@pytest.mark.parametrize("forced", FORCED, ids=str)
def test_every_path(
    compiled: Backend,
    library: ctypes.CDLL,
    forced: tuple[str, int, int],
    scheme: str,
    dtype: torch.dtype,
) -> None:
    path, m, k = forced
    if path == "cluster" and not has_clusters():
        pytest.skip("only sm_90 has clusters")
    if path in ("cluster", "block") and scheme == "tensor":
        pytest.skip("this path is not compiled for two launches")
    options: dict[str, Any] = cases.quantize_options(scheme)
    static = None if scheme != "static" else compiled.put(options["scale"])
    for producer in ("quantize", "rms_norm", "silu"):
        b = Buffers(compiled, m, k, dtype, pad=5 if path == "element" else 8)
        norm = producer == "rms_norm"
        extra: dict[str, Tensor] = {}
        if producer != "quantize":
            extra = {"other": b.other, **({"sum_out": b.sum, "weight": b.weight} if norm else {})}
        params = c_interface.params_of(
            b.x, b.x_q, b.x_scale, producer=producer, scheme=scheme, path=path, k=k,
            inv_smooth=b.inv_smooth, scale=static, **extra,
        )  # fmt: skip
        status, plan = c_interface.plan(library, params)
        assert status == 0 and c_interface.PATHS[plan.path] == path
        assert call(library, compiled, params) == 0
        scales = 1 if scheme == "tensor" else m
        b.check_surroundings(scales)
        found = b.x_q[:, :k], b.x_scale[:scales]
        inv_smooth = b.inv_smooth.cpu()
        if producer == "quantize":
            expected_q, expected_scale = reference.quantize(b.x.cpu(), inv_smooth, **options)
            assert_bitwise_equal(found[0], expected_q, path)
            assert_bitwise_equal(found[1], expected_scale, path)
            count_result()
            continue
        if norm:
            total = reference.add_residual(b.x.cpu(), b.other.cpu())
            assert_bitwise_equal(b.sum, total, path)
            expected = tolerance.rms_norm(total, b.weight.cpu(), 1e-5, inv_smooth)
        else:
            expected = tolerance.activation(b.x.cpu(), "silu", b.other.cpu(), inv_smooth)
        granularity = options.get("granularity", "token")
        tolerance.assert_quantized(found, expected, options.get("scale"), granularity, producer)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("k", [256, 4096, 70000, 101])
@pytest.mark.parametrize("into", ["x", "residual"])
def test_the_sum_may_overwrite_an_input(
    compiled: Backend, library: ctypes.CDLL, into: str, k: int, dtype: torch.dtype
) -> None:
    for scheme in ("token", "tensor"):
        b = Buffers(compiled, 3, k, dtype, pad=0)
        total = reference.add_residual(b.x.cpu(), b.other.cpu())
        params = c_interface.params_of(
            b.x, b.x_q, b.x_scale, producer="layer_norm", scheme=scheme, k=k, other=b.other,
            sum_out=b.x if into == "x" else b.other, weight=b.weight, bias=b.bias,
        )  # fmt: skip
        assert call(library, compiled, params) == 0
        assert_bitwise_equal(b.x if into == "x" else b.other, total)
        expected = tolerance.layer_norm(total, b.weight.cpu(), b.bias.cpu(), 1e-5, None)
        scales = b.x_scale[: 1 if scheme == "tensor" else 3]
        tolerance.assert_quantized((b.x_q, scales), expected, None, scheme, into)


@pytest.mark.parametrize("clear", [True, False])
def test_few_long_rows_are_split(compiled: Backend, library: ctypes.CDLL, clear: bool) -> None:
    """On GPUs without clusters several blocks share a long row. The second launch depends on the scheme."""
    m, k = 2, 36864
    b = Buffers(compiled, m, k, torch.float16, pad=8)
    if not clear:
        b.x[1, 20000] = torch.nan
    for scheme in cases.SCHEMES:
        options: dict[str, Any] = cases.quantize_options(scheme)
        static = compiled.put(options["scale"]) if scheme == "static" else None
        params = c_interface.params_of(
            b.x, b.x_q, b.x_scale, scheme=scheme, k=k, inv_smooth=b.inv_smooth, scale=static
        )
        status, plan = c_interface.plan(library, params)
        assert status == 0
        assert (plan.splits > 1) == (scheme == "tensor" or not has_clusters())
        assert call(library, compiled, params) == 0
        expected = reference.quantize(b.x.cpu(), b.inv_smooth.cpu(), **options)
        assert_bitwise_equal(b.x_q[:, :k], expected[0], scheme)
        assert_bitwise_equal(b.x_scale[: len(expected[1])], expected[1], scheme)
        count_result()


def refused(p: c_interface.Params, **changes: Any) -> c_interface.Params:
    for name, value in changes.items():
        setattr(p, name, value)
    return p


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"m": -1}, c_interface.INVALID_ARGUMENT),
        ({"k": 0}, c_interface.INVALID_ARGUMENT),
        ({"k_padded": 63}, c_interface.INVALID_ARGUMENT),
        ({"x_q_stride": 63}, c_interface.INVALID_ARGUMENT),
        ({"dtype": 3}, c_interface.INVALID_ARGUMENT),
        ({"producer": 7}, c_interface.INVALID_ARGUMENT),
        ({"scheme": 3}, c_interface.INVALID_ARGUMENT),
        ({"scheme": 2}, c_interface.INVALID_ARGUMENT),
        ({"path": 6}, c_interface.INVALID_ARGUMENT),
        ({"x": None}, c_interface.INVALID_ARGUMENT),
        ({"x_q": None}, c_interface.INVALID_ARGUMENT),
        ({"x_scale": None}, c_interface.INVALID_ARGUMENT),
        ({"k": 1 << 31, "k_padded": 1 << 31, "m": 1}, c_interface.UNSUPPORTED_SHAPE),
        ({"scheme": 1}, c_interface.INVALID_ARGUMENT),
    ],
)  # fmt: skip
def test_statuses(
    compiled: Backend, library: ctypes.CDLL, changes: dict[str, Any], status: int
) -> None:
    b = Buffers(compiled, 4, 64, torch.float16, pad=0)
    params = c_interface.params_of(b.x, b.x_q, b.x_scale)
    assert library.sqk_quantize(byref(refused(params, **changes)), None) == status
    assert bool((b.wide_q == POISON).all()), "a refused call must not write"


def test_a_workspace_that_is_too_small_is_refused(compiled: Backend, library: ctypes.CDLL) -> None:
    b = Buffers(compiled, 4, 64, torch.float16, pad=0)
    params = c_interface.params_of(b.x, b.x_q, b.x_scale, scheme="tensor")
    size = library.sqk_quantize_workspace_bytes(byref(params))
    assert size > 0
    workspace = compiled.put(torch.zeros(size // 4))
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size - 4
    assert library.sqk_quantize(byref(params), None) == c_interface.WORKSPACE_TOO_SMALL
    params.workspace_bytes = size
    assert library.sqk_quantize(byref(params), None) == 0


def test_no_rows(compiled: Backend, library: ctypes.CDLL) -> None:
    scale = compiled.put(torch.full((1,), -5.0))
    params = c_interface.Params(k=8, k_padded=8, eps=1e-5, path=c_interface.AUTO, dtype=1)
    assert library.sqk_quantize(byref(params), None) == 0
    params.scheme, params.x_scale = 1, scale.data_ptr()
    assert call(library, compiled, params) == 0
    assert scale.item() == 0.0, "an empty tensor has the scale 0"
