"""`W8A8Linear` as a module: moved, cast, copied, saved, loaded, printed, compiled and exported."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from smoothquant_kernels import W8A8Linear
from smoothquant_kernels.nn import operands, quantized_linear
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES, WEIGHT_GRANULARITIES
from tests.support import cases
from tests.support.compare import assert_bitwise_equal, assert_same_buffers
from tests.support.copies import ways_to_copy


def every_buffer() -> W8A8Linear:
    """A layer with every buffer, and with values that float16 cannot represent."""
    layer = cases.quantized(
        cases.float_linear(6, 5), "static", smooth=cases.inverse_smooth(6), x_scale=1e-6
    )
    assert all(buffer is not None for buffer in layer._buffers.values())
    return layer


def assert_same_layer(found: W8A8Linear, expected: W8A8Linear) -> None:
    assert repr(found) == repr(expected)
    assert_same_buffers(found, expected)


# --- moving, copying, saving --------------------------------------------------------------------------


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "to(tensor)": lambda m: m.to(torch.ones(1, dtype=torch.float64)),
    "type": lambda m: m.type(torch.float16),
    "parent": lambda m: nn.Sequential(m).half()[0],
    "twice": lambda m: m.half().float(),
    "cpu": lambda m: m.cpu(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_no_cast_rounds_the_scales(cast: str) -> None:
    assert_same_layer(CASTS[cast](every_buffer()), every_buffer())  # type: ignore[arg-type]


def test_meta_and_back_keeps_types_and_shapes() -> None:
    expected = every_buffer()
    for layer in (every_buffer().to("meta"), every_buffer().to("meta", torch.float16)):
        for name, buffer in layer.named_buffers():
            wanted = expected._buffers[name]
            assert wanted is not None and buffer.is_meta
            assert buffer.dtype == wanted.dtype and buffer.shape == wanted.shape
        layer.to_empty(device="cpu")
        layer.load_state_dict(expected.state_dict())
        assert_same_layer(layer, expected)


def empty_like(layer: W8A8Linear, device: str = "cpu") -> W8A8Linear:
    return W8A8Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        activation_scheme=layer.activation_scheme,
        weight_granularity=layer.weight_granularity,
        smooth=layer.inv_smooth is not None,
        rotation=layer.rotation,
        device=device,
    )


COPIES = ways_to_copy(empty_like)


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same(way: str) -> None:
    x = cases.activations(4, 6)
    for scheme in ACTIVATION_SCHEMES:
        for granularity in WEIGHT_GRANULARITIES:
            for bias, smooth, rotation in ((True, None, 0), (False, cases.inverse_smooth(6), 2)):
                layer = cases.quantized(
                    cases.float_linear(6, 5, bias),
                    scheme,
                    weight_granularity=granularity,
                    smooth=smooth,
                    rotation=rotation,
                )
                expected = layer(x)  # packs the weight, on which the copy must not depend
                found = COPIES[way](layer)
                assert_same_layer(found, layer)
                assert_bitwise_equal(found(x), expected)


def test_loading_new_weights_into_a_used_layer() -> None:
    x = cases.activations(4, 6)
    layer, other = (
        cases.quantized(cases.float_linear(6, 5)),
        cases.quantized(cases.float_linear(6, 5, seed=1)),
    )
    before = layer(x)
    for assign in (False, True):
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert_bitwise_equal(layer(x), other(x))
        assert not torch.equal(layer(x), before)


def test_half_precision_scales_in_a_file_load_as_float32() -> None:
    state = {
        k: v.half() if v.is_floating_point() else v for k, v in every_buffer().state_dict().items()
    }
    fresh = empty_like(every_buffer())
    fresh.load_state_dict(state)
    assert {b.dtype for n, b in fresh.named_buffers() if n != "w_q"} == {torch.float32}


def test_the_state_of_another_scheme_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*x_scale"):
        W8A8Linear(6, 5, activation_scheme="static").load_state_dict(
            cases.quantized(cases.float_linear(6, 5)).state_dict()
        )


def test_repr() -> None:
    assert repr(cases.quantized(cases.float_linear(6, 5))) == (
        "W8A8Linear(in_features=6, out_features=5, bias=True, activation_scheme=per_token, "
        "weight_granularity=channel)"
    )
    layer = W8A8Linear(
        4,
        2,
        False,
        activation_scheme="static",
        weight_granularity="tensor",
        smooth=True,
        rotation=2,
    )
    assert repr(layer) == (
        "W8A8Linear(in_features=4, out_features=2, bias=False, activation_scheme=static, "
        "weight_granularity=tensor, smooth=True, rotation=2)"
    )


# --- compile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_export(scheme: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(
        cases.quantized(cases.float_linear(13, 11), scheme, smooth=cases.inverse_smooth(13)),
        nn.GELU(),
        cases.quantized(Conv1D(3, 11), scheme, weight_granularity="tensor"),
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    x = cases.activations(10, 13).view(2, 5, 13)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    for batch in (2, 7) if dynamic else (2,):
        x = cases.activations(5 * batch, 13).view(batch, 5, 13)
        with torch.no_grad():
            assert_bitwise_equal(compiled(x), model(x))
            assert_bitwise_equal(program.module()(x), model(x))


def test_compile_with_a_shared_quantization() -> None:
    torch._dynamo.reset()
    layers = [cases.quantized(cases.float_linear(8, n, seed=n)) for n in (4, 6)]

    def both(x: Tensor) -> Tensor:
        shared = layers[0].quantize_input(x)
        return torch.cat([layer(shared) for layer in layers], -1)

    x = cases.activations(3, 8)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x), both(x))


# --- rows that start at multiples of 16 bytes --------------------------------------------------------------


def test_a_weight_with_aligned_rows_behaves_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, w_q is a view of a wider tensor if K is not a multiple of 16. The test enables this on the CPU."""
    expected, x = every_buffer(), cases.activations(5, 6)
    for module in (quantized_linear, operands):
        monkeypatch.setattr(module, "wants_aligned_rows", lambda t: True)
    stream = io.BytesIO()
    torch.save(every_buffer().state_dict(), stream)
    stream.seek(0)
    made = W8A8Linear(6, 5, activation_scheme="static", smooth=True)
    for layer in (
        every_buffer(),
        every_buffer().to("cpu"),
        every_buffer().half(),
        made,
        copy.deepcopy(every_buffer()),
        pickle.loads(pickle.dumps(every_buffer())),
    ):
        if layer is made:
            layer.load_state_dict(torch.load(stream))
        assert layer.w_q.shape == (5, 6) and layer.w_q.stride() == (16, 1)
        assert_same_layer(layer, expected)
        assert_bitwise_equal(layer(x), expected(x))
        shared = layer.quantize_input(x)
        assert shared.x_q.shape == (5, 6) and shared.x_q.stride() == (16, 1)
        assert_bitwise_equal(layer(shared), expected(x))
        assert_bitwise_equal(layer.dequantized_weight(), expected.dequantized_weight())
    # If K is a multiple of 16, the weight is never copied.
    w_q = cases.random_int8(3, 32)
    assert operands.packed_rows(w_q) is w_q


def loaded_with_assign() -> W8A8Linear:
    layer = every_buffer()
    given = {name: value.clone() for name, value in every_buffer().state_dict().items()}
    layer.load_state_dict(given, assign=True)
    return layer


MADE: dict[str, Callable[[], W8A8Linear]] = {
    "quantized": every_buffer,
    "moved": lambda: every_buffer().to_empty(device="meta").to_empty(device="cpu"),
    "loaded": loaded_with_assign,
    "copied": lambda: copy.deepcopy(every_buffer()),
    "unpickled": lambda: pickle.loads(pickle.dumps(every_buffer())),
}


@pytest.mark.parametrize("how", MADE)
def test_inference_mode_packs_the_weight_once(how: str, packs: list[int]) -> None:
    """However a layer was made, its weight has a version counter, so its packed form can be cached."""
    x = cases.activations(3, 6)
    with torch.inference_mode():
        layer = MADE[how]()
        layer.load_state_dict(every_buffer().state_dict())
        assert not layer.w_q.is_inference()
        found = [layer(x), layer(x)]
    found.append(layer(x))
    assert len(packs) == 1
    for y in found:
        assert_bitwise_equal(y, every_buffer()(x))
