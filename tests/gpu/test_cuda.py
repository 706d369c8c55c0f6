"""The CUDA kernels as PyTorch ops: results, tracers, autograd, refusals and devices. Also the library without a GPU.

tests/kernels (`--backend cuda`) tests the results for every type, shape and row. test_cuda_graphs.py tests streams,
CUDA graphs and memory.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

from smoothquant_kernels import ops
from smoothquant_kernels.backends import cuda
from tests.support import backends, cases
from tests.support.compare import assert_all_bitwise_equal
from tests.support.gpu import GPU, assert_like_the_cpu, move, problems, tensors
from tests.support.op_calls import CALLS, Call, each_call
from tools.build.plan import ROOT


@pytest.fixture
def gpu() -> None:
    backends.require_gpu()


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that needs a GPU and the CUDA library."""
    return pytest.mark.cuda(pytest.mark.usefixtures("gpu")(test))  # type: ignore[no-any-return]


# --- results ----------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 5120), (33, 1000), (700, 264), (2, 40000)], ids=str)
def test_results_equal_those_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for call in problems(*shape, dtype):
        found = call.eager()
        assert all(t.is_cuda for t in tensors(found))
        assert_like_the_cpu(call, found)


@on_gpu
def test_results_are_reproducible() -> None:
    for call in problems(3000, 1096, torch.bfloat16):
        first = tensors(call.eager())
        for _ in range(50):
            again = tensors(call.eager())
            assert all(map(torch.equal, again, first)), call.name


# --- tracers and autograd -----------------------------------------------------------------------------


@on_gpu
@each_call
def test_opcheck(call: Call) -> None:
    call = move(call, GPU)
    result = torch.library.opcheck(call.overload, call.args, call.kwargs)
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


@on_gpu
@each_call
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_gives_the_same_bits(call: Call, backend: str) -> None:
    call = move(call, GPU)
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend=backend)
    assert_all_bitwise_equal(compiled(*call.args, **call.kwargs), call.eager())


def chain(x: Tensor, other: Tensor, weight: Tensor, static: Tensor) -> tuple[Tensor, ...]:
    """Every producer, with PyTorch operations between them that are exact or round once."""
    n_q, n_scale, total = ops.rms_norm_quantize(x, weight, 1e-5, residual=other * 2)
    l_q, l_scale = ops.layer_norm_quantize(
        total, weight, None, 1e-5, granularity="tensor", k_multiple=16
    )
    a_q, a_scale = ops.act_quantize(total, "silu", gate=-x, inv_smooth=weight, scale=static)
    q, scale = ops.quantize(total[:, ::2], k_multiple=16)
    return n_q.float() * n_scale[:, None], total, l_q.float() * l_scale, a_q, a_scale, q, scale


def chain_arguments(m: int, seed: int = 0) -> tuple[Tensor, ...]:
    x, other = (cases.activations(m, 72, torch.bfloat16, seed + i) for i in (0, 1))
    return move((x, other, cases.inverse_smooth(72, seed), torch.tensor([0.02])), GPU)


def why_inductor_cannot_run() -> str:
    """Inductor needs Triton for code on a GPU, and Triton compiles a small C module."""
    if importlib.util.find_spec("triton") is None:
        return "inductor needs Triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang", "cc")):
        return "Triton needs a C compiler"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else "Triton needs Python's headers"


needs_inductor = pytest.mark.skipif(
    bool(why_inductor_cannot_run()), reason=why_inductor_cannot_run()
)


@on_gpu
@needs_inductor
def test_inductor_gives_the_same_bits() -> None:
    calls = [move(call, GPU) for call in CALLS]
    torch._dynamo.reset()

    def every() -> list[Any]:
        return [call.function(*call.args, **call.kwargs) for call in calls]

    for call, found in zip(calls, torch.compile(every, fullgraph=True)(), strict=True):
        assert_all_bitwise_equal(found, call.eager(), call.name)


@on_gpu
@needs_inductor
@pytest.mark.parametrize("sizes", [(33, 33, 33, 33), (7, 7, 7, 11, 11, 11, 33, 2, 7)], ids=str)
def test_reduce_overhead_gives_the_same_bits(sizes: tuple[int, ...]) -> None:
    """Inductor in CUDA graphs: the first run warms up, the second captures and later ones replay."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        chain, fullgraph=True, mode="reduce-overhead", dynamic=len(set(sizes)) > 1
    )
    for seed, m in enumerate(sizes):
        arguments = chain_arguments(m, seed)
        torch.compiler.cudagraph_mark_step_begin()
        found = tuple(t.clone() for t in compiled(*arguments))  # the next run overwrites them
        assert_all_bitwise_equal(found, chain(*arguments), f"run {seed}, M = {m}")
    assert counters["inductor"]["cudagraph_skips"] == 0


@on_gpu
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_inductor)]
)
def test_one_graph_serves_every_number_of_tokens(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(chain, fullgraph=True, backend=counter, dynamic=True)
    for m in (7, 11, 33, 2):
        arguments = chain_arguments(m)
        assert_all_bitwise_equal(compiled(*arguments), chain(*arguments), f"M = {m}")
    assert counter.frame_count == 1
    for m in (0, 1):
        arguments = chain_arguments(m)
        assert_all_bitwise_equal(compiled(*arguments), chain(*arguments), f"M = {m}")


@on_gpu
@each_call
def test_inputs_that_require_gradients_give_the_same_results(call: Call) -> None:
    def leaf(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.clone().requires_grad_() if floating else value

    call = move(call, GPU)
    expected = call.eager()
    tracked = tree_map(leaf, call)
    found = tracked.eager()
    assert_all_bitwise_equal(found, expected)
    for result in (t for t in tensors(found) if t.is_floating_point()):
        # The ops have no gradient: backward warns, and no input gets a part of one.
        assert result.requires_grad
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            result.sum().backward(retain_graph=True)
    assert all(t.grad is None or not t.grad.any() for t in tensors(tracked))
    with torch.no_grad():
        found = tracked.eager()
    assert_all_bitwise_equal(found, expected)
    assert not any(t.requires_grad for t in tensors(found))


@on_gpu
@each_call
def test_inference_mode(call: Call) -> None:
    call = move(call, GPU)
    expected = call.eager()
    with torch.inference_mode():
        found = call.eager()
        again = move(call, GPU).eager()  # here the inputs are inference tensors as well
    assert all(t.is_inference() for t in tensors(found))
    assert_all_bitwise_equal(found, expected)
    assert_all_bitwise_equal(again, expected)


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("op", ops.OPS)
def test_an_op_without_a_kernel_says_so(op: str) -> None:
    """If the whole library is missing, every op raises this error."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if cuda.has_cuda_kernel(op):
        pytest.skip(f"{op} has a CUDA kernel")
    call = move(next(call for call in CALLS if call.name == op), GPU)
    major, minor = torch.cuda.get_device_capability()
    where = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
    with pytest.raises(RuntimeError, match=re.escape(f"no CUDA kernel for {op} on {where}: ")):
        call.eager()


@on_gpu
def test_a_row_that_is_too_long_is_refused() -> None:
    x = torch.empty(0, 2**30 + 1, dtype=torch.float16, device=GPU)  # no rows: nothing is allocated
    with pytest.raises(
        RuntimeError, match=r"quantize: no tile covers this shape; x \[0, 1073741825\]"
    ):
        ops.quantize(x)


def arguments_of(call: Call) -> dict[str, Any]:
    names = [argument.name for argument in call.overload._schema.arguments]
    return {**dict(zip(names, call.args, strict=False)), **call.kwargs}


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@on_gpu
@pytest.mark.parametrize("elsewhere", ["cpu", pytest.param("cuda:1", marks=two_gpus)])
def test_tensors_on_two_devices_are_refused(elsewhere: str) -> None:
    sentence = r"is on (another device|.*, but the activation is).*; move them to one device\."
    for call in problems(5, 64):
        given = arguments_of(call)
        first = next(iter(given))
        for name, value in given.items():
            if not isinstance(value, Tensor) or len(tensors(given)) == 1:
                continue
            named = r"\w+" if name == first else name
            with pytest.raises(
                (RuntimeError, ValueError), match=f"^{call.name}: {named} {sentence}"
            ):
                call.function(**{**given, name: value.to(elsewhere)})


@on_gpu
@two_gpus
def test_tensors_on_another_than_the_current_gpu() -> None:
    there = torch.device(GPU, 1)
    for shape in ((33, 1024), (2, 40000), (0, 64)):
        for call in problems(*shape):
            call = move(call, str(there))
            with torch.cuda.device(0):
                found = call.eager()
                assert torch.cuda.current_device() == 0
            assert {t.device for t in tensors(found)} == {there}
            assert_like_the_cpu(call, found)


# --- the built library -------------------------------------------------------------------------------------


@pytest.mark.cuda_build
@pytest.mark.parametrize("op", ops.OPS)
def test_the_library_has_kernels_of(op: str) -> None:
    backends.require_library()
    assert cuda.has_cuda_kernel(op)


@pytest.mark.cuda_build
def test_the_librarys_table_is_that_of_the_sources() -> None:
    backends.require_library()
    rows = cuda.dispatch_tables()["quantize"]
    source = ROOT / "csrc" / "quantize" / "table.h"
    rules = source.read_text().partition("kPathRules[] = {")[2].partition("\n};")[0]
    named = [name.lower() for name in re.findall(r"\{QuantizePath::k(\w+),", rules)]
    assert [row["path"] for row in rows] == named
    assert set(named) == {"warp", "block", "wide", "long", "element", "cluster"}
    text = re.sub(r'",\s+"', '", "', re.sub(r'"\s+"', "", rules))  # each rule's strings in one line
    for row in rows:
        assert row["when"].strip() and row["why"].strip()
        assert f'"{row["when"]}", "{row["why"]}"' in text
