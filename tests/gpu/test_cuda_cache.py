"""The int8 cache on a GPU: one CUDA graph for all lengths, and what only a GPU cannot refuse."""

from __future__ import annotations

import pytest
import torch

from smoothquant_kernels import ops
from tests.support import backends, kv_calls

pytestmark = pytest.mark.cuda

WRITTEN = kv_calls.WRITTEN


@pytest.fixture(autouse=True)
def gpu() -> backends.Backend:
    with backends.started("cuda") as found:
        return found


@pytest.mark.parametrize("paged", [False, True])
def test_one_graph_decodes_at_every_length(gpu: backends.Backend, paged: bool) -> None:
    """Positions and lengths advance on the device. Each replay gives the bits of calls without a graph."""
    layout = (
        {"size": 64, "blocks": 9, "block_table": kv_calls.shuffled_table(2, 4, 9)}
        if paged
        else {"size": 256}
    )
    call = gpu.move(kv_calls.problem(tokens=1, dim=128, **layout))
    other = {name: t.clone() for name, t in call.items()}
    where = torch.zeros(2, dtype=torch.int32, device="cuda")
    q = torch.randn(2, 6, 1, 128, device="cuda").half()

    def step(arguments: dict[str, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        ops.kv_append(**arguments, positions=at, rotation=128)
        cache = {n: t for n, t in arguments.items() if n not in ("k", "v")}
        return ops.decode_attention_s8(q, scale=0.09, **cache, lengths=at + 1, rotation=128)

    step(other, where)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(call, where)
        where += 1
    where.zero_()
    for place in range(256):
        tokens = torch.randn(2, 2, 3, 1, 128, device="cuda").half()
        for name, x in zip("kv", tokens, strict=True):
            call[name].copy_(x)
            other[name].copy_(x)
        graph.replay()
        expected = step(other, torch.full_like(where, place))
        assert torch.equal(y, expected), place
    assert int(where[0]) == 256
    graph.replay()  # beyond the cache: not written
    torch.cuda.synchronize()
    for name in WRITTEN:
        assert torch.equal(call[name], other[name]), name


def test_a_long_prompt_is_written(gpu: backends.Backend) -> None:
    """More rows than one wave of blocks."""
    kv_calls.check(gpu, batch=1, heads=8, tokens=32768, dim=128, size=32768, rotation=128)


def test_offsets_beyond_2_gib(gpu: backends.Backend) -> None:
    size = 2**18
    cache = torch.zeros(9, 8, size, 128, dtype=torch.int8, device="cuda")
    scales = [torch.zeros(9, 8, size, device="cuda") for _ in range(2)]
    k = torch.randn(9, 8, 1, 128, device="cuda").half()
    at = torch.full((9,), size - 1, dtype=torch.int32, device="cuda")
    small = torch.zeros(9, 8, size, 16, dtype=torch.int8, device="cuda")
    ops.kv_append(k, k[..., :9], cache, small, k_scale=scales[0], v_scale=scales[1], positions=at)
    for x, written, scale in ((k, cache, scales[0]), (k[..., :9], small, scales[1])):
        x_q, x_scale = ops.quantize(x, k_multiple=16)
        assert torch.equal(written[:, :, -1], x_q[:, :, 0])
        assert torch.equal(scale[:, :, -1].flatten(), x_scale)
        assert not written[:, :, :-1].any()
