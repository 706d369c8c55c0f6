"""`OutlierLinear` as a module: moved, cast, copied, saved, loaded, compiled, exported; damaged states are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_kernels import OutlierLinear, W8A8Linear, optimize_for_inference
from smoothquant_kernels.checkpoint.skeleton import check_scales
from smoothquant_kernels.nn import kinds, operands, quantized_linear
from smoothquant_kernels.nn.parallel.model import ColwiseW8A8, RowwiseW8A8
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.support import cases
from tests.support.checkpoints import refusal
from tests.support.compare import assert_bitwise_equal, assert_same_buffers
from tests.support.copies import ways_to_copy

COLUMNS = [0, 4]


def static(
    dtype: torch.dtype = torch.float32, scheme: str = "static", seed: int = 0
) -> OutlierLinear:
    """A layer with every buffer."""
    layer = OutlierLinear.from_linear(
        cases.float_linear(6, 5, seed=seed).to(dtype),
        columns=COLUMNS,
        activation_scheme=scheme,
        x_scale=1e-2 if scheme == "static" else None,
        smooth=cases.inverse_smooth(6),
        rotation=2,
    )
    assert scheme != "static" or all(buffer is not None for buffer in layer._buffers.values())
    return layer


def dynamic(scheme: str = "per_token") -> OutlierLinear:
    return OutlierLinear.from_linear(
        cases.float_linear(6, 5),
        outliers="dynamic",
        threshold=2.0,
        activation_scheme=scheme,
        x_scale=1e-2 if scheme == "static" else None,
    )


def empty_like(layer: OutlierLinear, device: str = "cpu", **changed: Any) -> OutlierLinear:
    kind: Any = kinds.kind_of(layer)
    arguments = kind.arguments(layer) | {"dtype": layer.dtype} | changed
    return OutlierLinear(**arguments, device=device)


def assert_same_layer(found: OutlierLinear, expected: OutlierLinear) -> None:
    assert repr(found) == repr(expected)
    assert found.dtype == expected.dtype
    assert_same_buffers(found, expected)


# --- types and copies -------------------------------------------------------------------------------------------------


CASTS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float32),
    "float": (lambda m: m.float(), torch.float32),
    "parent": (lambda m: nn.Sequential(m).half()[0], torch.float16),
    "cpu": (lambda m: m.cpu(), torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_round_the_float_columns_alone(cast: str) -> None:
    change, dtype = CASTS[cast]
    layer, expected = change(static()), static()
    assert layer.dtype == dtype == layer.w_columns.dtype == layer.weight.dtype
    assert_bitwise_equal(layer.w_columns, expected.w_columns.to(dtype))
    assert layer.columns.dtype == torch.int64
    for name, buffer in layer.named_buffers():
        if name != "w_columns":
            assert_bitwise_equal(buffer, expected._buffers[name])
    x = cases.activations(3, 6)
    wanted = empty_like(static())
    wanted.load_state_dict(static().state_dict())
    wanted.w_columns = wanted.w_columns.to(dtype).float()
    assert_bitwise_equal(layer(x), wanted(x), "x of another type takes the rounded columns")


COPIES = ways_to_copy(empty_like)


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same(way: str) -> None:
    x = cases.activations(4, 6)
    for scheme in ACTIVATION_SCHEMES:
        for layer in (static(scheme=scheme), static(torch.bfloat16, scheme), dynamic(scheme)):
            expected = layer(x)  # packs the weight, on which the copy must not depend
            found = COPIES[way](layer)
            assert_same_layer(found, layer)
            assert_bitwise_equal(found(x), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_takes_the_type_of_a_state(assign: bool) -> None:
    """The float columns keep their bits, whichever of the two types is wider."""
    for mine, theirs in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        fresh, other = static(mine, seed=1), static(theirs)
        fresh.load_state_dict({n: t.clone() for n, t in other.state_dict().items()}, assign=assign)
        assert_same_layer(fresh, other)


def test_meta_and_back_keeps_types_and_shapes() -> None:
    expected = static(torch.float16)
    layer = static().to("meta", torch.float16)
    for name, buffer in layer.named_buffers():
        wanted: Any = expected._buffers[name]
        assert buffer.is_meta and (buffer.dtype, buffer.shape) == (wanted.dtype, wanted.shape)
    layer.to_empty(device="cpu")
    layer.load_state_dict(expected.state_dict())
    assert_same_layer(layer, expected)


def test_rows_that_start_at_multiples_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where w_q is a view of a wider tensor."""
    x = cases.activations(5, 6)
    expected = [static(), dynamic()]
    for module in (quantized_linear, operands):
        monkeypatch.setattr(module, "wants_aligned_rows", lambda t: True)
    for layer, plain in zip([static(), dynamic()], expected, strict=True):
        for one in (layer, copy.deepcopy(layer), layer.to("cpu")):
            assert one.w_q.stride() == (16, 1)
            assert_bitwise_equal(one(x), plain(x))


def test_repr() -> None:
    assert repr(static()) == (
        "OutlierLinear(in_features=6, out_features=5, bias=True, activation_scheme=static, "
        "weight_granularity=channel, outliers=static(2), smooth=True, rotation=2)"
    )
    assert repr(dynamic()) == (
        "OutlierLinear(in_features=6, out_features=5, bias=True, activation_scheme=per_token, "
        "weight_granularity=channel, outliers=dynamic(2.0))"
    )


# --- compile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("any_size", [False, True])
def test_a_static_layer_compiles_and_exports(scheme: str, any_size: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(
        static(scheme=scheme),
        nn.GELU(),
        OutlierLinear.from_linear(cases.float_linear(5, 3), columns=[]),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=any_size)
    shapes = ({0: torch.export.Dim("batch")},) if any_size else None
    x = cases.activations(10, 6).view(2, 5, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    for batch in (2, 7) if any_size else (2,):
        x = cases.activations(5 * batch, 6).view(batch, 5, 6)
        with torch.no_grad():
            assert_bitwise_equal(compiled(x), model(x))
            assert_bitwise_equal(program.module()(x), model(x))


def test_a_dynamic_layer_breaks_the_graph_and_computes_the_same() -> None:
    torch._dynamo.reset()
    layer = dynamic()
    compiled = torch.compile(layer, backend="aot_eager")
    for seed in range(3):
        x = cases.activations(4, 6, seed=seed)
        with torch.no_grad():
            assert_bitwise_equal(compiled(x), layer(x))


# --- refusals ---------------------------------------------------------------------------------------------------------


def changed(name: str, value: Any) -> dict[str, Tensor]:
    state = static().state_dict()
    t = state[name].clone()
    if name == "inv_smooth":
        t[value[0]] = value[1]
    elif name == "w_columns":
        t[1, 1] = value
    else:
        t = torch.tensor(value)
    return {**state, name: t}


DAMAGE: list[tuple[str, Any, str]] = [
    ("columns", [0, 6], "columns has a channel outside [0, 5]"),
    ("columns", [-1, 4], "columns has a channel outside [0, 5]"),
    ("columns", [4, 0], "not in ascending order"),
    ("columns", [4, 4], "repeated"),
    ("columns", [1, 4], "inv_smooth must be 0 at the outlier columns and positive elsewhere"),
    ("inv_smooth", (0, 1.0), "inv_smooth must be 0 at the outlier columns"),
    ("inv_smooth", (1, 0.0), "inv_smooth must be 0 at the outlier columns"),
    ("inv_smooth", (1, -1.0), "inv_smooth has a value that is NaN, infinite or negative"),
    ("inv_smooth", (1, float("nan")), "inv_smooth has a value that is NaN, infinite or negative"),
    ("w_columns", float("inf"), "w_columns has a value that is NaN or infinite"),
]


@pytest.mark.parametrize(("name", "value", "said"), DAMAGE, ids=str)
def test_a_damaged_state_is_refused(name: str, value: Any, said: str) -> None:
    state = changed(name, value)
    with pytest.raises(RuntimeError) as caught:
        empty_like(static()).load_state_dict(state)
    assert said in str(caught.value)
    described = {"a.b": kinds.describe(static())}
    tensors = {f"a.b.{n}": t for n, t in state.items()}
    text = refusal(lambda: check_scales(tensors, described))
    assert text.startswith("a.b.") and said in text
    check_scales({f"a.b.{n}": t for n, t in static().state_dict().items()}, described)


def test_factors_of_a_dynamic_layer_are_positive() -> None:
    described = {"a": kinds.describe(static()) | {"outliers": "dynamic", "columns": 0}}
    factors = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert "positive elsewhere" in refusal(
        lambda: check_scales({"a.inv_smooth": factors}, described)
    )


@pytest.mark.parametrize(
    "change",
    [
        {"outliers": "none"},
        {"columns": 7},
        {"columns": -1},
        {"threshold": 0.0},
        {"threshold": 6},
        {"smooth": False},
        {"dtype": "float64"},
        {"rotation": 4},
        {"outliers": "dynamic", "columns": 1},
    ],
    ids=str,
)
def test_wrong_arguments_of_a_checkpoint_are_refused(change: dict[str, Any]) -> None:
    described = kinds.describe(static())
    made: Any = kinds.make(described)
    assert repr(made) == repr(static()) and made.w_q.is_meta
    assert kinds.make({**described, **change}) is None


def test_a_state_with_other_columns_or_of_another_kind_is_refused() -> None:
    for other in (
        empty_like(static(), columns=3),
        empty_like(dynamic(), activation_scheme="static"),
        W8A8Linear(6, 5, activation_scheme="static", smooth=True, rotation=2),
        nn.Linear(6, 5),
    ):
        with pytest.raises(RuntimeError, match=r"size mismatch|Unexpected key|Missing key"):
            static().load_state_dict(other.state_dict())


def test_tensor_parallelism_is_refused() -> None:
    for style in (ColwiseW8A8(), RowwiseW8A8()):
        assert "o_proj is a OutlierLinear, which ranks cannot share" in refusal(
            lambda style=style: style.check(static(), 2, "o_proj")
        )


def test_attributes_of_float_layers_and_fusion_of_a_model_without_w8a8() -> None:
    model = nn.Sequential(nn.LayerNorm(6), static(scheme="per_token"))
    x = cases.activations(3, 6)
    before = model(x)
    optimize_for_inference(model, {"input": x})
    assert_bitwise_equal(model(x), before)
