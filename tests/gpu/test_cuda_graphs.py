"""The CUDA kernels on streams and in CUDA graphs, their use of memory, and tensors of more than 2^31 elements."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import StaticCache

from tests.nn import test_generate
from tests.support import backends, cases
from tests.support.compare import assert_all_bitwise_equal
from tests.support.gpu import EPS, GPU, assert_like_the_cpu, move, problems, tensors
from tests.support.op_calls import CALLS, Call

pytestmark = pytest.mark.cuda

#: (M, K): zero, one and many rows; whole and partial vectors; few long rows, in slices, clusters or shared memory.
SHAPES = ((0, 64), (1, 8192), (5, 67), (300, 1024), (3, 16384), (2, 40000))
SLEEP = 200_000_000  # cycles: about a tenth of a second
GIB = 2**30


@pytest.fixture(autouse=True)
def gpu() -> None:
    backends.require_gpu()


@pytest.fixture
def concurrent() -> None:
    """Skips the test if an environment variable makes streams wait for each other."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"):
        if os.environ.get(name) == "1":
            pytest.skip(f"{name} is 1")


def overwrite(call: Call, source: Call) -> None:
    """Copies the tensors of one call into those of another."""
    for to, new in zip(tensors(call), tensors(source), strict=True):
        to.copy_(new)


def warm_up(calls: list[Call], stream: torch.cuda.Stream) -> None:
    """Loads the kernels and allocates the stream's blocks, because both may make the GPU wait."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = [call.eager() for call in calls]
    torch.cuda.synchronize()
    del results


# --- CUDA graphs ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # without rows nothing is launched
@pytest.mark.parametrize("side", [False, True], ids=["torch's stream", "our stream"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_graph_replays_with_new_inputs(shape: tuple[int, int], side: bool) -> None:
    calls = problems(*shape)
    others = [problems(*shape, seed=seed) for seed in (10, 20)]
    stream = torch.cuda.Stream()
    warm_up(calls, stream)
    for i, call in enumerate(calls):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream if side else None):
            found = call.eager()
        for source in (call, *(other[i] for other in others)):
            overwrite(call, source)
            for result in tensors(found):
                result.fill_(77)  # the replay must overwrite it
            graph.replay()
            assert_all_bitwise_equal(found, call.eager(), call.name)


@pytest.mark.parametrize("shape", [(300, 1024), (2, 40000)], ids=str)
def test_many_replays_of_a_graph_of_every_op(shape: tuple[int, int]) -> None:
    """In one graph, an op reuses memory that an earlier one freed. Workspaces and results must not overlap."""
    calls = problems(*shape, dtype=torch.bfloat16)
    expected = [tensors(call.eager()) for call in calls]
    warm_up(calls, torch.cuda.Stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [tensors(call.eager()) for call in calls]
    for _ in range(100):
        for result in tensors(found):
            result.fill_(77)
        graph.replay()
        for call, results, right in zip(calls, found, expected, strict=True):
            assert all(map(torch.equal, results, right)), call.name


def test_a_graph_runs_beside_other_work() -> None:
    """The graph is replayed on its own stream while the same ops run on another."""
    calls, stream = problems(300, 1024), torch.cuda.Stream()
    expected = [call.eager() for call in calls]
    warm_up(calls, stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = [call.eager() for call in calls]
    torch.cuda.synchronize()
    for _ in range(10):
        with torch.cuda.stream(stream):
            graph.replay()
        beside = [call.eager() for call in calls]
    torch.cuda.synchronize()
    for call, first, second, right in zip(calls, captured, beside, expected, strict=True):
        assert_all_bitwise_equal(first, right, f"{call.name} in the graph")
        assert_all_bitwise_equal(second, right, f"{call.name} beside it")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", cases.SCHEMES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_generate_with_a_static_cache_is_captured(family: str, scheme: str) -> None:
    """On a GPU, transformers runs the steps of a static cache through `torch.compile` with CUDA graphs."""
    torch._dynamo.reset()
    made: Any = copy.deepcopy(test_generate.model(family, scheme)).to(GPU)
    ids, mask = (t.to(GPU) for t in test_generate.padded())

    def generate(**options: Any) -> Any:
        return made.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0, cache_implementation="static", return_dict_in_generate=True,
            output_logits=True, **options,
        )  # fmt: skip

    right = generate(disable_compile=True)
    before = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for _ in range(3):  # the first call compiles, the second records, the third replays
        found = generate()
        for a, b in zip(found.logits, right.logits, strict=True):
            near = test_generate.NEAR[scheme] * float(b.abs().max())
            assert float((a - b).abs().max()) <= near
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == before


@pytest.mark.parametrize("scheme", cases.SCHEMES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_decoding_step_in_a_graph(family: str, scheme: str) -> None:
    """Without a compiler: one step is captured, and replayed with new tokens and places."""
    made: Any = copy.deepcopy(test_generate.model(family, scheme)).to(GPU)
    cache = StaticCache(config=made.config, max_cache_len=16)
    token, place = torch.tensor([[5], [6]], device=GPU), torch.full((2, 1), 7, device=GPU)
    prompt = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1)).to(GPU)

    def step() -> Tensor:
        logits: Tensor = made(token, position_ids=place, past_key_values=cache).logits
        return logits

    def prefill() -> None:
        cache.reset()
        made(prompt, past_key_values=cache)

    with torch.no_grad():
        prefill()
        right = []
        for i in range(3):
            token.fill_(5 + i)
            place.fill_(7 + i)
            right.append(step())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        prefill()
        for i, expected in enumerate(right):
            token.fill_(5 + i)
            place.fill_(7 + i)
            graph.replay()
            near = test_generate.NEAR[scheme] * float(expected.abs().max())
            assert float((found - expected).abs().max()) <= near


# --- streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 1024), (3, 16384), (2, 40000)], ids=str)
def test_ops_run_on_the_current_stream(shape: tuple[int, int], concurrent: None) -> None:
    """The stream fills the inputs after a long sleep, so an op on any other stream reads zeros."""
    calls, stream = problems(*shape), torch.cuda.Stream()
    expected = [call.eager() for call in calls]
    warm_up(calls, stream)
    for call, right in zip(calls, expected, strict=True):
        empty = tree_map(lambda t: torch.zeros_like(t) if isinstance(t, Tensor) else t, call)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
            overwrite(empty, call)
            found = empty.eager()
        waited = stream.query()
        stream.synchronize()
        assert not waited, f"{call.name} waited for the GPU"
        assert_all_bitwise_equal(found, right, call.name)


def test_ops_do_not_wait_for_the_default_stream(concurrent: None) -> None:
    calls, stream = problems(64, 1024) + problems(2, 40000), torch.cuda.Stream()
    expected = [call.eager() for call in calls]
    warm_up(calls, stream)
    torch.cuda._sleep(10 * SLEEP)
    awake = torch.cuda.Event()
    awake.record()
    with torch.cuda.stream(stream):
        found = [call.eager() for call in calls]
    stream.synchronize()
    waited = awake.query()
    torch.cuda.synchronize()
    assert not waited, "the ops waited for another stream"
    for call, result, right in zip(calls, found, expected, strict=True):
        assert_all_bitwise_equal(result, right, call.name)


@contextmanager
def synchronizing_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_op_synchronizes() -> None:
    calls = [move(call, GPU) for call in CALLS]
    for shape in SHAPES:
        calls += problems(*shape)
    some = torch.ones(1, device=GPU)
    with synchronizing_is_an_error():
        with pytest.raises(RuntimeError, match="synchroniz"):  # the mode is on
            some.item()
        for call in calls:
            call.eager()


def test_threads_with_their_own_streams() -> None:
    work = [problems(16 + i, 1024, seed=100 * i) + problems(2, 16384, seed=i) for i in range(8)]
    expected = [[call.eager() for call in calls] for calls in work]
    torch.cuda.synchronize()
    together = threading.Barrier(len(work), timeout=60)

    def run(calls: list[Call]) -> list[list[Any]]:
        stream = torch.cuda.Stream()
        together.wait()
        with torch.cuda.stream(stream):
            results = [[call.eager() for call in calls] for _ in range(10)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(work)) as pool:
        found = list(pool.map(run, work))
    for calls, rounds, right in zip(work, found, expected, strict=True):
        for results in rounds:
            for call, result, one in zip(calls, results, right, strict=True):
                assert_all_bitwise_equal(result, one, call.name)


# --- memory and sizes -------------------------------------------------------------------------------------


@pytest.fixture
def allocator(gpu: None) -> None:
    """Skips the test unless torch's own caching allocator counts the memory."""
    if torch.cuda.get_allocator_backend() != "native":
        pytest.skip("another allocator than torch's own is used")
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        pytest.skip("the caching allocator is disabled")
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()


def held() -> int:
    """Bytes that were requested from torch's allocator and not freed. `memory_allocated` would round them up."""
    return int(torch.cuda.memory_stats()["requested_bytes.all.current"])


def test_a_call_keeps_only_the_memory_of_its_results(allocator: None) -> None:
    for shape in ((64, 1024), (2, 40000), (0, 64)):
        for call in problems(*shape):
            before, allocated = held(), torch.cuda.memory_allocated()
            found = call.eager()
            assert held() - before == sum(t.nbytes for t in tensors(found)), call.name
            del found
            assert (held(), torch.cuda.memory_allocated()) == (before, allocated), call.name


def test_a_thousand_calls_do_not_grow_memory(allocator: None) -> None:
    def outside() -> int:
        """Bytes in use on the GPU that torch did not reserve."""
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    calls = problems(256, 1024) + problems(2, 40000)
    for call in 2 * calls:  # loads the kernels
        call.eager()
    torch.cuda.synchronize()
    reserved, others = torch.cuda.memory_reserved(), outside()
    for i in range(1000):
        calls[i % len(calls)].eager()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == reserved
    assert outside() - others < 32 * 2**20  # other programs may use the GPU as well


def require_memory(size: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free GPU memory, has {free / GIB:.1f}")


def ends(t: Tensor) -> Tensor:
    """Some rows from the beginning, the middle and the end, or a short tensor as a whole."""
    if len(t) < 12:
        return t
    return torch.cat([t[:4], t[len(t) // 2 :][:4], t[-4:]])


@pytest.mark.slow
@pytest.mark.parametrize("k", [256, 4096, 4099, 40000])
def test_more_than_2_to_the_31_elements(k: int) -> None:
    require_memory(20 * GIB)
    x = torch.empty(2**31 // k + 9, k, dtype=torch.float16, device=GPU).normal_()
    x[-1, -1] = 1000.0  # determines the scale of the whole tensor
    assert x.numel() > 2**31
    ones = torch.ones(k, device=GPU)
    for granularity in cases.SCHEMES[:2]:
        for call in (
            Call("quantize", (x,), {"granularity": granularity}),
            Call("rms_norm_quantize", (x, ones, EPS), {"granularity": granularity, "residual": x}),
            Call("layer_norm_quantize", (x, None, None, EPS), {"granularity": granularity}),
            Call("act_quantize", (x, "silu"), {"granularity": granularity, "gate": x}),
        ):
            found = [ends(t) for t in call.eager()]
            assert_like_the_cpu(tree_map(lambda t: ends(t) if t is x else t, call), found)


@pytest.mark.slow
@pytest.mark.parametrize("k", [64, 67, 40000])
def test_rows_more_than_2_to_the_31_elements_apart(k: int) -> None:
    require_memory(12 * GIB)
    stride = 2**31 + 64
    x = torch.empty(stride + k, dtype=torch.float16, device=GPU).as_strided((2, k), (stride, 1))
    x.copy_(cases.activations(2, k))
    weight = move(cases.inverse_smooth(k), GPU)
    for call in (
        Call("quantize", (x,), {}),
        Call("rms_norm_quantize", (x, weight, EPS), {"residual": x}),
        Call("layer_norm_quantize", (x, None, weight, EPS), {"granularity": "tensor"}),
        Call("act_quantize", (x, "gelu"), {"gate": x}),
    ):
        assert_like_the_cpu(call, call.eager())
