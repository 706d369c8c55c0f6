"""The plans of gated GEMMs, compiled without CUDA: which tiles serve, and when two launches are taken."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from tests.csrc.test_gemm_plan import GPUS, compiled, each_gpu, params, rows
from tests.support import c_gemm
from tests.support.c_gemm import Params
from tests.support.c_interface import INVALID_ARGUMENT, SUCCESS, UNSUPPORTED_SHAPE

pytestmark = pytest.mark.compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("gemm_gated"))


def gated(m: int, n: int, k: int, **more: Any) -> Params:
    given = {"y_dtype": 3, "out_scale": 4096, "activation": 6, "gate_dtype": 1, "y_scale": 4096}
    return params(m, n, k, **{**given, "y_stride": n // 2, **more})


@each_gpu
def test_gated_problems_take_gated_tiles_or_two_launches(library: ctypes.CDLL, gpu: str) -> None:
    """Large problems are always one launch; a last block that is shorter never is."""
    device, _ = GPUS[gpu]
    tiles = rows(library, gpu)
    one_launch = set()
    for m in (1, 8, 16, 17, 32, 64, 65, 128, 256, 512, 2048, 8192):
        for n, k in ((22016, 4096), (28672, 8192), (3072, 576)):
            status, found = c_gemm.plan(library, gated(m, n, k), device)
            assert status in (SUCCESS, UNSUPPORTED_SHAPE)
            if status == SUCCESS:
                tile = tiles[found.tile]
                assert tile["gated"] or tile["swap_ab"] or tile["kernel"] == "stream"
                one_launch.add(m)
        status, _ = c_gemm.plan(library, gated(m, 22008, 4096), device)
        assert status == UNSUPPORTED_SHAPE
    assert one_launch >= {1, 8, 2048, 8192}
    for row, tile in enumerate(tiles):
        serves = tile["gated"] or tile["swap_ab"] or tile["kernel"] == "stream"
        serves = serves and not tile["w4_only"]
        status, _ = c_gemm.plan(library, gated(8, 64, 64, tile=row), device)
        assert status == (SUCCESS if serves else UNSUPPORTED_SHAPE)


@pytest.mark.parametrize(
    "change",
    [
        {"activation": 3}, {"activation": 1}, {"activation": 9}, {"y_dtype": 1, "out_scale": None},
        {"gate_dtype": 3}, {"gate_dtype": 7}, {"n": 63}, {"y_scale": None}, {"relu": 1},
        {"residual": 4096}, {"y_stride": 31},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_gated_problems_are_refused(library: ctypes.CDLL, change: dict[str, Any]) -> None:
    p = gated(8, 64, 64)
    for name, value in change.items():
        setattr(p, name, value)
    assert c_gemm.plan(library, p, GPUS["H100"][0])[0] == INVALID_ARGUMENT
