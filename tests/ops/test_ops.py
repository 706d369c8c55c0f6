"""The ops as PyTorch sees them: schemas, fake kernels, tracers and refusals. tests/backends tests their results."""

from __future__ import annotations

import inspect
import itertools
import re
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_map

from smoothquant_kernels import W8A8Linear, ops, reference
from tests.support import cases
from tests.support.compare import assert_all_bitwise_equal

M, N, K = 6, 5, 18


class Call(NamedTuple):
    """One call of a public function of `ops`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.name)  # type: ignore[no-any-return]

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.smoothquant_kernels, self.name).default  # type: ignore[no-any-return]

    def eager(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def calls(m: int = M) -> list[Call]:
    """Calls of every op with all of its arguments, and with each kind of scale and shape."""
    x, other = (cases.activations(m, K, torch.bfloat16, seed) for seed in (0, 1))
    inv_smooth, weight = cases.inverse_smooth(K), cases.inverse_smooth(K, 3)
    static = torch.tensor([0.02])
    smooth = {"inv_smooth": inv_smooth}
    half = {"inv_smooth": inv_smooth[: K // 2]}
    gemm = cases.gemm_operands(m, N, K)
    scalar = cases.gemm_operands(m, N, K, per_token=False, per_channel=False)
    every: dict[str, Any] = {"bias": gemm.bias, "residual": gemm.residual}
    return [
        Call("quantize", (x,), {}),
        Call("quantize", (x,), {**smooth, "granularity": "tensor"}),
        Call(
            "quantize", (x,), {**smooth, "scale": static, "granularity": "tensor", "k_multiple": 16}
        ),
        Call("rms_norm_quantize", (x, weight, 1e-5), {}),
        Call(
            "rms_norm_quantize",
            (x, weight, 1e-5),
            {"residual": other, **smooth, "scale": static, "k_multiple": 7},
        ),
        Call("layer_norm_quantize", (x, None, None, 1e-5), {}),
        Call(
            "layer_norm_quantize",
            (x, weight, inv_smooth, 1e-5),
            {"residual": other, **smooth, "granularity": "tensor", "k_multiple": 16},
        ),
        Call("act_quantize", (x, "relu"), {}),
        Call("act_quantize", (x, "silu"), {"gate": other, **smooth, "k_multiple": K // 2}),
        Call("act_quantize", (x, "silu"), {"gate": other, **smooth, "granularity": "tensor"}),
        Call("act_quantize", (x, "gelu_tanh_mul"), {**half, "scale": static, "k_multiple": 16}),
        Call("gemm_s8", gemm[:4], {"out_dtype": torch.float16}),
        Call("gemm_s8", gemm[:4], {**every, "out_dtype": torch.bfloat16}),
        Call("gemm_s8", scalar[:4], {**every, "out_dtype": torch.float32}),
        Call("gemm_s8_requant", (*gemm[:4], static), {}),
        Call("gemm_s8_requant", (*gemm[:4], static), {"bias": gemm.bias, "relu": True}),
        Call("linear_s8", (x, gemm.w_q, gemm.w_scale), {"granularity": "tensor"}),
        Call(
            "linear_s8", (x, gemm.w_q, gemm.w_scale), {"bias": gemm.bias, **smooth, "scale": static}
        ),
    ]


CALLS = calls()
IDS = [f"{call.name}-{i}" for i, call in enumerate(CALLS)]
each_call = pytest.mark.parametrize("call", CALLS, ids=IDS)


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
    for parameter, argument in zip(public, schema, strict=True):
        assert (parameter.kind is parameter.KEYWORD_ONLY) == argument.kwarg_only
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

X = cases.activations(4, 6)
G = cases.gemm_operands(4, 3, 6)
F32 = torch.float32


def _quantize(**changes: Any) -> Call:
    return Call("quantize", (changes.pop("x", X),), changes)


def _rms(**changes: Any) -> Call:
    x, weight = changes.pop("x", X), changes.pop("weight", torch.ones(6))
    return Call("rms_norm_quantize", (x, weight, 1e-5), changes)


def _layer_norm(**changes: Any) -> Call:
    weight, bias = changes.pop("weight", torch.ones(6)), changes.pop("bias", None)
    return Call("layer_norm_quantize", (X, weight, bias, 1e-5), changes)


def _act(kind: str = "silu", x: Tensor = X, **changes: Any) -> Call:
    return Call("act_quantize", (x, kind), changes)


def _gemm(**changes: Any) -> Call:
    operands = [changes.pop(name, getattr(G, name)) for name in GEMM_NAMES]
    return Call("gemm_s8", tuple(operands), {"out_dtype": F32, **changes})


def _requant(**changes: Any) -> Call:
    operands = [changes.pop(name, getattr(G, name)) for name in GEMM_NAMES]
    scale = changes.pop("out_scale", torch.ones(1))
    return Call("gemm_s8_requant", (*operands, scale), changes)


def _linear(**changes: Any) -> Call:
    operands = [changes.pop(name, default) for name, default in (("x", X), ("w_q", G.w_q))]
    return Call("linear_s8", (*operands, changes.pop("w_scale", G.w_scale)), changes)


GEMM_NAMES = ("x_q", "w_q", "x_scale", "w_scale")
FLOAT_NAMES = "float16 or bfloat16 or float32"
LONG = torch.zeros(1, reference.MAX_K + 1, dtype=torch.int8)

REFUSED: list[tuple[Call, type[Exception], str]] = [
    (_quantize(x=X.double()), TypeError, f"quantize: x must be {FLOAT_NAMES}, got float64."),
    (_quantize(x=G.x_q), TypeError, f"quantize: x must be {FLOAT_NAMES}, got int8."),
    (_quantize(x=torch.tensor(1.0)), ValueError, "shape [..., K] with K >= 1, got ()."),
    (_quantize(x=X[:, :0]), ValueError, "shape [..., K] with K >= 1, got (4, 0)."),
    (_quantize(inv_smooth=torch.ones(5)), ValueError, "inv_smooth must have shape [6] (one factor"),
    (_quantize(inv_smooth=torch.ones(1, 6)), ValueError, "channel of x), got (1, 6)."),
    (_quantize(inv_smooth=torch.ones(6).half()), TypeError, "be float32, got float16. Scales and"),
    (_quantize(scale=torch.ones(4)), ValueError, "scale must have shape [1] (a static scale"),
    (_quantize(scale=torch.ones(1).double()), TypeError, "scale must be float32, got float64."),
    (_quantize(granularity="row"), ValueError, "must be 'token' or 'tensor', got 'row'; give"),
    (_quantize(k_multiple=0), ValueError, "quantize: k_multiple must be at least 1, got 0."),
    (_rms(k_multiple=0), ValueError, "k_multiple must be at least 1, got 0."),
    (_layer_norm(k_multiple=-1), ValueError, "k_multiple must be at least 1, got -1."),
    (_act(k_multiple=-16), ValueError, "k_multiple must be at least 1, got -16."),
    (_rms(x=X.double()), TypeError, f"rms_norm_quantize: x must be {FLOAT_NAMES}, got float64."),
    (_rms(weight=torch.ones(5)), ValueError, "weight must have shape [6], got (5,)."),
    (_rms(weight=torch.ones(6).int()), TypeError, f"weight must be {FLOAT_NAMES}, got int32."),
    (_rms(residual=X.half()), TypeError, "residual must be float32, got float16."),
    (_rms(residual=X[:2]), ValueError, "residual must have x's shape (4, 6), got (2, 6)."),
    (_layer_norm(bias=torch.ones(6, 1)), ValueError, "bias must have shape [6], got (6, 1)."),
    (_layer_norm(weight=torch.ones(1)), ValueError, "layer_norm_quantize: weight must have shape"),
    (_layer_norm(granularity=""), ValueError, "layer_norm_quantize: granularity must be"),
    (_act(kind="swish"), ValueError, "kind must be one of relu, gelu, gelu_tanh, silu, silu_mul"),
    (_act(gate=X[:1]), ValueError, "act_quantize: gate must have x's shape (4, 6), got (1, 6)."),
    (_act(gate=X.half()), TypeError, "act_quantize: gate must be float32, got float16."),
    (_act(kind="silu_mul", gate=X), ValueError, "reads gate and up from one x [..., 2K]; drop"),
    (_act(kind="silu_mul", x=X[:, :5]), ValueError, "needs x [..., 2K], got an odd size: (4, 5)."),
    (_act(kind="gelu_mul", inv_smooth=torch.ones(6)), ValueError, "inv_smooth must have shape [3]"),
    (_gemm(x_q=X), TypeError, "gemm_s8: x_q must be int8, got float32. Quantize it first"),
    (_gemm(w_q=G.w_q.float()), TypeError, "gemm_s8: w_q must be int8, got float32. Quantize"),
    (_gemm(w_q=G.w_q.t()), ValueError, "the same K and N >= 1, got (4, 6) and (6, 3)."),
    (_gemm(w_q=G.w_q[0]), ValueError, "w_q [N, K] with the same K and N >= 1, got (4, 6) and (6,)"),
    (_gemm(w_q=G.w_q[:0]), ValueError, "N >= 1, got (4, 6) and (0, 6)."),
    (_gemm(x_q=G.x_q[:, :0], w_q=G.w_q[:, :0]), ValueError, "K must be in [1, 131071] so that"),
    (_gemm(x_q=LONG, w_q=LONG), ValueError, "cannot overflow, got 131072; split the layer over K."),
    (_gemm(x_scale=torch.ones(3)), ValueError, "x_scale must have shape [4] or [1] (per token or"),
    (_gemm(x_scale=torch.ones(4, 1)), ValueError, "per tensor), got (4, 1)."),
    (_gemm(x_scale=torch.ones(4).half()), TypeError, "x_scale must be float32, got float16."),
    (_gemm(w_scale=torch.ones(2)), ValueError, "w_scale must have shape [3] or [1] (per output"),
    (_gemm(bias=torch.ones(4)), ValueError, "gemm_s8: bias must have shape [3], got (4,)."),
    (_gemm(bias=torch.ones(3).int()), TypeError, f"bias must be {FLOAT_NAMES}, got int32."),
    (_gemm(residual=torch.ones(3)), ValueError, "residual must have shape (4, 3), got (3,)."),
    (_gemm(residual=G.x_q[:, :3]), TypeError, f"residual must be {FLOAT_NAMES}, got int8."),
    (_gemm(out_dtype=torch.int8), TypeError, "out_dtype must be float16, bfloat16 or float32, got"),
    (_requant(w_scale=torch.ones(2)), ValueError, "gemm_s8_requant: w_scale must have shape [3]"),
    (_requant(out_scale=torch.ones(3)), ValueError, "out_scale must have shape [1] (the scale of"),
    (_requant(out_scale=torch.ones(1).half()), TypeError, "out_scale must be float32, got float16"),
    (_linear(x=G.x_q), TypeError, f"linear_s8: x must be {FLOAT_NAMES}, got int8."),
    (_linear(w_q=G.w_q[:, :5]), ValueError, "the same K and N >= 1, got (4, 6) and (3, 5)."),
    (_linear(inv_smooth=torch.ones(3)), ValueError, "inv_smooth must have shape [6] (one factor"),
    (_linear(granularity="row"), ValueError, "must be 'token' or 'tensor', got 'row'; give"),
]


@pytest.mark.parametrize("way", ["direct", "dispatcher", "meta"])
@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    REFUSED,
    ids=[f"{c.name}-{i}" for i, (c, *_) in enumerate(REFUSED)],
)
def test_refusals(call: Call, error: type[Exception], sentence: str, way: str) -> None:
    args, kwargs = (call.args, call.kwargs) if way != "meta" else to_meta((call.args, call.kwargs))
    function = call.overload if way == "dispatcher" else call.function
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        function(*args, **kwargs)
    assert str(caught.value).startswith(f"{call.name}: ")


@pytest.mark.parametrize("name", ["w_q", "x_scale", "w_scale", "bias", "residual"])
def test_operands_on_two_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is on meta, but the activation is on cpu; move"):
        _gemm(**{name: getattr(G, name).to("meta")}).eager()


@pytest.mark.parametrize("name", ["inv_smooth", "scale", "residual", "weight"])
def test_norm_arguments_on_two_devices_are_refused(name: str) -> None:
    value = {"residual": X, "scale": torch.ones(1)}.get(name, torch.ones(6)).to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, but the activation is on cpu"):
        _rms(**{name: value}).eager()
