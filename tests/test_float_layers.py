"""Layers that stay in float because of what the model does with them: their weight is read by others, or they select."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as t
from families import FAMILIES
from models import HIDDEN, VOCAB, token_batches
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels._float_layers import stays_in_float
from smoothquant_kernels._readers import watched
from smoothquant_kernels._sample_inputs import runnable_batch
from smoothquant_kernels.modules import evaluating, output_tensor, run

EXACT = SmoothQuantConfig(smooth_rounding="power_of_two", only_where_better=False)


class Model(nn.Module):
    """Embedding, norm and four linears; subclasses say what they do with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.a, self.b, self.c = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        y: Tensor = self.head(self.middle(x))
        return y

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Functional(Model):
    def middle(self, x: Tensor) -> Tensor:
        return self.a(x) + F.linear(self.c(x), self.b.weight, self.b.bias)


def _fused(x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
    return F.linear(torch.relu(F.linear(x, up.weight, up.bias)), down.weight, down.bias)


class Fused(Model):
    def middle(self, x: Tensor) -> Tensor:
        return self.c(x) + _fused(x, down=self.a, up=self.b)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.t()


class Custom(Model):
    def middle(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            x = Product.apply(x, layer.weight)  # type: ignore[no-untyped-call]
        return self.c(x)


class Called(Model):
    """Looks at types only, and calls `forward` itself."""

    def middle(self, x: Tensor) -> Tensor:
        if isinstance(self.a.weight, Tensor) and x.dtype != self.a.weight.dtype:
            x = x.to(self.a.weight.dtype)
        return self.c(self.b.forward(self.a(x)))


class Training(Model):
    """A path that inference does not take."""

    def middle(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.b.weight, self.b.bias) if self.training else self.b(x)
        return self.c(self.a(y))


READERS: dict[str, tuple[type[Model], set[str]]] = {
    "functional": (Functional, {"b"}),
    "helper": (Fused, {"a", "b"}),
    "autograd function": (Custom, {"a", "b"}),
    "types": (Called, set()),
    "training": (Training, set()),
}


def both_ways(model: nn.Module) -> list[nn.Module]:
    """Quantized without data, and smoothed before."""
    smoothed = smooth_lm(copy.deepcopy(model), token_batches(), config=EXACT, progress=False)
    return [quantize_model(copy.deepcopy(model)), quantize_model(smoothed)]


@pytest.mark.parametrize("case", READERS)
def test_layers_that_others_read_stay_in_float(case: str) -> None:
    kind, expected = READERS[case]
    model = kind().eval()
    ids = token_batches()[0]
    y = model(ids)
    for made in both_ways(model):
        skipped = {e["name"]: e["reason"] for e in made.smoothquant_info["skipped"]}  # type: ignore[union-attr, index]
        assert skipped.keys() == expected
        assert all(
            r.endswith("reads its parameters from outside: stays in float")
            for r in skipped.values()
        )
        int8 = {n for n, m in made.named_modules() if isinstance(m, W8A8Linear)}
        assert int8 == {"a", "b", "c", "head"} - expected
        # one int8 rounding of each operand in a few layers: a percent or two
        assert (made(ids) - y).norm() < 0.1 * y.norm()


@pytest.mark.parametrize("case", ["functional", "helper", "autograd function"])
def test_the_source_tells_where_nothing_can_be_run(case: str) -> None:
    kind, expected = READERS[case]
    found = stays_in_float(kind(), ["a", "b", "c", "head"], None)
    assert found == dict.fromkeys(
        expected, f"{kind.__name__} reads its parameters from outside: stays in float"
    )


def test_the_source_is_not_asked_about_types() -> None:
    for kind in (Called, *(type(m) for m in ())):
        assert stays_in_float(kind(), ["a", "b", "c"], None) == {}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_fast_path_of_the_transformer_encoder(norm_first: bool, smooth: bool) -> None:
    """It is what runs without hooks, and reads the weights itself: with hooks it would not be seen."""
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
    reasons = {e["name"]: e["reason"] for e in made.smoothquant_info["skipped"]}  # type: ignore[union-attr, index]
    for name in ("0.layers.0.linear1", "0.layers.1.linear2"):
        assert reasons[name] == (
            "aten._transformer_encoder_layer_fwd reads its parameters from outside: stays in float"
        )
    # the encoder alone has nothing else: refused, and as it was
    with pytest.raises(SmoothQuantError, match="all 4 must stay in float"):
        quantize_model(encoder)
    with pytest.raises(SmoothQuantError, match="all 4 must stay in float"):
        smooth_lm(encoder, [{"src": x}], progress=False)
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_mamba_keeps_what_its_scan_reads() -> None:
    config = t.MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4)
    model = t.MambaForCausalLM(config).eval()
    for made in both_ways(model):
        int8 = {n.split(".")[-1] for n, m in made.named_modules() if isinstance(m, W8A8Linear)}
        assert int8 == {"in_proj", "x_proj", "out_proj"}
        with evaluating(made):
            assert bool(made(token_batches()[0]).logits.isfinite().all())


def test_watching_leaves_no_trace() -> None:
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
def test_a_batch_is_found_that_the_model_takes(family: str) -> None:
    """And neither the random state nor the model's mode shows that it was tried."""
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


def test_a_model_that_cannot_be_run_is_read() -> None:
    model = Odd().eval()
    assert runnable_batch(model) is None
    quantize_model(model)
    assert [n for n, m in model.named_modules() if isinstance(m, W8A8Linear)] == ["a"]


# --- selection --------------------------------------------------------------------------------------------------------


class Choosing(Model):
    """A mixture of three experts, behind a linear whose name says nothing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.w, self.noise = nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 3)
        self.parts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.correction = nn.Parameter(torch.zeros(3))

    def middle(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h + WAYS[self.how][0](self, h)


def _sum_of(model: Choosing, h: Tensor, chosen: list[Tensor]) -> Tensor:
    y = torch.zeros_like(h)
    for part, rows in zip(model.parts, chosen, strict=True):
        y[rows] = y[rows] + part(h[rows])
    return y


def _topk(model: Choosing, h: Tensor, scores: Tensor) -> Tensor:
    best = scores.topk(2).indices
    return _sum_of(model, h, [(best == i).any(-1) for i in range(3)])


def _softmax(m: Choosing, h: Tensor) -> Tensor:
    return _topk(m, h, F.softmax(m.w(h), -1))


def _sigmoid(m: Choosing, h: Tensor) -> Tensor:
    return _topk(m, h, m.w(h).float().sigmoid() + m.correction)


def _noisy(m: Choosing, h: Tensor) -> Tensor:
    return _topk(m, h, m.w(h) + F.softplus(m.noise(h)))


def _argmax(m: Choosing, h: Tensor) -> Tensor:
    best = m.w(h).argmax(-1)
    return _sum_of(m, h, [best == i for i in range(3)])


def _one_hot(m: Choosing, h: Tensor) -> Tensor:
    hot = F.one_hot(m.w(h).argmax(-1), 3).to(h.dtype)
    return sum((hot[..., i, None] * p(h) for i, p in enumerate(m.parts)), torch.zeros_like(h))


def _threshold(m: Choosing, h: Tensor) -> Tensor:
    return _sum_of(m, h, list((m.w(h).sigmoid() > 0.5).unbind(-1)))


def _python(m: Choosing, h: Tensor) -> Tensor:
    best = m.w(h).argmax(-1).reshape(-1).tolist()
    rows = h.reshape(-1, HIDDEN)
    return torch.stack([m.parts[i](row) for i, row in zip(best, rows, strict=True)]).view_as(h)


def _tokens(m: Choosing, h: Tensor) -> Tensor:
    """A mixture of depths: only some tokens go through the layer."""
    index = m.w(h)[..., :1].topk(4, dim=1).indices.expand(-1, -1, HIDDEN)
    return torch.zeros_like(h).scatter_add(1, index, m.parts[0](h.gather(1, index)))


def _soft(m: Choosing, h: Tensor) -> Tensor:
    p = m.w(h).softmax(-1)
    return sum((p[..., i, None] * e(h) for i, e in enumerate(m.parts)), torch.zeros_like(h))


def _max_pool(m: Choosing, h: Tensor) -> Tensor:
    return m.parts[0](h).max(1, keepdim=True)[0] + m.w(h).amax(-1, keepdim=True)


def _clip(m: Choosing, h: Tensor) -> Tensor:
    y = m.parts[0](h)
    y[y > 1] = 1.0
    return y + m.w(h).clamp(0, 1).sum(-1, keepdim=True)


WAYS: dict[str, tuple[Callable[[Choosing, Tensor], Tensor], dict[str, str]]] = {
    "softmax": (_softmax, {"w": "topk"}),
    "sigmoid": (_sigmoid, {"w": "topk"}),
    "noisy": (_noisy, {"w": "topk", "noise": "topk"}),
    "argmax": (_argmax, {"w": "argmax"}),
    "one hot": (_one_hot, {"w": "argmax"}),
    "threshold": (_threshold, {"w": "gt"}),
    "python": (_python, {"w": "argmax"}),
    "tokens": (_tokens, {"w": "topk"}),
    # these weigh, pool or edit: nothing is chosen by them
    "soft": (_soft, {}),
    "max pool": (_max_pool, {}),
    "clip": (_clip, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_selects_stays_in_float(way: str) -> None:
    model = Choosing(way).eval()
    for made in both_ways(model):
        skipped = {e["name"]: e["reason"] for e in made.smoothquant_info["skipped"]}  # type: ignore[union-attr, index]
        assert skipped == {
            name: f"aten.{op} reads its output: it selects, and stays in float"
            for name, op in WAYS[way][1].items()
        }
        for name in skipped:
            kept = made.get_submodule(name).state_dict()
            assert all(
                torch.equal(v, kept[k]) for k, v in model.get_submodule(name).state_dict().items()
            )


def test_a_token_that_is_only_returned_is_no_choice() -> None:
    class Greedy(Training):
        def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            logits = super().forward(input_ids)
            return logits, logits.argmax(-1)

    model = Greedy().eval()
    assert stays_in_float(model, ["a", "b", "c", "head"], {"input_ids": token_batches()[0]}) == {}


class Named(nn.Module):
    """As code has it that cannot be run here: only names are left."""

    def __init__(self, experts: int, out: int) -> None:
        super().__init__()
        self.gate = nn.Linear(8, out)
        self.my_router = nn.Sequential(nn.Linear(8, 5))
        self.shared_expert_gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        return self.gate(parts["x"])


def test_names_tell_where_nothing_can_be_run() -> None:
    linears = ["gate", "my_router.0", "shared_expert_gate", "experts.0"]
    assert stays_in_float(Named(4, 4), linears, None) == {
        "gate": "it has as many outputs as experts has experts: it selects, and stays in float",
        "my_router.0": "its name says that it is a router: it selects, and stays in float",
    }
    assert stays_in_float(Named(4, 3), linears, None).keys() == {"my_router.0"}


def test_gemma_4_keeps_its_routers() -> None:
    config = t.Gemma4TextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, intermediate_size=48,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"],
        sliding_window=16, num_kv_shared_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    for made in both_ways(t.Gemma4ForCausalLM(config).eval()):
        routers = {n: m for n, m in made.named_modules() if n.endswith("router.proj")}
        assert len(routers) == 2 and not any(isinstance(m, W8A8Linear) for m in routers.values())
        reasons = {e["name"]: e["reason"] for e in made.smoothquant_info["skipped"]}  # type: ignore[union-attr, index]
        assert {reasons[n] for n in routers} == {
            "aten.topk reads its output: it selects, and stays in float"
        }


def test_a_router_that_moves_tokens_does_not_stop_the_probing() -> None:
    """Switch: probing changes which expert gets how many tokens, so that shapes differ from the recorded ones."""
    config = t.SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_experts=4, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = t.SwitchTransformersForConditionalGeneration(config).eval()
    batch = {"input_ids": token_batches()[0], "decoder_input_ids": token_batches()[0][:, :6]}
    y = model(**batch).logits
    smooth_lm(model, [batch], config=EXACT, progress=False)
    assert torch.equal(model(**batch).logits, y)
