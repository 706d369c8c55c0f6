"""The ops with an int8 cache as PyTorch sees them: schemas, fake kernels, compilers and refusals of numbers."""

from __future__ import annotations

import inspect
import re
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from smoothquant_kernels import ops
from smoothquant_kernels.ops import registry
from tests.support import cache_calls
from tests.support.compare import assert_all_bitwise_equal, assert_bitwise_equal
from tests.support.op_calls import Call

WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")
APPENDS, ATTENTIONS = cache_calls.appends(), cache_calls.attentions()
each = pytest.mark.parametrize(
    "call", [*APPENDS, *ATTENTIONS], ids=lambda call: f"{call.name}-{len(call.kwargs)}"
)


def copied(call: Call) -> Call:
    args, kwargs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, call[1:])
    return Call(call.name, args, kwargs)


def outcome(call: Call, function: Any = None) -> list[Tensor]:
    """What a call of copies returns, or else writes."""
    own = copied(call)
    y = (function or own.function)(*own.args, **own.kwargs)
    if y is not None:
        return [y]
    names = list(inspect.signature(own.function).parameters)
    given = {**dict(zip(names, own.args, strict=False)), **own.kwargs}
    return [given[name] for name in WRITTEN if given.get(name) is not None]


@each
def test_opcheck(call: Call) -> None:
    own = copied(call)
    result = torch.library.opcheck(call.overload, own.args, own.kwargs)
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


@each
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_gives_the_same_bits(call: Call, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend=backend)
    assert_all_bitwise_equal(outcome(call, compiled), outcome(call))


@each
def test_a_direct_call_equals_the_dispatcher(call: Call) -> None:
    assert_all_bitwise_equal(outcome(call, call.overload), outcome(call))


def step(q: Tensor, k: Tensor, k_cache: Tensor, v_cache: Tensor, scales: Tensor, at: Tensor) -> Any:
    """A decoding step: the written cache is read in the same graph."""
    halves = {"k_scale": scales[0], "v_scale": scales[1]}
    ops.kv_append(k, k * 2, k_cache, v_cache, positions=at, **halves, rotation=4)
    return ops.decode_attention_s8(q, k_cache, v_cache, 0.25, lengths=at + 2, **halves, rotation=4)


def step_arguments() -> tuple[Tensor, ...]:
    (q, k_cache, v_cache, _), (k, *_) = copied(ATTENTIONS[0]).args, APPENDS[0].args
    scales = torch.rand(2, *k_cache.shape[:3], generator=torch.Generator().manual_seed(7))
    return q, k, k_cache, v_cache, scales, torch.tensor([5, 0], dtype=torch.int32)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.compiler])]
)
def test_a_graph_writes_and_then_reads(backend: str) -> None:
    """torch.compile makes a writing op functional, and must keep the order of the two."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    eager, traced = step_arguments(), step_arguments()
    expected = step(*eager)
    found = torch.compile(step, fullgraph=True, backend=backend)(*traced)
    assert_bitwise_equal(found, expected)
    for a, b in zip(traced, eager, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("call", ATTENTIONS, ids=range(len(ATTENTIONS)))
def test_meta_tensors_have_the_real_shapes(call: Call) -> None:
    real = call.eager()
    args, kwargs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, call[1:])
    fake = call.function(*args, **kwargs)
    assert fake.is_meta and real.shape == fake.shape and real.dtype == fake.dtype
    assert real.stride() == fake.stride()


@pytest.mark.parametrize("call", APPENDS, ids=range(len(APPENDS)))
def test_a_refused_call_writes_nothing(call: Call) -> None:
    own = copied(call)
    own.kwargs["positions"] = torch.tensor([0, -1], dtype=torch.int32)
    before = copied(own)
    with pytest.raises(ValueError, match="sequence 1 writes the positions -1"):
        own.eager()
    assert_all_bitwise_equal(list(own.args), list(before.args))


REFUSED = [*cache_calls.REFUSED_VALUES, *cache_calls.REFUSED_STRIDES]


@pytest.mark.parametrize("way", ["direct", "dispatcher"])
@pytest.mark.parametrize(
    ("call", "sentence"), REFUSED, ids=[f"{c.name}-{i}" for i, (c, _) in enumerate(REFUSED)]
)
def test_numbers_and_strides_that_do_not_fit_are_refused(
    call: Call, sentence: str, way: str
) -> None:
    """On a CPU. In C++ and in Python with the same sentence."""
    function = call.overload if way == "dispatcher" else call.function
    in_cpp = way == "dispatcher" and call.name in registry.COMPILED
    with pytest.raises(RuntimeError if in_cpp else ValueError, match=re.escape(sentence)):
        function(*call.args, **call.kwargs)


@pytest.mark.parametrize("python", [False, True])
def test_a_table_without_entries_holds_no_token(python: bool) -> None:
    """An empty tensor has no address, as if no table had been given."""
    call = next(c for c in ATTENTIONS if "block_table" in c.kwargs and c.kwargs.get("mask") is None)
    own = copied(call)
    q = own.args[0]
    own.kwargs.pop("lengths", None)
    own.kwargs["block_table"] = torch.zeros(len(q), 0, dtype=torch.int32)
    parameters = list(inspect.signature(call.function).parameters.values())[len(own.args) :]
    if python:
        rest = [own.kwargs.get(p.name, p.default) for p in parameters]
        y = registry.cpu(call.name)(*own.args, *rest)
    else:
        y = call.function(*own.args, **own.kwargs)
    assert_bitwise_equal(y, torch.zeros_like(q), "an empty cache")
