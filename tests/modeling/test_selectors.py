"""Linears that select experts or tokens stay in float, whatever their class and name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import W8A8Linear, smooth_lm
from smoothquant_kernels.modeling.float_layers import stays_in_float
from smoothquant_kernels.modeling.view import ModelView
from tests.support.four_linears import FourLinears, ReadsInTraining, quantized_both_ways
from tests.support.models import EXACT, HIDDEN, VOCAB, skip_reasons, token_batches


class Choosing(FourLinears):
    """A mixture of three experts, which a linear with a neutral name selects."""

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
    """A mixture of depths: the layer processes only some tokens."""
    index = m.w(h)[..., :1].topk(4, dim=1).indices.expand(-1, -1, HIDDEN)
    return torch.zeros_like(h).scatter_add(1, index, m.parts[0](h.gather(1, index)))


def _hot(m: Choosing, h: Tensor, index: Tensor) -> Tensor:
    hot = F.one_hot(index, 3).to(h.dtype)
    return sum((hot[..., i, None] * p(h) for i, p in enumerate(m.parts)), torch.zeros_like(h))


def _gates(m: Choosing, h: Tensor, gates: Tensor) -> Tensor:
    return sum((gates[..., i, None] * p(h) for i, p in enumerate(m.parts)), torch.zeros_like(h))


def _kth_largest(m: Choosing, h: Tensor) -> Tensor:
    """Selects by value, not by index: it masks everything below the second largest value."""
    y = m.w(h)
    second = y.sort(-1, descending=True).values[..., 1:2]
    return _gates(m, h, y.masked_fill(y < second, float("-inf")).softmax(-1))


def _is_largest(m: Choosing, h: Tensor) -> Tensor:
    y = m.w(h)
    return _gates(m, h, (y == y.amax(-1, keepdim=True)).to(h.dtype))


def _if_larger(m: Choosing, h: Tensor) -> Tensor:
    y = m.w(h).mean((0, 1))
    return m.parts[0](h) if y[0] > y[1] else m.parts[1](h)


def _rounded(m: Choosing, h: Tensor) -> Tensor:
    return _hot(m, h, (m.w(h)[..., 0].sigmoid() * 2).round().long())


def _bucket(m: Choosing, h: Tensor) -> Tensor:
    return _hot(m, h, torch.bucketize(m.w(h)[..., 0], torch.tensor([-0.1, 0.1])))


def _bits(m: Choosing, h: Tensor) -> Tensor:
    """Hashing: the signs are the bits of an expert's number."""
    return _hot(m, h, ((m.w(h) > 0).long() * torch.tensor([1, 1, 0])).sum(-1))


def _sparse(m: Choosing, h: Tensor) -> Tensor:
    """A ReLU router: each expert takes the rows with a nonzero weight."""
    gates = m.w(h).relu().flatten(0, -2)
    rows, y = h.flatten(0, -2), torch.zeros_like(h).flatten(0, -2)
    for i, part in enumerate(m.parts):
        index = gates[:, i].nonzero()[:, 0]
        y = y.index_add(0, index, part(rows[index]))
    return y.view_as(h)


def _or_not(m: Choosing, h: Tensor) -> Tensor:
    """A mixture of depths that computes both paths and selects one for each token."""
    return torch.where(m.w(h)[..., :1] > 0, m.parts[0](h), h)


def _numpy(m: Choosing, h: Tensor) -> Tensor:
    return _hot(m, h, torch.from_numpy(m.w(h).detach().numpy().argmax(-1)))


def _list(m: Choosing, h: Tensor) -> Tensor:
    rows = m.w(h).softmax(-1).reshape(-1, 3).tolist()
    return _hot(m, h, torch.tensor([r.index(max(r)) for r in rows]).view(h.shape[:-1]))


def _checked(m: Choosing, h: Tensor) -> Tensor:
    """Guards against NaN, infinity and values out of range. They select nothing."""
    y = m.w(h)
    if bool(torch.isinf(y).any()) or bool(torch.isnan(y).any()) or float(y.abs().max()) > 1e4:
        y = torch.where(y != y, torch.zeros_like(y), y).clamp(-1e4, 1e4)
    return _gates(m, h, torch.where(y > 0, y, 0.1 * y))


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
    "k-th largest": (_kth_largest, {"w": "lt"}),
    "is largest": (_is_largest, {"w": "eq"}),
    "if larger": (_if_larger, {"w": "gt"}),
    "rounded": (_rounded, {"w": "_to_copy"}),
    "bucket": (_bucket, {"w": "bucketize"}),
    "bits": (_bits, {"w": "gt"}),
    "sparse": (_sparse, {"w": "nonzero"}),
    "or not": (_or_not, {"w": "gt"}),
    "numpy": (_numpy, {"w": "Tensor.numpy"}),
    "list": (_list, {"w": "Tensor.tolist"}),
    # These weight, pool or edit, but select nothing.
    "soft": (_soft, {}),
    "max pool": (_max_pool, {}),
    "clip": (_clip, {}),
    "checked": (_checked, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_selecting_linears_stay_in_float(way: str) -> None:
    model = Choosing(way).eval()
    for made in quantized_both_ways(model):
        skipped = skip_reasons(made)
        assert skipped == {
            name: f"{op if '.' in op else f'aten.{op}'} reads its output: it selects, and stays in float"
            for name, op in WAYS[way][1].items()
        }
        for name in skipped:
            kept = made.get_submodule(name).state_dict()
            assert all(
                torch.equal(v, kept[k]) for k, v in model.get_submodule(name).state_dict().items()
            )


def test_an_argmax_that_is_only_returned_selects_nothing() -> None:
    class Greedy(ReadsInTraining):
        def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            logits = super().forward(input_ids)
            return logits, logits.argmax(-1)

    model = Greedy().eval()
    assert (
        stays_in_float(ModelView(model), ["a", "b", "c", "head"], {"input_ids": token_batches()[0]})
        == {}
    )


class Named(nn.Module):
    """A model that cannot be run, so that only its names are known."""

    def __init__(self, experts: int, out: int) -> None:
        super().__init__()
        self.gate = nn.Linear(8, out)
        self.my_router = nn.Sequential(nn.Linear(8, 5))
        self.shared_expert_gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, parts: dict[str, Tensor]) -> Tensor:
        return self.gate(parts["x"])


def test_without_a_run_names_show_the_routers() -> None:
    linears = ["gate", "my_router.0", "shared_expert_gate", "experts.0"]
    assert stays_in_float(ModelView(Named(4, 4)), linears, None) == {
        "gate": "it has as many outputs as experts has experts: it selects, and stays in float",
        "my_router.0": "its name says that it is a router: it selects, and stays in float",
    }
    assert stays_in_float(ModelView(Named(4, 3)), linears, None).keys() == {"my_router.0"}


def test_gemma_4_keeps_its_routers() -> None:
    config = t.Gemma4TextConfig(
        vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=8, intermediate_size=48,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=24,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"],
        sliding_window=16, num_kv_shared_layers=0,
    )  # fmt: skip
    torch.manual_seed(0)
    for made in quantized_both_ways(t.Gemma4ForCausalLM(config).eval()):
        routers = {n: m for n, m in made.named_modules() if n.endswith("router.proj")}
        assert len(routers) == 2 and not any(isinstance(m, W8A8Linear) for m in routers.values())
        reasons = skip_reasons(made)
        assert {reasons[n] for n in routers} == {
            "aten.topk reads its output: it selects, and stays in float"
        }


def test_a_router_that_moves_tokens_does_not_stop_the_probing() -> None:
    """In Switch, a probe changes how many tokens an expert gets, so shapes differ from the recorded ones."""
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
