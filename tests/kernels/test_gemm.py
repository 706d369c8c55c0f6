"""The int8 GEMMs equal the reference bit for bit: every tile, every rule of the dispatch, every layout and edge."""

from __future__ import annotations

import ctypes
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import ops, reference
from tests.support import c_gemm, cases
from tests.support.backends import Backend
from tests.support.cases import Gemm
from tests.support.compare import assert_bitwise_equal, count_result

#: M on both sides of every dispatch rule of every architecture.
TOKENS = (0, 1, 2, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 513)
OTHER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float16,
    torch.float32: torch.bfloat16,
}


def check(
    backend: Backend,
    x_q: Tensor,
    w_q: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    tile: int | None = None,
    splits: int = 0,
    what: str = "",
) -> Tensor:
    """The operands are on the backend's device, in any layout. Without a tile, calls the public op.

    Returns y on the CPU.
    """
    arguments = (x_q, w_q, x_scale, w_scale)
    added: dict[str, Any] = {"bias": bias, "residual": residual, "out_dtype": dtype}
    if tile is None:
        found = ops.gemm_s8(*arguments, **added)
    else:
        op = torch.ops.smoothquant_kernels._gemm_s8_tile
        found = op(*arguments, **added, tile=tile, splits=splits)
    on_cpu = [None if t is None else t.cpu() for t in (*arguments, bias, residual)]
    expected = reference.gemm_s8(*on_cpu, dtype)  # type: ignore[arg-type]
    assert found.is_contiguous()
    assert_bitwise_equal(found, expected, what)
    count_result()
    return expected


def on_device(backend: Backend, gemm: Gemm) -> Gemm:
    return Gemm(*map(backend.put, gemm))


def check_added(
    backend: Backend, gemm: Gemm, case: dict[str, Any], dtype: torch.dtype, what: str, **how: Any
) -> None:
    """Checks a case of `cases.covering`, which chooses the scales and the types of bias and residual."""
    types = {"same": dtype, "other": OTHER[dtype]}
    bias, residual = case.get("bias"), types.get(case.get("residual", ""))
    check(
        backend,
        backend.put(gemm.x_q),
        backend.put(gemm.w_q),
        backend.put(gemm.x_scale[: None if case.get("per_token", True) else 1]),
        backend.put(gemm.w_scale[: None if case.get("per_channel", True) else 1]),
        None if bias is None else backend.put(gemm.bias.to(bias)),
        None if residual is None else backend.put(gemm.residual.to(residual)),
        dtype=dtype,
        what=f"{what} {case}",
        **how,
    )


# --- every tile -------------------------------------------------------------------------------------


def test_smoke_gemm(backend: Backend, tile: dict[str, Any]) -> None:
    m = min(tile["m"], 35)
    for splits in sorted({1, tile["most_splits"]}):
        for dtype, n, k in ((torch.float16, 48, 320), (torch.float32, 35, 139)):
            case = {"bias": dtype, "residual": "same"}
            gemm = cases.gemm_operands(m, n, k)
            how = {"tile": tile["tile"], "splits": splits}
            check_added(backend, gemm, case, dtype, tile["name"], **how)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_every_tile(backend: Backend, tile: dict[str, Any], dtype: torch.dtype) -> None:
    added = list(product((None, torch.float32, torch.float16), ("", "same", "other")))
    name, most = tile["name"], tile["most_splits"]
    for i, case in enumerate(
        cases.covering(
            len(added),
            cases.FLOATS.index(dtype) + 3 * tile["tile"],
            added=added,
            per_token=(True, False),
            per_channel=(True, False),
            splits=sorted({0, 1, min(2, most), most}),
            **cases.gemm_sizes(tile),
        )
    ):
        case["bias"], case["residual"] = case.pop("added")
        gemm = cases.gemm_operands(case["m"], case["n"], case["k"], seed=i)
        how = {"tile": tile["tile"], "splits": case["splits"]}
        check_added(backend, gemm, case, dtype, name, **how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_tile_with_whole_groups_of_channels(
    backend: Backend, tile: dict[str, Any], dtype: torch.dtype
) -> None:
    """With rows of y and residual at multiples of 16 bytes the epilogue takes its fast path, except for 8 channels."""
    m = min(tile["m"], 37)
    for i, (bias, residual) in enumerate(product((None, torch.float32), ("", "same"))):
        gemm = cases.gemm_operands(m, 2 * tile["n"] + 40, 160, seed=i)
        scales = {"per_token": i % 2 == 0, "per_channel": i < 2}
        case = {"bias": bias, "residual": residual, **scales}
        check_added(backend, gemm, case, dtype, tile["name"], tile=tile["tile"], splits=0)


@pytest.mark.parametrize("turns", [2, 3])
def test_the_stages_go_round(backend: Backend, tile: dict[str, Any], turns: int) -> None:
    """K is much longer than the pipeline of stages, and so is each part of a split."""
    k = turns * cases.k_of_all_stages(tile) + 17
    m, n = min(tile["m"], 20) - turns, 30 + turns
    for splits in {1, min(3, tile["most_splits"])}:
        gemm = cases.gemm_operands(m, n, splits * k)
        how = {"tile": tile["tile"], "splits": splits}
        check_added(backend, gemm, {}, torch.float32, tile["name"], **how)


def test_more_tiles_than_blocks(
    compiled: Backend, library: ctypes.CDLL, tile: dict[str, Any]
) -> None:
    """Persistent blocks process several tiles each, along n and along m."""
    tiles = 2 * c_gemm.current_device(library).sms + 1
    case = {"bias": torch.float32, "residual": "same"}
    how = {"tile": tile["tile"], "splits": 1}
    wide = cases.gemm_operands(min(tile["m"], 21), tiles * tile["n"] - 5, 100)
    check_added(compiled, wide, case, torch.float16, tile["name"], **how)
    if tile["kernel"] != "stream":
        high = cases.gemm_operands(tiles * tile["m"] - 5, 21, 100)
        check_added(compiled, high, case, torch.bfloat16, tile["name"], **how)


def test_splits_are_reproducible(backend: Backend, tile: dict[str, Any]) -> None:
    gemm = on_device(backend, cases.gemm_operands(min(tile["m"], 40), 200, 8 * tile["k"] + 5))
    op = torch.ops.smoothquant_kernels._gemm_s8_tile
    for splits in range(1, tile["most_splits"] + 1):
        for _ in range(2):
            y = op(*gemm[:4], out_dtype=torch.float16, tile=tile["tile"], splits=splits)
            expected = reference.gemm_s8(*(t.cpu() for t in gemm[:4]), out_dtype=torch.float16)
            assert_bitwise_equal(y, expected, f"{tile['name']} {splits}")
            count_result()


# --- tiles that the dispatch chooses ----------------------------------------------------------------


@pytest.mark.parametrize("shape", cases.GEMM_SHAPES, ids=str)
def test_shapes(backend: Backend, shape: tuple[int, int, int]) -> None:
    for case in cases.covering(
        6,
        sum(shape),
        dtype=cases.FLOATS,
        bias=(None, *cases.FLOATS),
        residual=("", "same", "other"),
        per_token=(True, False),
        per_channel=(True, False),
    ):
        check_added(backend, cases.gemm_operands(*shape), case, case.pop("dtype"), str(shape))


@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens(backend: Backend, m: int) -> None:
    for i, (n, k) in enumerate(((33, 1000), (257, 99))):
        dtype = cases.FLOATS[(m + i) % 3]
        case = {"bias": dtype, "residual": "same"}
        check_added(backend, cases.gemm_operands(m, n, k), case, dtype, f"{m} {n} {k}")


@pytest.mark.parametrize("m", [3, 20])
def test_the_largest_integer_sums(backend: Backend, m: int) -> None:
    """The largest int32 sums, and negative sums that float32 must round."""
    n, k = 5, reference.MAX_K
    largest = torch.full((m, k), -128, dtype=torch.int8)
    random = cases.random_int8(m, k, low=100), -cases.random_int8(n, k, low=101, seed=1)
    ones = backend.put(torch.ones(1))
    for x_q, w_q in ((largest, largest[:1].expand(n, k)), random):
        operands = backend.put(x_q), backend.put(w_q)
        y = check(backend, *operands, ones, ones, dtype=torch.float32)
        assert float(y.abs().min()) > 1.6e9


@pytest.mark.parametrize("m", [3, 40])
def test_any_layout(backend: Backend, m: int) -> None:
    """Views into buffers with other numbers around them. The op copies views that are not aligned to 16 bytes."""
    k = 80
    base = backend.put(cases.random_int8(2 * m, 3 * k))
    odd = base.reshape(-1)[1 : 1 + m * k]
    layouts = {
        "whole": base[:m, :k],
        "narrowed, aligned": base[:m, 16 : 16 + k],
        "narrowed": base[:m, 3 : 3 + k],
        "narrowed to an odd size": base[:m, 32 : 32 + k - 1],
        "unaligned": odd.view(m, k),
        "unaligned, odd size": odd[: m * (k - 3)].view(m, k - 3),
        "transposed": base[:k, :m].t(),
        "strided": base[::2, 1::3],
        "every second row": base[1::2, :k],
        "expanded": base[:1, :k].expand(m, k),
        "expanded columns": base[:m, :1].expand(m, k),
        "overlapping rows": base.as_strided((m, k), (16, 1)),
    }
    for name, view in layouts.items():
        rows, size = view.shape
        g = on_device(backend, cases.gemm_operands(rows, rows, size))
        check(backend, view, g.w_q, *g[2:], what=f"x_q {name}")
        check(backend, g.x_q, view, *g[2:], what=f"w_q {name}")
        check(backend, view, view, *g[2:4], dtype=torch.float32, what=f"both {name}")


def test_any_shape_of_x(backend: Backend) -> None:
    base = backend.put(cases.random_int8(24, 96))
    for name, x in {
        "deep": base.view(2, 3, 4, 96),
        "deep, with ones": base.view(24, 1, 1, 96)[::2],
        "deep, narrowed": base.view(4, 6, 96)[:, 1:3, 16:64],
        "permuted": base.view(2, 12, 96).permute(1, 2, 0),
        "rows swapped": base.view(2, 12, 96).transpose(0, 1),
        "vector": base[3],
        "vector, strided": base[:, 5],
        "empty": base.view(2, 12, 96)[:, :0],
    }.items():
        m = x[..., 0].numel()
        g = on_device(backend, cases.gemm_operands(m, 19, x.shape[-1]))
        residual = g.residual.view(*x.shape[:-1], 19)
        y = check(backend, x, *g[1:4], g.bias, residual, what=name)
        assert y.shape == residual.shape


@pytest.mark.parametrize("m", [5, 70])
def test_any_layout_of_bias_and_residual(backend: Backend, m: int) -> None:
    n = 66
    g = on_device(backend, cases.gemm_operands(m, n, 32))
    wide = backend.put(torch.full((2 * m, 2 * n), torch.nan))
    across = backend.put(torch.full((n, m + 1), torch.nan))
    vectors = backend.put(torch.full((3, 2 * n + 1), torch.nan))
    for name, view, vector in (
        ("aligned", wide[:m, 8 : 8 + n], vectors[0, :n]),
        ("unaligned", wide[:m, 3 : 3 + n], vectors[1, 1 : n + 1]),
        ("strided", wide[::2, ::2], vectors[2, : 2 * n : 2]),
        ("transposed", across[:, 1:].t(), g.bias),
    ):
        view.copy_(g.residual)
        vector.copy_(g.w_scale)
        for dtype in cases.FLOATS:
            check(backend, *g[:3], vector, vector, view, dtype=dtype, what=name)
        wide.fill_(torch.nan)
    row = g.residual[:1].expand(m, n)
    check(backend, *g[:3], g.w_scale[:1].expand(n), g.bias, row, what="expanded")


# --- edges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [8, 16, 40, 130])
def test_nonfinite_values_stay_in_their_row_or_column(backend: Backend, m: int) -> None:
    g = cases.gemm_operands(m, 70, 64)
    rows, columns = (1, m - 1), (3, 42, 69)
    g.x_scale[rows[0]], g.x_scale[rows[1]] = torch.nan, torch.inf
    g.w_scale[columns[0]], g.w_scale[columns[1]], g.bias[columns[2]] = torch.nan, -torch.inf, torch.nan  # fmt: skip
    g.residual[2, 20], g.residual[4, 21] = torch.inf, torch.nan
    clear = torch.ones(m, 70, dtype=torch.bool)
    clear[list(rows)], clear[:, list(columns)], clear[2, 20], clear[4, 21] = (False,) * 4
    for dtype in cases.FLOATS:
        y = check(backend, *on_device(backend, g), dtype=dtype)
        assert bool((y.isfinite() == clear).all())


@pytest.mark.parametrize("m", [8, 40])
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_signed_zeros_subnormals_and_overflow(backend: Backend, m: int, dtype: torch.dtype) -> None:
    """Zero and subnormal scales and sums, overflow to infinity, and an added bias and residual of either zero."""
    g = cases.gemm_operands(m, 40, 48)
    g.x_q[::3] = 0
    for scale in (g.x_scale, g.w_scale):
        scale[::2] *= torch.rand(len(scale[::2])) + 0.5
        scale[1:8] = torch.tensor([0.0, -0.0, 1e-40, 1e-20, -1e-3, 1e18, 1e-38])
    zeros = torch.zeros(m, 40)
    for bias in (None, zeros[0], -zeros[0]):
        for residual in (None, zeros, -zeros):
            check(
                backend,
                *(backend.put(t) for t in g[:4]),
                *(None if t is None else backend.put(t.to(dtype)) for t in (bias, residual)),
                dtype=dtype,
                what=f"{bias is not None} {residual is not None}",
            )


def check_requant(
    backend: Backend, gemm: Gemm, out_scale: float, bias: bool, relu: bool, what: str = ""
) -> Tensor:
    options = {"bias": gemm.bias if bias else None, "relu": relu}
    scale = torch.tensor([out_scale])
    expected = reference.gemm_s8_requant(*gemm[:4], scale, **options)
    put = backend.put
    given = {k: put(v) if isinstance(v, Tensor) else v for k, v in options.items()}
    found = ops.gemm_s8_requant(*map(put, gemm[:4]), put(scale), **given)
    assert_bitwise_equal(found, expected, f"{what} {out_scale} {bias} {relu}")
    count_result()
    return expected


@pytest.mark.parametrize("m", TOKENS)
def test_requant(backend: Backend, m: int) -> None:
    for i, (n, k) in enumerate(((33, 100), (130, 31), (64, 64))):
        gemm = cases.gemm_operands(m, n, k, per_token=m % 2 == 1, per_channel=i != 1)
        for relu in (False, True):
            check_requant(backend, gemm, 0.013, relu ^ (i == 1), relu, f"{m} {n} {k}")


@pytest.mark.parametrize("m", [5, 12, 40, 255])
def test_requant_ties_saturation_and_nonfinite_scales(backend: Backend, m: int) -> None:
    x_q = (torch.arange(255) - 127).to(torch.int8)[:, None][:m]
    w_q = torch.tensor([[1], [-1], [3], [0]], dtype=torch.int8)
    ones = torch.ones(m)
    gemm = Gemm(x_q, w_q, ones, torch.full((4,), 0.5), torch.tensor([0.0, 0.5, -1, 130]), ones)
    nonfinite = gemm._replace(x_scale=ones.clone())
    nonfinite.x_scale[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    for relu in (False, True):
        for bias in (False, True):
            y = check_requant(backend, gemm, 1.0, bias, relu, "ties")
            assert m < 255 or int(y.max()) == 127
            y = check_requant(backend, nonfinite, 1.0, bias, relu, "nonfinite")
            assert not y[0].any(), "NaN must become 0"
            for out_scale in (0.0, -1.0, 1e-39, 1e-30, 3e38, torch.nan, torch.inf):
                check_requant(backend, gemm, out_scale, bias, relu)
