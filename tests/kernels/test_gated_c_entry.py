"""The C entry of gated GEMMs: every tile that serves them, strides, poisoned results and workspaces."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from smoothquant_kernels import reference
from tests.kernels.test_gated import KINDS, operands, two_ops
from tests.kernels.test_gemm_c_entry import POISON, Output, run, with_garbage
from tests.support import c_gemm, c_interface, cases
from tests.support.backends import Backend
from tests.support.c_interface import SUCCESS, UNSUPPORTED_SHAPE
from tests.support.cases import Gemm
from tests.support.compare import assert_bitwise_equal, count_result


def serves(tile: dict[str, Any]) -> bool:
    return bool(tile["gated"] or tile["swap_ab"] or tile["kernel"] == "stream")


def check_tile(
    backend: Backend, library: ctypes.CDLL, tile: dict[str, Any], case: dict[str, Any], seed: int
) -> None:
    m, channels = case["m"], case["channels"]
    scales = {name: case[name] for name in ("per_token", "per_channel")}
    gemm = operands(m, channels, case["k"], seed=seed, **scales)
    if case["nonfinite"]:
        gemm.bias[channels] = torch.nan if m == 1 else gemm.bias[channels]
        gemm.x_scale[-1] = torch.inf
    gemm = Gemm(
        with_garbage(backend, gemm.x_q, 1), with_garbage(backend, gemm.w_q, 0), *map(backend.put, gemm[2:])
    )  # fmt: skip
    out_scale = backend.put(torch.tensor([case["out_scale"]]))
    bias = gemm.bias if case["bias"] else None
    factors = backend.put(cases.inverse_smooth(channels)) if case["smooth"] else None
    expected = two_ops(gemm, out_scale, case["kind"], bias, factors, case["dtype"])
    output = Output(backend, m, channels, torch.int8, case["aligned"])
    y_scale = Output(backend, 1, m, torch.float32, True)
    p = c_gemm.params_of(
        *gemm[:4], output.y, bias=bias, out_scale=out_scale, tile=tile["tile"], splits=case["splits"]
    )  # fmt: skip
    p.activation = c_interface.PRODUCERS.index(reference.FUSED_KINDS[case["kind"]])
    p.gate_dtype = c_gemm.DTYPES[case["dtype"]]
    p.y_scale = y_scale.y.data_ptr()
    if factors is not None:
        p.inv_smooth = factors.data_ptr()
    assert run(library, backend, p) == SUCCESS
    what = f"{tile['name']} {case}"
    assert_bitwise_equal(y_scale.y[0], expected[1], f"{what} y_scale")
    y_scale.y.fill_(POISON)
    y_scale.check_untouched()
    output.check(expected[0].cpu(), what)
    count_result()


def test_every_gated_tile(compiled: Backend, library: ctypes.CDLL, tile: dict[str, Any]) -> None:
    if not serves(tile):
        small = operands(3, 8, 32)
        p = c_gemm.params_of(*small[:4], small.x_q[:, :8], tile=tile["tile"])
        p.activation, p.gate_dtype, p.out_scale, p.y_scale = 6, 1, p.x_scale, p.x_scale
        assert c_gemm.plan(library, p)[0] == UNSUPPORTED_SHAPE
        return
    most_m, n, most = tile["m"], tile["n"] // 2, tile["most_splits"]
    several = [] if tile["kernel"] == "stream" else [most_m + 9, 2 * most_m * tile["cluster"][0]]
    for i, case in enumerate(
        cases.covering(
            12,
            tile["tile"],
            m=sorted({1, most_m - 1, most_m, *several}),
            channels=sorted({8, n, n + 8, 2 * n * tile["cluster"][1] + 24}),
            k=(31, tile["k"], cases.k_of_all_stages(tile) + 33),
            kind=KINDS,
            dtype=cases.FLOATS,
            bias=(True, False),
            smooth=(True, False),
            per_token=(True, False),
            per_channel=(True, False),
            aligned=(True, False),
            nonfinite=(True, False),
            out_scale=(0.05, 0.02, -1.0, torch.nan),
            splits=sorted({0, 1, min(2, most), most}),
        )
    ):
        check_tile(compiled, library, tile, case, i)
