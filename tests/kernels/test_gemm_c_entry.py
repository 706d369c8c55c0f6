"""The C entries of the GEMM: strides, operands that end with their memory, workspaces, statuses and whole layers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.support import c_gemm, c_interface, cases
from tests.support.backends import Backend
from tests.support.c_interface import (
    INVALID_ARGUMENT,
    SUCCESS,
    UNSUPPORTED_SHAPE,
    WORKSPACE_TOO_SMALL,
)
from tests.support.cases import Gemm
from tests.support.compare import assert_bitwise_equal, count_result

TYPES = (*cases.FLOATS, torch.int8)
POISON = 77


def with_garbage(backend: Backend, t: Tensor, extra: int) -> Tensor:
    """A copy of [rows, k] int8 with garbage between its aligned rows. Its memory ends with the last row's last byte."""
    rows, k = t.shape
    stride = (-(-k // c_gemm.ALIGNMENT) + extra) * c_gemm.ALIGNMENT
    view = backend.put(torch.full(((rows - 1) * stride + k,), POISON, dtype=torch.int8))
    view = view.as_strided((rows, k), (stride, 1))
    view.copy_(t)
    return view


class Output:
    """y inside a wider, poisoned buffer, aligned to 16 bytes or not."""

    def __init__(self, backend: Backend, m: int, n: int, dtype: torch.dtype, aligned: bool) -> None:
        across = -(-(n + 3) // 16) * 16 + (0 if aligned else 1)
        before = 16 if aligned else 1
        buffer = torch.full((before + m * across,), POISON, dtype=dtype)
        self.buffer = backend.put(buffer)
        self.y = self.buffer[before:].view(m, across)[:, :n]

    def check(self, expected: Tensor, what: str) -> None:
        """Checks the result, and that nothing else in the buffer was overwritten."""
        assert_bitwise_equal(self.y, expected, what)
        count_result()
        self.y.fill_(POISON)
        self.check_untouched()

    def check_untouched(self) -> None:
        assert bool((self.buffer == POISON).all()), "wrote outside y"


class Problem:
    """Operands on the backend's device, and the expected result."""

    def __init__(
        self, backend: Backend, case: dict[str, Any], dtype: torch.dtype, seed: int = 0
    ) -> None:
        m, n = case["m"], case["n"]
        g = cases.gemm_operands(m, n, case["k"], seed=seed)
        g = g._replace(
            x_scale=g.x_scale[: None if case.get("per_token", True) else 1],
            w_scale=g.w_scale[: None if case.get("per_channel", True) else 1],
        )
        aligned: bool = case.get("aligned", True)
        added: dict[str, Any] = {"bias": g.bias if case.get("added", True) else None}
        if dtype == torch.int8:
            out_scale, relu = torch.tensor([0.02]), case.get("relu", False)
            self.expected = reference.gemm_s8_requant(*g[:4], out_scale, added["bias"], relu)
            added |= {"out_scale": backend.put(out_scale), "relu": relu}
        else:
            residual = g.residual.to(dtype) if case.get("added", True) else None
            self.expected = reference.gemm_s8(*g[:4], added["bias"], residual, dtype)
            if residual is not None:
                added["residual"] = Output(backend, m, n, dtype, aligned).y
                added["residual"].copy_(residual)
        if added["bias"] is not None:
            added["bias"] = backend.put(added["bias"])
        self.backend, self.added = backend, added
        extra = case.get("extra", 0)
        self.gemm = Gemm(
            with_garbage(backend, g.x_q, extra), with_garbage(backend, g.w_q, 2 * extra), *map(backend.put, g[2:])
        )  # fmt: skip
        self.output = Output(backend, m, n, dtype, aligned)

    def params(self, tile: int = -1, splits: int = 0) -> c_gemm.Params:
        return c_gemm.params_of(
            *self.gemm[:4], self.output.y, **self.added, tile=tile, splits=splits
        )


@contextmanager
def workspace_of(
    backend: Backend, params: c_gemm.Params, size: int, fill: int | None = 0x7F
) -> Iterator[None]:
    """A workspace of exactly this size, full of garbage. If `fill` is None, the simulator tracks its initialization."""
    memory: Any = None
    if fill is None and backend.name == "simulator":
        runtime, memory = ctypes.CDLL("libcudart.so.13"), ctypes.c_void_p()
        assert runtime.cudaMalloc(byref(memory), ctypes.c_size_t(size)) == 0
        params.workspace = memory.value
    else:
        buffer = backend.put(torch.full((size,), fill or 0, dtype=torch.int8))
        params.workspace = buffer.data_ptr()
    params.workspace_bytes = size
    yield
    if memory is not None:
        assert runtime.cudaFree(memory) == 0


def run(library: ctypes.CDLL, backend: Backend, params: c_gemm.Params, **memory: Any) -> int:
    """Runs the kernel with a workspace of exactly the required size, which is not cleared. Returns the status."""
    status, plan = c_gemm.plan(library, params)
    if status != SUCCESS:
        return status
    with workspace_of(backend, params, max(plan.workspace_bytes, 1), **memory):
        status = library.sqk_gemm_s8(byref(params), None)
        if backend.device == "cuda":
            torch.cuda.synchronize()
    return status


# --- every tile -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_tile(
    compiled: Backend, library: ctypes.CDLL, tile: dict[str, Any], dtype: torch.dtype
) -> None:
    int8 = dtype == torch.int8
    most = tile["most_splits"]
    for case in cases.covering(
        12 if int8 else 6,
        TYPES.index(dtype) + 4 * tile["tile"],
        relu=(True, False),
        added=(True, False) if int8 else (True,),
        aligned=(False, True),
        extra=(0, 1, 3),
        per_token=(True, False) if int8 else (True,),
        per_channel=(True, False) if int8 else (True,),
        splits=sorted({0, 1, most}),
        **cases.gemm_sizes(tile),
    ):
        problem = Problem(compiled, case, dtype)
        params = problem.params(tile["tile"], case["splits"])
        assert run(library, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{tile['name']} {case}")


@pytest.mark.parametrize("fill", [0x7F, None], ids=str)
def test_the_workspace_need_not_be_cleared(
    compiled: Backend, library: ctypes.CDLL, tile: dict[str, Any], fill: int | None
) -> None:
    """The next launch finds what the last one left in the workspace."""
    shares = tile["most_splits"] > 1 or tile["schedule"] == "stream-K"
    # CUTLASS splits tiles if they fill less than half of the GPU and each block gets at least eight tiles of k.
    case = {"m": min(tile["m"], 30), "n": tile["n"] - 3, "k": 20 * tile["k"] + 1}
    if tile["kernel"] == "stream":
        case["m"] = 3
    problem = Problem(compiled, case, torch.float16)
    params = problem.params(tile["tile"], tile["most_splits"])
    status, plan = c_gemm.plan(library, params)
    assert status == SUCCESS and (plan.workspace_bytes > 0) == shares
    if plan.workspace_bytes == 0:
        params.workspace, params.workspace_bytes = None, 0
        assert library.sqk_gemm_s8(byref(params), None) == SUCCESS
        problem.output.check(problem.expected, tile["name"])
        return
    with workspace_of(compiled, params, plan.workspace_bytes, fill):
        for _ in range(2):
            assert library.sqk_gemm_s8(byref(params), None) == SUCCESS
            problem.output.check(problem.expected, f"{tile['name']} {fill}")
        params.workspace_bytes -= 1
        assert library.sqk_gemm_s8(byref(params), None) == WORKSPACE_TOO_SMALL
        params.workspace = None
        assert library.sqk_gemm_s8(byref(params), None) == INVALID_ARGUMENT
    problem.output.check_untouched()


def test_one_row_may_have_any_stride(
    compiled: Backend, library: ctypes.CDLL, tile: dict[str, Any]
) -> None:
    for m, n in ((1, 1), (1, 20), (5, 1)):
        problem = Problem(compiled, {"m": m, "n": n, "k": 100}, torch.float32)
        params = problem.params(tile["tile"])
        if m == 1:
            params.x_q_stride, params.y_stride, params.residual_stride = 1, 0, -7
        if n == 1:
            params.w_q_stride = 3
        assert run(library, compiled, params) == SUCCESS
        problem.output.check(problem.expected, f"{tile['name']} {m} {n}")


# --- statuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"k": 131072}, INVALID_ARGUMENT),
        ({"x_q": 8}, INVALID_ARGUMENT),
        ({"w_q": 1}, INVALID_ARGUMENT),
        ({"x_q_stride": 65}, INVALID_ARGUMENT),
        ({"w_q_stride": 56}, INVALID_ARGUMENT),
        ({"tile": 99}, INVALID_ARGUMENT),
        ({"relu": 1}, INVALID_ARGUMENT),
        ({"tile": 0, "splits": 99}, UNSUPPORTED_SHAPE),
        ({"tile": 0, "m": 9}, UNSUPPORTED_SHAPE),
    ],
    ids=str,
)
def test_statuses(
    compiled: Backend, library: ctypes.CDLL, change: dict[str, int], status: int
) -> None:
    """A refused call must not launch. test_gemm_plan.py tests the refusals of plans."""
    problem = Problem(compiled, {"m": 4, "n": 20, "k": 64}, torch.float16)
    params = problem.params()
    for name, value in change.items():
        # Makes an address misaligned instead of replacing it.
        old = getattr(params, name)
        setattr(params, name, old + value if name in ("x_q", "w_q") else value)
    assert library.sqk_gemm_s8(byref(params), None) == status
    problem.output.check_untouched()


def test_no_tokens(compiled: Backend, library: ctypes.CDLL) -> None:
    params = c_gemm.Params(n=8, k=8, w_q_stride=16, y_dtype=1, tile=-1)
    assert library.sqk_gemm_s8(byref(params), None) == SUCCESS


# --- whole layers -----------------------------------------------------------------------------------


class Layer:
    """The operands of a linear layer, and poisoned buffers for the quantizer's results."""

    def __init__(self, backend: Backend, m: int, n: int, k: int, dtype: torch.dtype) -> None:
        put = backend.put
        g = cases.gemm_operands(m, n, k)
        self.x, self.other = (put(cases.activations(m, k, dtype, seed)) for seed in (0, 1))
        self.inv_smooth, self.scale = put(cases.inverse_smooth(k)), put(torch.tensor([0.013]))
        self.w_q = with_garbage(backend, g.w_q, 1)
        self.w_scale, self.bias = put(g.w_scale), put(g.bias)
        self.backend, self.k = backend, k
        self.output = Output(backend, m, n, dtype, aligned=True)
        padded = -(-k // c_gemm.ALIGNMENT) * c_gemm.ALIGNMENT
        self.x_q = put(torch.full((m, padded), POISON, dtype=torch.int8))
        self.x_scale = put(torch.full((m,), float(POISON)))

    def params(self, scheme: str, tile: int, **quantizer: Any) -> c_gemm.LinearParams:
        scale = self.scale if scheme == "static" else None
        given = {"scheme": scheme, "scale": scale, "inv_smooth": self.inv_smooth, "k": self.k}
        quantize = c_interface.params_of(self.x, self.x_q, self.x_scale, **given, **quantizer)
        gemm = c_gemm.params_of(
            None, self.w_q, None, self.w_scale, self.output.y, bias=self.bias, tile=tile
        )
        return c_gemm.LinearParams(quantize, gemm)

    def run(self, library: ctypes.CDLL, params: c_gemm.LinearParams) -> c_gemm.LinearPlan:
        status, plan = c_gemm.linear_plan(library, params)
        assert status == SUCCESS
        size = plan.workspace_bytes
        first = 0 if plan.fused else plan.quantize.workspace_bytes
        assert size == max(plan.gemm.workspace_bytes, first), "the two launches share one workspace"
        with workspace_of(self.backend, params.gemm, max(size, 1)):
            if size > 0:
                params.gemm.workspace_bytes = size - 1
                assert library.sqk_linear_s8(byref(params), None) == WORKSPACE_TOO_SMALL
                params.gemm.workspace_bytes = size
            assert library.sqk_linear_s8(byref(params), None) == SUCCESS
            if self.backend.device == "cuda":
                torch.cuda.synchronize()
        return plan

    def expected(self, scheme: str) -> Tensor:
        options: dict[str, Any] = cases.quantize_options(scheme)
        x_q, x_scale = reference.quantize(self.x.cpu(), self.inv_smooth.cpu(), **options)
        return reference.gemm_s8(
            x_q,
            self.w_q.cpu(),
            x_scale,
            self.w_scale.cpu(),
            self.bias.cpu(),
            out_dtype=self.x.dtype,
        )


@pytest.mark.parametrize("scheme", cases.SCHEMES)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_a_layer_is_fused_or_not(
    compiled: Backend, library: ctypes.CDLL, dtype: torch.dtype, scheme: str
) -> None:
    tiles = c_gemm.tiles(library)
    streams = [tile["tile"] for tile in tiles if tile["kernel"] == "stream"]
    for m, k in ((1, 257), (4, 64), (8, 1000), (9, 96), (16, 2049), (40, 100)):
        layer = Layer(compiled, m, 37, k, dtype)
        expected = layer.expected(scheme)
        for tile in (-1, *streams, len(tiles) - 1, len(streams)):
            if tile in streams and m > tiles[tile]["m"]:
                continue
            params = layer.params(scheme, tile)
            params.gemm.w_constant = m % 2
            plan = layer.run(library, params)
            # A separate quantizer comes between the GEMM and what wrote the weights.
            assert plan.gemm.weights_first == (plan.gemm.overlap and (m % 2 or not plan.fused))
            assert plan.fused == (tiles[plan.gemm.tile]["kernel"] == "stream")
            what = f"{m} {k} {tile}"
            layer.output.check(expected, what)
            if plan.fused:
                assert bool((layer.x_q == POISON).all()), "a fused launch must not write x_q"
                params.quantize.x_q = params.quantize.x_scale = None
                assert layer.run(library, params).fused
                layer.output.check(expected, f"{what}, no x_q")
            else:
                quantized = reference.quantize(
                    layer.x.cpu(), layer.inv_smooth.cpu(), **cases.quantize_options(scheme)
                )  # fmt: skip
                assert_bitwise_equal(layer.x_q[:, :k], quantized[0], what)
                assert_bitwise_equal(layer.x_scale[: len(quantized[1])], quantized[1], what)
                layer.x_q.fill_(POISON)


@pytest.mark.parametrize("producer", ["rms_norm", "silu"])
def test_a_layer_after_a_norm_or_activation(
    compiled: Backend, library: ctypes.CDLL, producer: str
) -> None:
    """The quantizer is then a separate launch, and the GEMM reads its results."""
    for m in (3, 30):
        for scheme in cases.SCHEMES:
            layer = Layer(compiled, m, 37, 200, torch.bfloat16)
            norm = producer == "rms_norm"
            total = torch.zeros_like(layer.x)
            more = {"sum_out": total, "weight": layer.inv_smooth} if norm else {}
            params = layer.params(scheme, -1, producer=producer, other=layer.other, **more)
            assert not layer.run(library, params).fused
            x_scale = layer.x_scale[:1] if scheme == "tensor" else layer.x_scale
            found = [t.cpu() for t in (layer.x_q[:, :200], layer.w_q, x_scale, layer.w_scale)]
            expected = reference.gemm_s8(*found, layer.bias.cpu(), out_dtype=torch.bfloat16)
            layer.output.check(expected, f"{producer} {m} {scheme}")
            if norm:
                summed = reference.add_residual(layer.x.cpu(), layer.other.cpu())
                assert_bitwise_equal(total, summed)


def test_wrong_layers_are_refused(compiled: Backend, library: ctypes.CDLL) -> None:
    layer = Layer(compiled, 20, 37, 100, torch.float16)
    for part, name, value in (
        ("quantize", "scheme", 3),
        ("quantize", "x", None),
        ("quantize", "k_padded", 99),
        ("gemm", "k", 0),
        ("gemm", "tile", 99),
        ("gemm", "out_scale", 4096),
        # The quantizer and the GEMM must agree on the shape, and the GEMM must read the quantizer's output.
        ("quantize", "m", 4),
        ("quantize", "k", 84),
        ("quantize", "x_q_stride", 113),
        ("quantize", "x_q", layer.x_q.data_ptr() + 1),
    ):
        params = layer.params("token", -1)
        setattr(getattr(params, part), name, value)
        assert c_gemm.linear_plan(library, params)[0] == INVALID_ARGUMENT, (part, name)
        assert library.sqk_linear_s8(byref(params), None) == INVALID_ARGUMENT, (part, name)
    layer.output.check_untouched()
