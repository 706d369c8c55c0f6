"""`W8A8Experts` against linears of each expert, and what it reads of float experts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import SmoothQuantError, W8A8Experts, W8A8Linear, reference
from smoothquant_kernels.checkpoint.skeleton import make_module
from smoothquant_kernels.nn import kinds
from smoothquant_kernels.nn.experts.gates import Gate, find_gate
from smoothquant_kernels.nn.experts.inputs import Input
from smoothquant_kernels.nn.experts.represented import write_float
from smoothquant_kernels.nn.experts.source import FloatExperts, float_forward, read_experts
from tests.support.compare import assert_bitwise_equal
from tests.support.toy_experts import SortedExperts, ToyExperts, routing

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "transposed": {"transposed": True, "bias": True},
    "interleaved": {"transposed": True, "concatenated": False, "bias": True},
    "gelu": {"act_fn": F.gelu},
    "ungated": {"gated": False, "act_fn": F.relu},
    "squared": {"gated": False, "act_fn": lambda t: F.relu(t).square()},
    "bfloat16": {"dtype": torch.bfloat16, "bias": True},
    "one": {"count": 1, "hidden": 7, "inner": 5},
}
KINDS = {"gelu": "gelu_mul", "ungated": "relu", "squared": "relu_squared"}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def read(module: nn.Module) -> FloatExperts:
    found = read_experts(module)
    assert found is not None
    return found


def tokens(count: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(count, hidden, generator=g).to(dtype)


# --- float experts ----------------------------------------------------------------------------------------------------


@each_layout
def test_every_layout_is_read(layout: str) -> None:
    module = ToyExperts(**LAYOUTS[layout])
    found = read(module)
    assert found.gate == Gate(KINDS.get(layout, "silu_mul"))
    assert (found.count, found.hidden, found.inner) == (
        module.num_experts,
        module.hidden_dim,
        module.intermediate_dim,
    )
    x = tokens(9, found.hidden, found.first.dtype)
    index, weights = routing(9, found.count, min(2, found.count))
    with torch.no_grad():
        wanted = module(x, index, weights.to(x.dtype))
        got = float_forward(found, x, index, weights.to(x.dtype))
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)  # the order of bfloat16 sums


def test_sorted_experts_are_read() -> None:
    module = SortedExperts()
    found = read(module)
    assert not found.routed and found.transposed
    x = tokens(12, 16)
    with torch.no_grad():
        wanted = module(x)
    empty = torch.empty(0)
    torch.testing.assert_close(float_forward(found, x, empty, empty), wanted)


def test_other_modules_are_not() -> None:
    assert read_experts(nn.Linear(3, 4)) is None
    assert read_experts(nn.Conv1d(3, 4, 2)) is None
    normed = ToyExperts()
    normed.has_post_expert_norm = True
    assert read_experts(normed) is None
    assert read_experts(ToyExperts(act_fn=torch.sin)) is None
    double = ToyExperts(dtype=torch.float64)
    assert read_experts(double) is None


@pytest.mark.parametrize("lie", ["is_concatenated", "is_transposed"])
def test_a_wrong_layout_is_seen_by_running(lie: str) -> None:
    """Square matrices, so that shapes cannot tell."""

    class Lying(ToyExperts):
        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            truth = copy.copy(self)
            truth.__dict__[lie] = not getattr(self, lie)
            return ToyExperts.forward(truth, hidden_states, top_k_index, top_k_weights)

    assert (
        read_experts(Lying(hidden=16, inner=16, gated=lie != "is_transposed", act_fn=F.relu))
        is None
    )


def test_the_clamped_gate_is_told_by_its_numbers() -> None:
    exact = Gate("clamped_swiglu", 1.702, 7.0)
    assert find_gate(exact, gated=True, alpha=1.702, limit=7.0) == exact
    assert find_gate(exact, gated=True, alpha=1.702, limit=6.0) is None
    assert find_gate(exact, gated=True, alpha=None, limit=None) is None
    y = torch.tensor([[9.0, -9.0, 8.0, 0.5]])
    gate, up = torch.tensor([7.0, -9.0]), torch.tensor([7.0, 0.5])
    assert torch.equal(exact(y)[0], (up + 1) * (gate * torch.sigmoid(1.702 * gate)))


# --- int8 experts -----------------------------------------------------------------------------------------------------


def linear_of(w: Tensor, b: Tensor | None) -> nn.Linear:
    made = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, dtype=w.dtype)
    made.weight.data = w
    if b is not None:
        made.bias.data = b
    return made


def by_linears(
    experts: FloatExperts,
    first: Input,
    second: Input,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """One `W8A8Linear` for each product of each expert, one token at a time, and the sum in the order of choices."""

    def made(e: int, product: int, given: Input) -> W8A8Linear:
        w, b = (
            (experts.up(e), experts.up_bias(e))
            if product == 0
            else (experts.down(e), experts.down_bias(e))
        )
        smooth = given.smooth if given.smooth is None or product == 0 else given.smooth[e]
        if second.smooth is not None and experts.gate.is_linear:
            own = second.smooth[e]
            factor = torch.cat([torch.ones(experts.inner), 1.0 / own])
            if product == 0:
                w, b = w.float() * factor[:, None], None if b is None else b.float() * factor
            else:
                w, smooth = w.float() * own, None
        return W8A8Linear.from_linear(
            linear_of(w, b),
            activation_scheme=given.scheme,
            smooth=smooth,
            rotation=given.rotation,
            x_scale=given.x_scale,
        )

    layers = [(made(e, 0, first), made(e, 1, second)) for e in range(experts.count)]
    out = torch.zeros(len(x), experts.hidden, dtype=x.dtype)
    for t in range(len(x)):
        total = torch.full((experts.hidden,), -0.0)
        for c in range(index.shape[1]):
            if not 0 <= int(index[t, c]) < experts.count:
                y = torch.zeros(experts.hidden)
            else:
                up, down = layers[int(index[t, c])]
                y = up(x[t : t + 1])
                y = (
                    reference.activation(y, experts.gate.kind)
                    if experts.gate.is_fused
                    else experts.gate(y)
                )
                y = down(y).to(x.dtype)[0].float()
            total = reference.fma(weights[t, c].float(), y, total)
        out[t] = total.to(x.dtype)
    return out


def factors(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.exp2(torch.randint(-3, 4, shape, generator=g).float())


@each_layout
@pytest.mark.parametrize("scheme", ["per_token", "static"])
def test_equal_to_linears_of_each_expert(layout: str, scheme: str) -> None:
    found = read(ToyExperts(**LAYOUTS[layout]))
    scale = 0.03 if scheme == "static" else None
    fold = factors(found.count, found.inner) if found.gate.is_linear else None
    rotations = (0, 0) if layout == "one" else (8, 4)
    first = Input(scheme, rotations[0], factors(found.hidden), scale)
    second = Input(scheme, rotations[1], fold, scale)
    layer = W8A8Experts.from_experts(found, first, second)
    x = tokens(11, found.hidden, found.first.dtype)
    choices = min(2, found.count)
    index, weights = routing(11, found.count, choices)
    index[3, 0] = found.count  # of another process
    index[4] = -1
    x[6] = torch.nan
    got = layer(x, index, weights)
    assert got.dtype == x.dtype
    wanted = by_linears(found, first, second, x, index, weights)
    assert got[6].isnan().any() and got[4].eq(0).all()
    others = [t for t in range(11) if t != 6]
    assert_bitwise_equal(got[others], wanted[others])


def test_factors_that_cannot_fold_divide_at_run_time() -> None:
    module: Any = ToyExperts(concatenated=False, transposed=True, bias=True)
    gate = Gate("clamped_swiglu", 1.702, 7.0)
    module.alpha, module.limit = 1.702, 7.0
    module._apply_gate = lambda y: gate(torch.cat([y[..., ::2], y[..., 1::2]], -1))
    found = read(module)
    assert found.gate == gate
    second = Input(smooth=factors(found.count, found.inner))
    layer = W8A8Experts.from_experts(found, Input(), second)
    assert layer.down_inv_smooth is not None and layer.up_inv_smooth is None
    x = tokens(10, found.hidden)
    index, weights = routing(10, found.count)
    wanted = by_linears(found, Input(), second, x, index, weights)
    assert_bitwise_equal(layer(x, index, weights), wanted)


def test_one_scale_for_the_tensor_covers_all_tokens() -> None:
    found = read(ToyExperts())
    layer = W8A8Experts.from_experts(found, Input("per_tensor"), Input("per_tensor"))
    x = tokens(6, 16)
    index, weights = routing(6, 4)
    x_q, x_scale = reference.quantize(x, granularity="tensor")
    order, position, offsets = reference.sort_by_expert(index, 4)
    y = reference.grouped_gemm_s8(
        x_q[order // 2], layer.up_q, x_scale, layer.up_scale, offsets, out_dtype=torch.float32
    )
    v_q, v_scale = reference.quantize(reference.activation(y, "silu_mul"), granularity="tensor")
    y = reference.grouped_gemm_s8(
        v_q, layer.down_q, v_scale, layer.down_scale, offsets, out_dtype=torch.float32
    )
    assert_bitwise_equal(layer(x, index, weights), reference.combine_experts(y, position, weights))


@pytest.mark.parametrize("count", [0, 1, 17])
def test_sorted_rows_and_few_tokens(count: int) -> None:
    found = read(SortedExperts())
    layer = W8A8Experts.from_experts(found, Input(), Input())
    x = tokens(4 * count, 16)
    index = torch.arange(4).repeat_interleave(count)[:, None]
    wanted = by_linears(found, Input(), Input(), x, index, torch.ones(4 * count, 1))
    assert_bitwise_equal(layer(x), wanted)
    routed = W8A8Experts.from_experts(read(ToyExperts()), Input(), Input())
    few, weights = routing(count, 4)
    assert routed(tokens(count, 16), few, weights).shape == (count, 16)


def test_other_names_and_types_of_the_arguments() -> None:
    layer = W8A8Experts.from_experts(read(ToyExperts()), Input(), Input())
    x = tokens(6, 16)
    index, weights = routing(6, 4)
    wanted = layer(x, index, weights)
    assert_bitwise_equal(layer(x, router_indices=index, routing_weights=weights), wanted)
    assert_bitwise_equal(layer(x, index.int(), weights), wanted)
    assert_bitwise_equal(layer(x.view(2, 3, 16), index, weights), wanted.view(2, 3, 16))
    assert_bitwise_equal(layer(x, index, weights.double()), wanted)


def test_the_graph_is_whole() -> None:
    layer = W8A8Experts.from_experts(read(ToyExperts()), Input(), Input())
    x = tokens(6, 16)
    index, weights = routing(6, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        assert_bitwise_equal(compiled(x, index, weights), layer(x, index, weights))


@pytest.mark.parametrize("routed", [True, False])
def test_nothing_reads_a_value(routed: bool) -> None:
    """A CUDA graph can hold the layer: tensors on the meta device have no values, so reading one fails."""
    layer = W8A8Experts.from_experts(
        read(ToyExperts() if routed else SortedExperts()), Input(), Input()
    )
    x = tokens(8, 16).to("meta")
    index, weights = (t.to("meta") for t in routing(8, 4))
    y = layer.to("meta")(*((x, index, weights) if routed else (x,)))
    assert y.is_meta and y.shape == x.shape


def test_gradients_are_those_of_the_represented_weights() -> None:
    module = ToyExperts(bias=True)
    found = read(module)
    layer = W8A8Experts.from_experts(found, Input(), Input(smooth=factors(4, 24)))
    plain = ToyExperts(bias=True)
    write_float(layer, read(plain))
    index, weights = routing(6, 4)
    x, other = (tokens(6, 16).requires_grad_() for _ in range(2))
    y = layer(x, index, weights)
    assert_bitwise_equal(y.detach(), layer(x.detach(), index, weights))
    y.square().sum().backward()
    plain(other, index, weights)
    (2 * y.detach() * plain(other, index, weights)).sum().backward()
    assert x.grad is not None and other.grad is not None
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)  # sums in another order


@each_layout
def test_float_experts_come_back(layout: str) -> None:
    module = ToyExperts(**LAYOUTS[layout])
    found = read(module)
    layer = W8A8Experts.from_experts(found, Input(), Input())
    made = write_float(layer, read(ToyExperts(**LAYOUTS[layout])))
    assert made.state_dict().keys() == module.state_dict().keys()
    for name, t in made.state_dict().items():
        old = module.state_dict()[name]
        assert t.dtype == old.dtype and t.shape == old.shape
        # Half a step of 1 / 127 of a row's largest value, and the rounding of a narrow type.
        assert (t.float() - old.float()).abs().max() <= old.float().abs().max() * (1 / 254 + 2**-8)


# --- state ------------------------------------------------------------------------------------------------------------


def made() -> W8A8Experts:
    first, second = Input("static", 8, factors(16), 0.02), Input("per_token", 4)
    return W8A8Experts.from_experts(read(ToyExperts(bias=True)), first, second)


def test_copies_and_states_compute_the_same() -> None:
    layer = made().bfloat16()
    assert layer.dtype == torch.bfloat16 and layer.up_scale.dtype == torch.float32
    x = tokens(5, 16, torch.bfloat16)
    index, weights = routing(5, 4)
    wanted = layer(x, index, weights)
    fresh = make_module("experts", kinds.describe(layer)).to_empty(device="cpu")
    fresh.load_state_dict(layer.state_dict(), assign=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert_bitwise_equal(other(x, index, weights), wanted)
        assert kinds.describe(other) == kinds.describe(layer)


def test_a_float_state_is_refused() -> None:
    with pytest.raises(RuntimeError, match="gate_up_proj is a float weight and these experts are"):
        made().load_state_dict(ToyExperts(bias=True).state_dict(), strict=False)


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 0},
        {"num_experts": 2000},
        {"schemes": ["per_token"]},
        {"schemes": ["per_token", "o4"]},
        {"rotations": [3, 0]},
        {"smooth": [1, 0]},
        {"gate": {"kind": "sin", "alpha": 0.0, "limit": 0.0}},
        {"gate": {"kind": "clamped_swiglu", "alpha": 1.0, "limit": float("inf")}},
        {"gate": {"kind": "silu_mul"}},
        {"dtype": "float64"},
        {"more": 1},
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(change: dict[str, Any]) -> None:
    arguments = kinds.describe(made())
    assert isinstance(make_module("experts", arguments), W8A8Experts)
    with pytest.raises(SmoothQuantError, match="are not understood"):
        make_module("experts", {**arguments, **change})


def test_wrong_factors_scales_and_weights_are_refused() -> None:
    module = ToyExperts()
    found = read(module)
    for first in (Input(smooth=torch.zeros(16)), Input("static"), Input("per_token", x_scale=0.1)):
        with pytest.raises(
            SmoothQuantError, match=r"smooth must be positive|x_scale must be given"
        ):
            W8A8Experts.from_experts(found, first, Input())
    module.down_proj.data[1, 2, 3] = torch.inf
    with pytest.raises(SmoothQuantError, match="down_proj has NaN or Inf values"):
        W8A8Experts.from_experts(found, Input(), Input())
    with pytest.raises(SmoothQuantError, match="num_experts must be in"):
        W8A8Experts(0, 4, 4, Gate("silu_mul"))
    with pytest.raises(SmoothQuantError, match="rotation must be 0 or a power of two"):
        W8A8Experts(1, 4, 4, Gate("silu_mul"), rotations=(3, 0))
