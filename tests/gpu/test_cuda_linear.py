"""`W8A8Linear` on a GPU equals the CPU bit for bit: any leading dimensions, compiled, and in CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from smoothquant_kernels import SmoothQuantConfig, W8A8Linear, reference
from smoothquant_kernels.backends import cuda
from tests.support import backends, cases
from tests.support.compare import assert_bitwise_equal

pytestmark = pytest.mark.cuda
SCHEMES = ("per_token", "per_tensor", "static")
#: (M, N, K): decoding, small and large batches, and odd sizes.
SHAPES = (
    (1, 256, 512),
    (8, 100, 4096),
    (17, 257, 300),
    (64, 384, 1024),
    (130, 512, 2048),
    (1025, 640, 513),
)


@pytest.fixture(autouse=True)
def gpu() -> None:
    backends.require_gpu()


def layer(k: int, n: int, scheme: str, smooth: bool = True) -> W8A8Linear:
    """Smoothed layers are rotated, too, as the driver makes them."""
    factors = cases.inverse_smooth(k) if smooth else None
    rotation = SmoothQuantConfig(rotation=256).rotation_of(k) if smooth else 0
    return cases.quantized(cases.float_linear(k, n), scheme, smooth=factors, rotation=rotation)


def check(on_gpu: W8A8Linear, on_cpu: W8A8Linear, x: Tensor) -> None:
    assert_bitwise_equal(on_gpu(x.cuda()).cpu(), on_cpu(x))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_equal_those_of_the_cpu(
    shape: tuple[int, int, int], scheme: str, dtype: torch.dtype
) -> None:
    m, n, k = shape
    for smooth in (False, True):
        on_cpu = layer(k, n, scheme, smooth)
        check(copy.deepcopy(on_cpu).cuda(), on_cpu, cases.activations(m, k, dtype))


def test_any_leading_dimensions() -> None:
    on_cpu = layer(96, 40, "per_token")
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = cases.activations(24, 96, torch.float16)
    for shaped in (x[0], x.view(2, 12, 96), x.view(2, 3, 4, 96), x[:0], x.view(4, 6, 96)[:, ::2]):
        check(on_gpu, on_cpu, shaped)


def test_one_quantized_input_for_several_layers() -> None:
    first, second = (layer(100, n, "per_token", smooth=False) for n in (64, 33))
    x = cases.activations(9, 100, torch.bfloat16)
    shared = first.cuda().quantize_input(x.cuda())
    assert_bitwise_equal(second.cuda()(shared).cpu(), second.cpu()(x))


def test_the_weight_is_packed_once() -> None:
    moved = layer(100, 40, "per_token").cuda()
    assert moved.w_q.stride() == (112, 1) and moved.w_q.data_ptr() % 16 == 0
    loaded = W8A8Linear(100, 40, smooth=True, device="cuda")
    loaded.load_state_dict(moved.state_dict())
    assert loaded.w_q.stride() == (112, 1)
    assert_bitwise_equal(loaded.w_q, moved.w_q)


@pytest.mark.parametrize("m", [1, 64, 300])
def test_compiled_and_in_a_graph(m: int) -> None:
    on_cpu = layer(512, 384, "per_token")
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x, other = (cases.activations(m, 512, torch.float16, seed) for seed in (0, 1))
    compiled = torch.compile(on_gpu, fullgraph=True)
    assert_bitwise_equal(compiled(x.cuda()).cpu(), on_cpu(x))
    held = x.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_gpu(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = on_gpu(held)
    for new in (other, x):
        held.copy_(new)
        graph.replay()
        assert_bitwise_equal(y.cpu(), on_cpu(new))


def test_back_to_back_layers() -> None:
    """The second kernel of a call may start before the first one ends. The results must not depend on it."""
    torch.manual_seed(0)
    chain = [layer(1024, 1024, "per_token") for _ in range(4)]
    on_gpu = [copy.deepcopy(one).cuda() for one in chain]
    x = cases.activations(256, 1024, torch.float16)
    expected = x
    for one in chain:
        expected = one(expected)
    for _ in range(200):
        y = x.cuda()
        for one in on_gpu:
            y = one(y)
        assert_bitwise_equal(y.cpu(), expected)


def test_every_tile_of_this_gpu() -> None:
    m, n, k = 16, 256, 1056
    table = cuda.gemm_tables()[cuda.gemm_plan(m, n, k)["table"]]
    g = cases.gemm_operands(m, n, k)
    on_gpu = [t.cuda() for t in g[:4]]
    expected = reference.gemm_s8(*g[:4], out_dtype=torch.float16)
    for row in table["tiles"]:
        if row["excluded"] or row["w4_only"] or (row["kernel"] == "stream" and m > row["m"]):
            continue
        y = torch.ops.smoothquant_kernels._gemm_s8_tile(
            *on_gpu, out_dtype=torch.float16, tile=row["tile"]
        )
        assert_bitwise_equal(y.cpu(), expected, row["name"])
