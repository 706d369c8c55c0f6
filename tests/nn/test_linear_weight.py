"""A quantized layer seen from outside: a read-only float weight, and a state that loads only into its own kind."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels.nn.lazy_weight import LazyWeight
from tests.support import cases
from tests.support.compare import assert_bitwise_equal

HALF = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALF]
K, N = 20, 6


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> W8A8Linear:
    return cases.quantized(cases.float_linear(K, N).to(dtype), **options)


def expected(made: W8A8Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    w = made.w_q.float() * made.w_scale[:, None]
    return (w if made.inv_smooth is None else w * made.inv_smooth).to(dtype)


# --- attributes and values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_weight_has_the_attributes_of_a_float_weight(dtype: torch.dtype) -> None:
    linear = cases.float_linear(K, N).to(dtype)
    found = cases.quantized(linear).weight
    for fact in (
        lambda w: (w.dtype, w.shape, w.device, w.stride(), w.numel(), w.dim(), w.element_size()),
        lambda w: (w.is_floating_point(), w.is_cuda, w.is_meta, w.is_sparse, w.is_contiguous()),
        lambda w: (w.t().shape, w.t().stride(), w[:2].shape, w.size(0), len(w), w.nbytes),
    ):
        assert fact(found) == fact(linear.weight)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor) and not isinstance(found, nn.Parameter)
    assert not found.requires_grad
    conv = Conv1D(N, K).to(dtype)
    assert cases.quantized(conv).weight.dtype == dtype
    assert cases.quantized(conv).weight.shape == (N, K)  # nn.Linear's shape, not Conv1D's


def test_reading_attributes_does_not_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer()
    monkeypatch.setattr(W8A8Linear, "dequantized_weight", lambda _: pytest.fail("computed"))
    w = made.weight
    assert (w.dtype, w.device.type, w.shape) == (torch.float32, "cpu", (N, K))
    assert w.data.t().dtype == torch.float32
    made(torch.ones(2, K))


READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "linear": lambda w, x: F.linear(x, w),
    "matmul": lambda w, x: x @ w.t(),
    "transposed": lambda w, x: (w @ x.transpose(0, 1)).sum(1),
    "addmm": lambda w, x: torch.addmm(x.new_ones(1), x, w.T),
    "einsum": lambda w, x: torch.einsum("nk,mk->mn", w, x),
    "rows": lambda w, x: w[1:3],
    "chunk": lambda w, x: w.chunk(2)[1] * 2,
    "split": lambda w, x: torch.cat(w.split(2, dim=1)),
    "cast": lambda w, x: w.float(),
    "data": lambda w, x: w.data.abs().amax(0),
    "detach": lambda w, x: w.detach().clone(),
    "reshape": lambda w, x: w.reshape(-1) + 0,
    "norm": lambda w, x: w.norm(),
    "stack": lambda w, x: torch.stack([w, w]),
    "index": lambda w, x: w[torch.tensor([2, 0])],
    "view of a view": lambda w, x: w.t()[1:4].unsqueeze(0) + 0,
    "new": lambda w, x: w.new_ones(2),
    "to": lambda w, x: x.double().to(w),
    "numpy": lambda w, x: torch.from_numpy(w.float().numpy()),
    "list": lambda w, x: torch.tensor(w.tolist()),
    "deepcopy": lambda w, x: copy.deepcopy(w),
    "pickle": lambda w, x: pickle.loads(pickle.dumps(w)),
}


@pytest.mark.parametrize("inference", [False, True], ids=["grad", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("read", READS)
def test_reads_give_the_dequantized_values(read: str, dtype: torch.dtype, inference: bool) -> None:
    made = layer(dtype, smooth=cases.inverse_smooth(K))
    x = torch.randn(3, K).to(dtype)
    with torch.inference_mode(inference):
        found = READS[read](made.weight, x)
        wanted = READS[read](expected(made, dtype), x)
        assert type(found + 0) is Tensor
        assert_bitwise_equal(found + 0, wanted + 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_product_with_the_layers_own_weight_and_bias(dtype: torch.dtype) -> None:
    """The bias is float32 in a layer of any dtype."""
    made = layer(dtype)
    x = torch.randn(3, K).to(dtype)
    assert made.bias is not None
    found = F.linear(x, made.weight, made.bias)
    assert found.dtype == dtype
    assert_bitwise_equal(found, F.linear(x, expected(made, dtype), made.bias.to(dtype)))


def test_a_product_with_the_weight_passes_a_gradient() -> None:
    made = layer()
    x = torch.randn(3, K, requires_grad=True)
    F.linear(x, made.weight).sum().backward()
    assert x.grad is not None
    assert_bitwise_equal(x.grad, torch.ones(3, N) @ expected(made))


def test_the_weight_prints_its_values() -> None:
    made = layer()
    assert repr(made.weight) == repr(expected(made))


# --- writing --------------------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[W8A8Linear], object]] = {
    "fill": lambda m: m.weight.fill_(1.0),
    "data.copy_": lambda m: m.weight.data.copy_(torch.ones(N, K)),
    "data +=": lambda m: m.weight.data.add_(1.0),
    "data =": lambda m: setattr(m.weight, "data", torch.ones(N, K)),
    "init": lambda m: nn.init.normal_(m.weight),
    "row": lambda m: m.weight[0].zero_(),
    "item": lambda m: m.weight.__setitem__((0, 0), 1.0),
    "view": lambda m: m.weight.view(-1).mul_(2.0),
    "transposed": lambda m: m.weight.t().zero_(),
    "chunk": lambda m: m.weight.chunk(2)[1].zero_(),
    "detached": lambda m: m.weight.detach().mul_(2.0),
    "out": lambda m: torch.add(torch.ones(N, K), 1, out=m.weight),
    "foreach": lambda m: torch._foreach_mul_([m.weight], 2.0),
    "requires_grad_": lambda m: m.weight.requires_grad_(),
    "parameter": lambda m: nn.Parameter(m.weight),
    "frozen parameter": lambda m: nn.Parameter(m.weight, requires_grad=False),
    "address": lambda m: m.weight.data_ptr(),
    "replaced": lambda m: setattr(m, "weight", torch.ones(N, K)),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_refused(write: str) -> None:
    made = layer()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(SmoothQuantError, match="int8"):
        WRITES[write](made)
    for name, value in made.state_dict().items():
        assert_bitwise_equal(value, before[name])


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(N, K)), None], ids=["parameter", "none"])
def test_a_parameter_cannot_replace_the_weight(value: nn.Parameter | None) -> None:
    made = layer()
    with pytest.raises((KeyError, SmoothQuantError)):
        made.register_parameter("weight", value)
    tied = nn.Linear(K, N)
    with pytest.raises(TypeError, match="cannot assign"):
        tied.weight = made.weight  # type: ignore[assignment]
    assert isinstance(made.weight, LazyWeight)


# --- the dtype, casts and states ------------------------------------------------------------------------------


def test_the_dtype_follows_the_model() -> None:
    made = layer()
    model = nn.Sequential(made)
    for cast, dtype in (
        (lambda: model.half(), torch.float16),
        (lambda: model.to(torch.bfloat16), torch.bfloat16),
        (lambda: model.to("meta", torch.float16), torch.float16),
        (lambda: model.to_empty(device="cpu"), torch.float16),
        (lambda: model.float(), torch.float32),
        (lambda: model.double(), torch.float32),  # no int8 layer is float64
        (lambda: model.requires_grad_(False), torch.float32),
    ):
        cast()  # type: ignore[no-untyped-call]
        assert made.weight.dtype == made.dtype == dtype
        assert made.w_scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_state_dicts_and_copies_keep_the_dtype(dtype: torch.dtype) -> None:
    made = layer(dtype)
    fresh = W8A8Linear(K, N)
    assert str(fresh.load_state_dict(made.state_dict())) == "<All keys matched successfully>"
    for other in (fresh, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.weight.dtype == dtype
        assert_bitwise_equal(other.weight + 0, expected(made, dtype))
    without = made.state_dict()
    del without["weight"]
    assert (
        not W8A8Linear(K, N).load_state_dict(without).missing_keys
    )  # as an earlier release saved it


def test_functional_call_with_the_state_dict() -> None:
    made, x = layer(), torch.randn(3, K)
    zeros = W8A8Linear(K, N)
    found = torch.func.functional_call(zeros, made.state_dict(), (x,))
    assert_bitwise_equal(found, made(x))
    assert not zeros.w_q.any()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_the_state_of_one_kind_never_loads_into_the_other(strict: bool, assign: bool) -> None:
    linear, made = cases.float_linear(K, N), layer()
    for one, other, message in (
        (linear, made, r"size mismatch for 0.weight: .* torch.Size\(\[1\]\)"),
        (made, linear, "weight is a float weight and this layer is quantized: load it into the"),
    ):
        with pytest.raises(RuntimeError, match=message):
            nn.Sequential(one).load_state_dict(
                nn.Sequential(other).state_dict(), strict=strict, assign=assign
            )


# --- models that read the weight ------------------------------------------------------------------------------


class Casting(nn.Module):
    """Casts to the dtype of a weight, passes nn.Linear's keyword, and multiplies by another weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        w = self.called.weight
        x = x.to(w.dtype).to(w.device)
        y: Tensor = self.called(input=x) + F.linear(x, self.read.weight)
        return y * w.shape[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_model_that_casts_and_reads(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Casting().to(dtype).eval()
    # quantize_model would leave `read` in float, because the model reads its weight.
    called = model.called = W8A8Linear.from_linear(model.called)
    read = model.read = W8A8Linear.from_linear(model.read)
    x = torch.randn(4, K)
    with torch.no_grad():
        found = model(x)
        own = F.linear(x.to(dtype), expected(read, dtype))
        assert_bitwise_equal(found, (called(x.to(dtype)) + own) * N)
        if dtype == torch.bfloat16:
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert_bitwise_equal(compiled(x), found)
            exported = torch.export.export(model, (x,)).module()
            assert_bitwise_equal(exported(x), found)


def test_a_vision_tower_that_casts_its_pixels() -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=2)
    ).eval()

    def batch(seed: int) -> dict[str, Tensor]:
        pixels = torch.randn(1, 16, 12, generator=torch.Generator().manual_seed(seed))
        mask, shapes = torch.ones(1, 16, dtype=torch.long), torch.tensor([[4, 4]])
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}

    with torch.no_grad():
        before = model(**batch(9)).last_hidden_state
        smooth_lm(model, [batch(1)], config=SmoothQuantConfig(smooth=False), progress=False)
        quantize_model(model)
        after = model(**batch(9)).last_hidden_state
    # If the tower cast its pixels to int8, the error would be 100 %. Rounding costs a few percent.
    assert (after - before).norm() < 0.1 * before.norm()


def test_t5_casts_to_the_dtype_of_its_weight() -> None:
    """T5 casts to the dtype of `wo.weight`, unless that is int8."""
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    ).eval()
    quantize_model(model.bfloat16())
    y = model(input_ids=torch.arange(8)[None]).last_hidden_state
    assert y.dtype == torch.bfloat16 and bool(y.isfinite().all())
