"""The GEMM for few tokens with weights of 4 bits equals the reference bit for bit, by the C entries.

Each test runs every streaming tile that holds its tokens, with x_q given or quantized in the kernel's blocks. The
operands end with their memory, and rows have garbage between them.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import reference
from tests.kernels.test_gemm_c_entry import POISON, Output, run, with_garbage
from tests.support import c_gemm, c_interface, cases
from tests.support.backends import Backend
from tests.support.c_interface import SUCCESS, UNSUPPORTED_SHAPE
from tests.support.cases import W4Gemm

#: Both tiles, and both sides of their edges.
TOKENS = (1, 2, 7, 8, 9, 15, 16)
#: One element; around a group, half a stage; around a stage; several stages, more than the warps have.
CHANNELS = (1, 127, 128, 129, 255, 256, 300, 1000, 2049)
#: Of the output: one, around a tile, and several tiles; of an odd number every second row of w_group is at an odd pair.
OUTPUTS = (1, 16, 17, 33, 24, 35, 130)


def tiles_for(library: ctypes.CDLL, m: int) -> list[int]:
    """The rows of the streaming tiles that take so many tokens and weights of 4 bits."""
    rows = c_gemm.tiles(library)
    found = [t["tile"] for t in rows if t["kernel"] == "stream" and t["w4"] and m <= t["m"]]
    assert found or m > 16
    return found


class Layer:
    """Operands of a linear layer on the backend's device."""

    def __init__(
        self,
        backend: Backend,
        m: int,
        n: int,
        k: int,
        dtype: torch.dtype = torch.float16,
        *,
        extra: int = 0,
        operands: W4Gemm | None = None,
        x: Tensor | None = None,
        bias: bool = True,
        residual: torch.dtype | None = None,
        per_token: bool = True,
        per_channel: bool = True,
        seed: int = 0,
    ) -> None:
        put = backend.put
        g = cases.w4_operands(m, n, k, seed=seed, per_token=per_token, per_channel=per_channel)
        self.host = g if operands is None else operands
        self.backend, self.m, self.n, self.k, self.dtype = backend, m, n, k, dtype
        g = self.host
        self.x_q = with_garbage(backend, g.x_q, extra) if m > 0 else put(g.x_q)
        self.w_q4 = with_garbage(backend, g.w_q4.view(torch.int8), 2 * extra)
        self.w_group, self.x_scale, self.w_scale = map(put, (g.w_group, g.x_scale, g.w_scale))
        self.bias = put(g.bias) if bias else None
        self.residual = put(g.residual.to(residual)) if residual is not None else None
        self.x = put(cases.activations(m, k, dtype, seed)) if x is None else x
        self.output = Output(backend, m, n, dtype, aligned=extra % 2 == 0)

    def gemm(self, tile: int, given: bool) -> c_gemm.Params:
        """`given`: with x_q, not for a layer."""
        x_q, x_scale = (self.x_q, self.x_scale) if given else (None, None)
        p = c_gemm.params_of(
            x_q, self.w_q4, x_scale, self.w_scale, self.output.y,
            bias=self.bias, residual=self.residual, tile=tile,
        )  # fmt: skip
        p.k, p.w_group = self.k, self.w_group.data_ptr()
        return p

    def check_given(self, library: ctypes.CDLL, tile: int, what: str = "", **changes: int) -> None:
        params = self.gemm(tile, given=True)
        for name, value in changes.items():
            setattr(params, name, value)
        assert run(library, self.backend, params) == SUCCESS, what
        g = self.host
        expected = reference.gemm_w4a8(
            *g[:5], None if self.bias is None else g.bias, self._residual(), self.dtype
        )
        self.output.check(expected, f"{what} {self.m} {self.n} {self.k} tile {tile}")

    def check_quantized(
        self,
        library: ctypes.CDLL,
        tile: int,
        scheme: str,
        *,
        smooth: bool = False,
        rotation: int = 0,
        scale: float = 0.013,
        w_constant: int = 0,
        fused: bool = True,
        what: str = "",
    ) -> Tensor:
        """Returns y on the CPU."""
        put = self.backend.put
        inv_smooth = cases.inverse_smooth(self.k) if smooth else None
        options: dict[str, Any] = cases.quantize_options(scheme, scale)
        there = [None if t is None else put(t) for t in (inv_smooth, options.get("scale"))]
        padded = -(-self.k // c_gemm.ALIGNMENT) * c_gemm.ALIGNMENT
        x_q = put(torch.full((self.m, padded), POISON, dtype=torch.int8))
        x_scale = put(torch.full((self.m,), float(POISON)))
        quantize = c_interface.params_of(
            self.x, x_q, x_scale, scheme=scheme, scale=there[1], inv_smooth=there[0], k=self.k,
            rotation=rotation,
        )  # fmt: skip
        gemm = self.gemm(tile, given=False)
        gemm.x_q_stride, gemm.w_constant = padded, w_constant
        params = c_gemm.LinearParams(quantize, gemm)
        status, plan = c_gemm.linear_plan(library, params)
        assert status == SUCCESS and plan.fused == fused and plan.gemm.tile == tile, what
        memory = put(torch.zeros(max(plan.workspace_bytes, 1), dtype=torch.int8))
        params.gemm.workspace, params.gemm.workspace_bytes = memory.data_ptr(), len(memory)
        assert library.sqk_linear_s8(byref(params), None) == SUCCESS, what
        if self.backend.device == "cuda":
            torch.cuda.synchronize()
        assert not fused or bool((x_q == POISON).all()), "a fused launch must not write x_q"
        g = self.host
        given = reference.quantize(self.x.cpu(), inv_smooth, rotation=rotation, **options)
        expected = reference.gemm_w4a8(
            given[0], g.w_q4, g.w_group, given[1], g.w_scale,
            None if self.bias is None else g.bias, self._residual(), self.dtype,
        )  # fmt: skip
        self.output.check(expected, f"{what} {self.m} {self.n} {self.k} {scheme} tile {tile}")
        return expected

    def _residual(self) -> Tensor | None:
        return None if self.residual is None else self.residual.cpu()


# --- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [3, 12])
def test_smoke_w4_stream(compiled: Backend, library: ctypes.CDLL, m: int) -> None:
    for n, k in ((35, 300), (48, 512)):
        layer = Layer(compiled, m, n, k, residual=torch.float16)
        for tile in tiles_for(library, m):
            layer.check_given(library, tile)
            layer.check_quantized(library, tile, "token", smooth=True)


@pytest.mark.parametrize("k", CHANNELS)
@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens_and_channels(
    compiled: Backend, library: ctypes.CDLL, m: int, k: int
) -> None:
    """x_q is given: every type of y, bias and residual, scales for all or for each."""
    turn = TOKENS.index(m) + 2 * CHANNELS.index(k)
    for i, dtype in enumerate(cases.FLOATS):
        layer = Layer(
            compiled, m, OUTPUTS[(turn + i) % 7], k, dtype, extra=(turn + i) % 3, bias=i != turn % 3,
            residual=(None, torch.float16, dtype, torch.float32)[(turn + i) % 4],
            per_token=(turn + i) % 2 == 0, per_channel=(turn + i) % 4 < 2, seed=turn,
        )  # fmt: skip
        for tile in tiles_for(library, m):
            layer.check_given(library, tile, w_constant=i % 2)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("k", CHANNELS)
@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens_and_channels_quantized(
    compiled: Backend, library: ctypes.CDLL, m: int, k: int, dtype: torch.dtype
) -> None:
    """Each block quantizes x: every scheme, smoothing and the largest rotation."""
    turn = TOKENS.index(m) + CHANNELS.index(k)
    rotation = next((g for g in (256, 128, 8, 4) if k % g == 0), 0)
    layer = Layer(
        compiled, m, OUTPUTS[turn % 7], k, dtype, extra=turn % 2,
        residual=(None, torch.float32, dtype)[turn % 3], per_channel=turn % 2 == 0, seed=turn,
    )  # fmt: skip
    for i, scheme in enumerate(cases.SCHEMES):
        tile = tiles_for(library, m)[(turn + i) % 2 if m <= 8 else 0]
        layer.check_quantized(library, tile, scheme, w_constant=i % 2)
        layer.check_quantized(library, tile, scheme, smooth=True, rotation=rotation)


def test_no_tokens_launch_nothing(compiled: Backend, library: ctypes.CDLL) -> None:
    layer = Layer(compiled, 0, 17, 300)
    status, plan = c_gemm.plan(library, layer.gemm(-1, given=True))
    assert status == SUCCESS and plan.launches == 0
    for tile in tiles_for(library, 0):
        layer.check_given(library, tile)


@pytest.mark.parametrize("m", [1, 8, 16])
def test_the_longest_rows_that_fit(compiled: Backend, library: ctypes.CDLL, m: int) -> None:
    """Activations fill the shared memory, and four warps are left; one group more is another tile's work."""
    small = Layer(compiled, m, 17, 128)

    def status(tile: int, groups: int) -> int:
        params = small.gemm(tile, given=True)
        params.k = params.x_q_stride = 128 * groups
        params.w_q_stride = 64 * groups
        return c_gemm.plan(library, params)[0]

    for tile in tiles_for(library, m):
        most = next((g - 1 for g in range(1, 1024) if status(tile, g) != SUCCESS), 1023)
        assert most == 1023 or (most % 2 == 0 and status(tile, most + 1) == UNSUPPORTED_SHAPE)
        layer = Layer(compiled, m, 17, 128 * most - 5, torch.bfloat16)
        for w_constant in (0, 1):
            layer.check_given(library, tile, w_constant=w_constant)


def test_a_block_takes_several_tiles(compiled: Backend, library: ctypes.CDLL) -> None:
    """Its ring continues from one to the next; some warps have two stages of a row, the others one."""
    tiles = 8 if compiled.name == "simulator" else 160
    for m, k in ((2, 600), (16, 4100)):
        layer = Layer(compiled, m, 3 * 16 * tiles + 5, k, torch.float32)
        for tile in tiles_for(library, m):
            layer.check_given(library, tile, w_constant=1)
        if m == 2:
            layer.check_quantized(library, tiles_for(library, m)[0], "tensor", smooth=True)


# --- layouts and edges --------------------------------------------------------------------------------


def test_one_row_may_have_any_stride(compiled: Backend, library: ctypes.CDLL) -> None:
    for m, n in ((1, 1), (1, 20), (5, 1)):
        layer = Layer(compiled, m, n, 300, torch.float32)
        changes = {"x_q_stride": 1, "y_stride": 0} if m == 1 else {}
        if n == 1:
            changes["w_q_stride"] = 3
        for tile in tiles_for(library, m):
            layer.check_given(library, tile, **changes)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_any_layout_of_x(compiled: Backend, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Rows that are whole vectors of 16 bytes or not, for the quantizer in the blocks."""
    base = compiled.put(cases.activations(12, 1040, dtype))
    for name, x in {
        "aligned": base[:7, 16:1040],
        "unaligned": base[:7, 3:1027],
        "odd": base[:9, 16:1035],
        "every second row": base[1::2, :256],
        "repeated": base[:1, :512].expand(5, 512),
    }.items():
        layer = Layer(compiled, len(x), 33, x.shape[1], dtype, x=x)
        for scheme in cases.SCHEMES:
            tile = tiles_for(library, len(x))[0]
            layer.check_quantized(library, tile, scheme, smooth=True, what=name)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("k", [1, 128, 300])
def test_edge_rows(compiled: Backend, library: ctypes.CDLL, k: int, dtype: torch.dtype) -> None:
    """Ties, zeros, subnormal and nonfinite values: a row that is not finite changes no other one."""
    good, bad = cases.rows(cases.FINITE_ROWS, k, dtype), cases.rows(cases.NONFINITE_ROWS, k, dtype)
    for x in (good, torch.cat([bad, good[:3]]), torch.cat([good[3:], bad])[:16]):
        broken = ~x.isfinite().all(-1)
        layer = Layer(compiled, len(x), 21, k, dtype, x=compiled.put(x))
        for scheme in cases.SCHEMES:
            tile = tiles_for(library, len(x))[-1]
            y = layer.check_quantized(library, tile, scheme, scale=1.0)
            if scheme == "token" and dtype != torch.float16:
                assert bool((~y.isfinite()).any(-1)[broken].all())
                assert not y[~broken].isnan().any()


@pytest.mark.parametrize("m", [6, 13])
def test_nonfinite_scales_stay_in_their_row_or_column(
    compiled: Backend, library: ctypes.CDLL, m: int
) -> None:
    g = cases.w4_operands(m, 37, 300)
    g.x_scale[1], g.x_scale[m - 1] = torch.nan, torch.inf
    g.w_scale[3], g.bias[36] = torch.nan, -torch.inf
    for dtype in cases.FLOATS:
        layer = Layer(compiled, m, 37, 300, dtype, operands=g)
        for tile in tiles_for(library, m):
            layer.check_given(library, tile)


def test_every_weight(compiled: Backend, library: ctypes.CDLL) -> None:
    """Each value with each step and offset that give an int8, in low and high halves of a byte, one at a time."""
    step, offset = torch.meshgrid(torch.arange(16), torch.arange(-128, 128), indexing="ij")
    step, offset = step.flatten(), offset.flatten()
    most = torch.where(step > 0, (127 - offset) // step.clamp(min=1), 15).clamp(max=15)
    n, k = len(step), 128
    w_group = torch.stack([step, offset], -1).to(torch.int8)[None]
    ones = torch.ones(16), torch.ones(n), torch.zeros(n), torch.zeros(16, n)
    for first in (0, 19):
        # Token j takes one element, whose value is j or the largest that its channel allows.
        at = (torch.arange(16) * 8 + first) % k
        q = torch.zeros(n, k, dtype=torch.int64)
        q[:, at] = torch.minimum(torch.arange(16)[None], most[:, None])
        x_q = torch.zeros(16, k, dtype=torch.int8)
        x_q[torch.arange(16), at] = 1
        g = W4Gemm(x_q, reference.pack_w4(q), w_group, *ones)
        expected = (q[:, at] * step[:, None] + offset[:, None]).t()
        assert int(expected.min()) == -128 and int(expected.max()) == 127
        assert torch.equal(reference.gemm_w4a8(*g[:5], out_dtype=torch.float32), expected.float())
        layer = Layer(compiled, 16, n, k, torch.float32, operands=g, bias=False)
        for tile in tiles_for(library, 16):
            layer.check_given(library, tile)


# --- launches that follow each other ------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 7, 12])
def test_chain(compiled: Backend, library: ctypes.CDLL, m: int) -> None:
    """A quantizer and a GEMM, then layers that quantize what was just written, in the memory of the turn before.

    On Hopper a kernel may start before the one before it has ended; tests/csrc/test_overlap.py runs these so.
    """
    tile = tiles_for(library, m)[0]
    for turn, dtype in enumerate((torch.float16, torch.float32)):
        first = Layer(compiled, m, 300, 260, dtype, seed=turn)
        params = first.gemm(tile, given=True)
        params.w_constant = turn
        quantized = c_interface.params_of(
            first.x, first.x_q, first.x_scale, k=first.k, scheme="token"
        )
        quantized.k_padded = first.k
        second = Layer(compiled, m, 40, 300, dtype, x=first.output.y, seed=turn)
        for _ in range(2):
            assert library.sqk_quantize(byref(quantized), None) == SUCCESS
            assert run(library, compiled, params) == SUCCESS
            x_q, x_scale = reference.quantize(first.x.cpu())
            g = first.host
            expected = reference.gemm_w4a8(
                x_q, g.w_q4, g.w_group, x_scale, g.w_scale, g.bias, out_dtype=dtype
            )
            second.check_quantized(library, tile, "token", w_constant=1, what="second")
            first.output.check(expected, f"{m}, turn {turn}")
