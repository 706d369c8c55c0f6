"""The ops as PyTorch sees them: schemas, fake kernels, tracers and refusals. tests/backends tests their results."""

from __future__ import annotations

import inspect
import itertools
import re
import shutil
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

from smoothquant_kernels import W8A8Linear, ops
from smoothquant_kernels.ops import registry
from tests.support import cases, op_refusals
from tests.support.compare import assert_all_bitwise_equal
from tests.support.op_calls import Call, K, M, N, each_call


@each_call
def test_opcheck(call: Call) -> None:
    result = torch.library.opcheck(call.overload, call.args, call.kwargs)
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def test_opcheck_of_the_op_that_forces_a_tile() -> None:
    gemm = cases.gemm_operands(M, N, K)
    op = torch.ops.smoothquant_kernels._gemm_s8_tile.default
    for forced in ({}, {"tile": 2, "splits": 3}):
        options = {"bias": gemm.bias, "out_dtype": torch.float16, **forced}
        torch.library.opcheck(op, gemm[:4], options)
        expected = ops.gemm_s8(*gemm[:4], bias=gemm.bias)
        assert_all_bitwise_equal(op(*gemm[:4], **options), expected)


@each_call
def test_a_direct_call_equals_the_dispatcher(call: Call) -> None:
    dispatched = call.overload(*call.args, **call.kwargs)
    found = call.eager()
    if "norm" in call.name and "residual" not in call.kwargs:
        assert dispatched[2].numel() == 0
        dispatched = dispatched[:2]
    assert_all_bitwise_equal(found, dispatched)


@each_call
def test_the_schema_has_the_public_signature(call: Call) -> None:
    public = list(inspect.signature(call.function).parameters.values())
    schema = call.overload._schema.arguments
    assert [p.name for p in public] == [a.name for a in schema]
    by_name = False
    for parameter, argument in zip(public, schema, strict=True):
        # The op takes by position all that comes before an argument without a default in the schema.
        by_name |= isinstance(parameter.default, torch.dtype)
        assert argument.kwarg_only == by_name
        if argument.has_default_value():
            assert parameter.default == argument.default_value


def to_meta(value: Any) -> Any:
    return tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, value)


@each_call
def test_meta_tensors_have_the_real_shapes(call: Call) -> None:
    real = call.eager()
    fake = call.function(*to_meta(call.args), **to_meta(call.kwargs))
    for r, f in zip(*(v if isinstance(v, tuple) else (v,) for v in (real, fake)), strict=True):
        assert f.is_meta and r.shape == f.shape and r.dtype == f.dtype and r.stride() == f.stride()


@each_call
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_gives_the_same_bits(call: Call, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend=backend)
    assert_all_bitwise_equal(compiled(*call.args, **call.kwargs), call.eager())


def whole_layer(x: Tensor, w_q: Tensor, w_scale: Tensor, inv_smooth: Tensor) -> Tensor:
    """Producers and GEMMs, with PyTorch operations between them."""
    x_q, x_scale, total = ops.rms_norm_quantize(
        x, inv_smooth, 1e-5, residual=x * 2, inv_smooth=inv_smooth
    )
    y = ops.gemm_s8(x_q, w_q, x_scale, w_scale, out_dtype=torch.float32)
    y_q, y_scale = ops.act_quantize(y, "silu", gate=y + 1)
    return ops.gemm_s8(y_q, w_q.t(), y_scale, w_scale[:1], residual=total, out_dtype=x.dtype)


def layer_arguments(m: int) -> tuple[Tensor, ...]:
    w_q = cases.random_int8(N, K)
    return cases.activations(m, K), w_q, torch.full((N,), 0.01), cases.inverse_smooth(K)


def test_one_graph_serves_every_number_of_tokens() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole_layer, fullgraph=True, backend=counter, dynamic=True)
    for m in (7, 11, 33, 2):  # no other dimension is 7: dynamo would treat the two as equal
        arguments = layer_arguments(m)
        assert_all_bitwise_equal(compiled(*arguments), whole_layer(*arguments), f"M = {m}")
    assert counter.frame_count == 1
    for m in (0, 1):
        arguments = layer_arguments(m)
        assert_all_bitwise_equal(compiled(*arguments), whole_layer(*arguments), f"M = {m}")


def test_one_graph_serves_every_number_of_padded_channels() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def padded(x: Tensor) -> Any:
        return ops.quantize(x, k_multiple=16)

    compiled = torch.compile(padded, fullgraph=True, backend=counter, dynamic=True)
    for k in (18, 16, 33, 7):
        x = cases.activations(M, k)
        assert_all_bitwise_equal(compiled(x), padded(x), f"K = {k}")
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.compiler
def test_inductor() -> None:
    torch._dynamo.reset()
    layer = W8A8Linear.from_linear(nn.Linear(K, N), smooth=cases.inverse_smooth(K))
    x = cases.activations(4, K)
    with torch.no_grad():
        assert_all_bitwise_equal(torch.compile(layer, fullgraph=True)(x), layer(x))


class AsModule(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Tensor) -> Any:
        rest = self.call.args[len(args) :]
        return self.call.function(*args, *rest, **self.call.kwargs)


@each_call
def test_export_keeps_the_op(call: Call) -> None:
    inputs = tuple(itertools.takewhile(lambda a: isinstance(a, Tensor), call.args))
    program = torch.export.export(AsModule(call), inputs)
    assert call.overload in [node.target for node in program.graph.nodes]
    found = program.module()(*inputs)
    assert_all_bitwise_equal(found, call.eager())


class WholeLayer(nn.Module):
    def forward(self, x: Tensor, w_q: Tensor, w_scale: Tensor, inv_smooth: Tensor) -> Tensor:
        return whole_layer(x, w_q, w_scale, inv_smooth)


def test_export_with_a_dynamic_number_of_tokens() -> None:
    shapes = {"x": {0: torch.export.Dim("m")}, "w_q": None, "w_scale": None, "inv_smooth": None}
    program = torch.export.export(WholeLayer(), layer_arguments(5), dynamic_shapes=shapes)
    for m in (5, 2, 33):
        arguments = layer_arguments(m)
        assert_all_bitwise_equal(program.module()(*arguments), whole_layer(*arguments), f"M = {m}")


def test_tracers_of_plain_tensors_see_the_ops() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments = layer_arguments(3)
    graph = make_fx(whole_layer)(*arguments)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.smoothquant_kernels.gemm_s8.default) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated but still in use
        scripted = torch.jit.trace(lambda x: ops.quantize(x), (torch.ones(3, 4),))
    broken = cases.activations(3, 4)
    broken[1, 2] = torch.nan  # the trace must not contain a branch on the data
    assert_all_bitwise_equal(scripted(broken), ops.quantize(broken))


@each_call
def test_inputs_that_require_gradients_give_the_same_results(call: Call) -> None:
    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.clone().requires_grad_()
        return value

    expected = call.eager()
    args, kwargs = tree_map(leaf, call.args), tree_map(leaf, call.kwargs)
    found = call.function(*args, **kwargs)
    assert_all_bitwise_equal(found, expected)
    with torch.no_grad():
        assert_all_bitwise_equal(call.function(*args, **kwargs), expected)
    float_results = [
        t for t in (found if isinstance(found, tuple) else (found,)) if t.is_floating_point()
    ]
    for result in float_results:
        # The ops have no gradient: backward warns, and no input gets a part of one.
        assert result.requires_grad
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            result.sum().backward(retain_graph=True)
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    assert all(t.grad is None or not t.grad.any() for t in leaves)


# --- refusals: the error names the wrong and the allowed values ---------------------------------------


@pytest.mark.parametrize("way", ["direct", "dispatcher", "meta"])
@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    op_refusals.REFUSED,
    ids=[f"{c.name}-{i}" for i, (c, *_) in enumerate(op_refusals.REFUSED)],
)
def test_refusals(call: Call, error: type[Exception], sentence: str, way: str) -> None:
    args, kwargs = (call.args, call.kwargs) if way != "meta" else to_meta((call.args, call.kwargs))
    function = call.overload if way == "dispatcher" else call.function
    if way == "dispatcher" and call.name in registry.COMPILED:
        error = RuntimeError  # all that C++ can throw; the public function turns it into the right exception
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        function(*args, **kwargs)
    assert str(caught.value).startswith(f"{call.name}: ")


@pytest.mark.parametrize("name", ["w_q", "x_scale", "w_scale", "bias", "residual"])
def test_operands_on_two_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is on meta, but the activation is on cpu; move"):
        op_refusals.gemm(**{name: getattr(op_refusals.G, name).to("meta")}).eager()


@pytest.mark.parametrize("name", ["inv_smooth", "scale", "residual", "weight"])
def test_norm_arguments_on_two_devices_are_refused(name: str) -> None:
    value = {"residual": op_refusals.X, "scale": torch.ones(1)}.get(name, torch.ones(6)).to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, but the activation is on cpu"):
        op_refusals.rms_norm(**{name: value}).eager()
