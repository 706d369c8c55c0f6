"""A layer stays in float if other code reads its weight. Running the model or reading its source shows that."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import (
    SmoothQuantError,
    W8A8Linear,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels.modeling.float_layers import stays_in_float
from smoothquant_kernels.modeling.readers import watched
from smoothquant_kernels.modeling.run import evaluating, output_tensor, run
from smoothquant_kernels.modeling.sample_inputs import runnable_batch
from smoothquant_kernels.modeling.view import ModelView
from tests.support.families import FAMILIES
from tests.support.four_linears import FourLinears, ReadsInTraining, quantized_both_ways
from tests.support.models import EXACT, HIDDEN, VOCAB, skip_reasons, token_batches


class Functional(FourLinears):
    def middle(self, x: Tensor) -> Tensor:
        return self.a(x) + F.linear(self.c(x), self.b.weight, self.b.bias)


def _fused(x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
    return F.linear(torch.relu(F.linear(x, up.weight, up.bias)), down.weight, down.bias)


class Fused(FourLinears):
    def middle(self, x: Tensor) -> Tensor:
        return self.c(x) + _fused(x, down=self.a, up=self.b)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()


class Custom(FourLinears):
    def middle(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = Product.apply(x, layer.weight)  # type: ignore[no-untyped-call]
        return self.c(x)


class Called(FourLinears):
    """Reads only the type of a weight, and calls `forward` directly."""

    def middle(self, x: Tensor) -> Tensor:
        if isinstance(self.a.weight, Tensor) and self.a.weight.dtype.is_complex:
            x = x.real
        return self.c(self.b.forward(self.a(x)))


class Long(FourLinears):
    """Only inputs that are longer than any sample reach the path that reads a weight and a norm's output."""

    def middle(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.c(x)
        return y + (F.linear(y, self.b.weight) + x if x.shape[1] > 40 else self.b(y))


class Asking(FourLinears):
    """Asks two modules for their type in the usual way. One would have no parameter left, the other one would."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))  # type: ignore[assignment]
        self.c = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN))  # type: ignore[assignment]

    def middle(self, x: Tensor) -> Tensor:
        x = self.b(x.to(next(self.b.parameters()).dtype))
        return self.c(self.a(x).to(next(self.c.parameters()).dtype))


class Described(nn.Linear):
    """A linear with more arguments and methods than nn.Linear, most of which are not used."""

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(self.same(input))

    def same(self, x: Tensor) -> Tensor:
        return x

    def size(self) -> int:
        return self.in_features


class Using(FourLinears):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Described(HIDDEN, HIDDEN) for _ in range(4))

    def middle(self, x: Tensor) -> Tensor:
        return self.d(input=self.c(self.b(self.a(x, scale=0.5)), 2.0)) / self.d.size()


READERS: dict[str, tuple[type[FourLinears], set[str]]] = {
    "functional": (Functional, {"b"}),
    "helper": (Fused, {"a", "b"}),
    "autograd function": (Custom, {"a", "b"}),
    "types": (Called, set()),
    "training": (ReadsInTraining, set()),
    "long": (Long, {"b"}),
}


@pytest.mark.parametrize("case", READERS)
def test_layers_that_others_read_stay_in_float(case: str) -> None:
    kind, expected = READERS[case]
    model = kind().eval()
    ids = token_batches()[0]
    y = model(ids)
    for made in quantized_both_ways(model):
        skipped = skip_reasons(made)
        assert skipped.keys() == expected
        assert all(
            r.endswith("reads its parameters from outside: stays in float")
            for r in skipped.values()
        )
        int8 = {n for n, m in made.named_modules() if isinstance(m, W8A8Linear)}
        assert int8 == {"a", "b", "c", "head"} - expected
        # int8 rounds each operand in a few layers, which costs one or two percent.
        assert (made(ids) - y).norm() < 0.1 * y.norm()


@pytest.mark.parametrize("case", ["functional", "helper", "autograd function"])
def test_without_a_run_the_source_shows_the_readers(case: str) -> None:
    kind, expected = READERS[case]
    found = stays_in_float(ModelView(kind()), ["a", "b", "c", "head"], None)
    assert found == dict.fromkeys(
        expected, f"{kind.__name__} reads its parameters from outside: stays in float"
    )


def test_a_module_that_reads_its_dtype_keeps_a_parameter() -> None:
    model = Asking().eval()
    ids = token_batches()[0]
    y = model(ids)
    for made in quantized_both_ways(model):
        skipped = skip_reasons(made)
        assert skipped == {
            "b.0": "Sequential asks its parameters for their type, and this is its first: stays in float"
        }
        assert (made(ids) - y).norm() < 0.1 * y.norm()


def test_a_layer_stays_in_float_if_its_extra_features_are_used() -> None:
    model = Using().eval()
    ids = token_batches()[0]
    y = model(ids)
    for made in quantized_both_ways(model):
        skipped = skip_reasons(made)
        assert skipped == {
            "a": "it is called with scale, which an int8 layer does not have: stays in float",
            "c": "it is called with a second argument, which an int8 layer does not have: stays in float",
            "d": "the model calls its size, which an int8 layer does not have: stays in float",
        }
        assert (made(ids) - y).norm() < 0.1 * y.norm()
        assert all("size" not in vars(m) and "forward" not in vars(m) for m in made.modules())


def test_a_first_parameter_of_another_dtype_is_not_enough() -> None:
    model = Asking().eval()
    model.c[0], model.c[1] = model.c[1], model.c[0].double()  # type: ignore[index]
    model.c.forward = lambda x: model.c[0](x)  # type: ignore[index, method-assign]
    found = stays_in_float(
        ModelView(model), ["a", "b.0", "b.2", "c.0"], {"input_ids": token_batches()[0]}
    )
    assert found.keys() == {"b.0", "c.0"}


def test_reading_a_dtype_does_not_keep_a_layer_in_float() -> None:
    assert stays_in_float(ModelView(Called()), ["a", "b", "c"], None) == {}


def test_nothing_is_folded_that_only_long_inputs_read() -> None:
    model = Long().eval()
    smoothed = smooth_lm(copy.deepcopy(model), token_batches(), config=EXACT, progress=False)
    ids = torch.arange(64)[None]
    assert torch.equal(smoothed(ids), model(ids))


def test_a_scripted_layer_is_listed() -> None:
    model = Called().eval()
    model.c = torch.jit.script(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()))  # type: ignore[assignment]
    quantize_model(model)
    assert model.smoothquant_info["skipped"] == [  # type: ignore[union-attr, index]
        {"name": "c.0", "reason": "TorchScript: stays in float"}
    ]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_fast_path_of_the_transformer_encoder(norm_first: bool, smooth: bool) -> None:
    """torch takes the fast path, which reads the weights itself, only without hooks. So hooks would not see it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, 48, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model = nn.Sequential(encoder, nn.Linear(HIDDEN, 8)).eval()
    x = torch.randn(2, 6, HIDDEN)
    with torch.no_grad():
        y = model(x)
    made = copy.deepcopy(model)
    if smooth:
        smooth_lm(made, [{"input": x}], config=EXACT, progress=False)
        with torch.no_grad():
            assert torch.equal(made(x), y)
    quantize_model(made)
    assert [n for n, m in made.named_modules() if isinstance(m, W8A8Linear)] == ["1"]
    reasons = skip_reasons(made)
    for name in ("0.layers.0.linear1", "0.layers.1.linear2"):
        assert reasons[name] == (
            "aten._transformer_encoder_layer_fwd reads its parameters from outside: stays in float"
        )
    # The encoder alone has no other layers, so it is refused and left unchanged.
    with pytest.raises(SmoothQuantError, match="all 4 must stay in float"):
        quantize_model(encoder)
    with pytest.raises(SmoothQuantError, match="all 4 must stay in float"):
        smooth_lm(encoder, [{"src": x}], progress=False)
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_layers_that_mambas_scan_reads_stay_in_float() -> None:
    config = t.MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4)
    model = t.MambaForCausalLM(config).eval()
    for made in quantized_both_ways(model):
        int8 = {n.split(".")[-1] for n, m in made.named_modules() if isinstance(m, W8A8Linear)}
        assert int8 == {"in_proj", "x_proj", "out_proj"}
        with evaluating(made):
            assert bool(made(token_batches()[0]).logits.isfinite().all())


def test_watching_restores_the_modules() -> None:
    model = Functional()
    own = model.a.forward
    model.b.forward = lambda x: own(x)  # type: ignore[method-assign]
    seen: list[str] = []
    with watched(
        {"a": model.a, "b": model.b}, seen.append, lambda name, _: seen.append(f"-{name}")
    ):
        model.b(torch.zeros(1, HIDDEN))
    assert seen == ["b", "-b"]
    assert "forward" not in model.a.__dict__ and "forward" in model.b.__dict__
    model.b(torch.zeros(1, HIDDEN))
    assert seen == ["b", "-b"]


@pytest.mark.parametrize("family", ["llama", "mpt", "bert", "t5", "vit", "whisper", "clip"])
def test_a_runnable_batch_is_found(family: str) -> None:
    """The search changes neither the random state nor the model's mode."""
    model = FAMILIES[family].make().train()
    state = torch.get_rng_state()
    batch = runnable_batch(model)
    assert batch is not None and torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    with evaluating(model):
        assert bool(output_tensor(run(model, batch)).isfinite().all())


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        return F.linear(self.a(parts["x"]), self.b.weight)


def test_a_model_that_cannot_be_run_is_judged_by_its_source() -> None:
    model = Odd().eval()
    assert runnable_batch(model) is None
    quantize_model(model)
    assert [n for n, m in model.named_modules() if isinstance(m, W8A8Linear)] == ["a"]
