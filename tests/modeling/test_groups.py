"""Which linears form a group and which producers are proved, for each family and with planted defects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smoothquant_kernels import calibrate_model, smooth_lm
from smoothquant_kernels.modeling import groups as groups_module
from smoothquant_kernels.modeling.float_layers import stays_in_float
from smoothquant_kernels.modeling.groups import find_groups
from smoothquant_kernels.modeling.view import ModelView
from tests.support.models import (
    CONFIGS,
    EXACT,
    GQA,
    HIDDEN,
    VOCAB,
    layers_of,
    make_model,
    skip_reasons,
    token_batches,
)

_LLAMA = {
    "q_proj k_proj v_proj": "input_layernorm",
    "gate_proj up_proj": "post_attention_layernorm",
    "down_proj": "up_proj",
}
# For each decoder layer: the linears that read one tensor -> the module that can absorb their factors.
EXPECTED: dict[str, dict[str, str | None]] = {
    "llama": {**_LLAMA, "o_proj": "v_proj"},
    "llama_gqa": {**_LLAMA, "o_proj": None},
    "llama_bias": {**_LLAMA, "o_proj": "v_proj"},
    "mistral": {**_LLAMA, "o_proj": None},
    "qwen2": {**_LLAMA, "o_proj": None},
    "qwen3": {**_LLAMA, "o_proj": None},
    "opt": {
        "q_proj k_proj v_proj": "self_attn_layer_norm",
        "out_proj": "v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",  # after a ReLU
    },
    "bloom": {
        "query_key_value": "input_layernorm",
        "dense": None,
        "dense_h_to_4h": "post_attention_layernorm",
        "dense_4h_to_h": None,  # after a GELU
    },
    # The residual branch also reads the norms' outputs.
    "bloom_post": dict.fromkeys(["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "gpt_neox": {
        "query_key_value": "input_layernorm",
        "dense": None,
        "dense_h_to_4h": "post_attention_layernorm",
        "dense_4h_to_h": None,
    },
    "gpt2": {"c_attn": "ln_1", "attn.c_proj": None, "c_fc": "ln_2", "mlp.c_proj": None},
}
EXPECTED["gpt_neox_serial"] = EXPECTED["gpt_neox"]


def found(model: nn.Module, **options: bool) -> dict[tuple[str, ...], str | None]:
    linears = ModelView(model).linears
    groups = find_groups(ModelView(model), linears, {"input_ids": token_batches()[0]}, **options)
    return {g.linears: g.producer for g in groups}


@pytest.mark.parametrize("family", CONFIGS)
def test_groups_of_each_family(family: str) -> None:
    """Every layer has exactly the expected groups with the expected producers."""
    result = found(make_model(family))
    layers: dict[str, dict[str, str | None]] = {}
    for names, producer in result.items():
        layer = next(part for part in names[0].split(".") if part.isdigit())
        # The table uses the shortest unambiguous suffixes.
        key = " ".join(_short(name, family) for name in names)
        layers.setdefault(layer, {})[key] = producer and producer.rsplit(".", 1)[-1]
    assert layers == {"0": EXPECTED[family], "1": EXPECTED[family]}


def _short(name: str, family: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if family == "gpt2" and parts[-1] == "c_proj" else parts[-1]


def test_finding_groups_changes_nothing() -> None:
    model = make_model("opt").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found(model)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_folding_never() -> None:
    assert set(found(make_model("opt"), fold=False).values()) == {None}


class Block(nn.Module):
    """norm -> two linears, with a choice of defects that a table of module names would miss."""

    def __init__(self, defect: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.defect = defect
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.a = nn.Linear(HIDDEN, HIDDEN)
        self.b = nn.Linear(HIDDEN, HIDDEN)
        self.hidden_reader = nn.Parameter(torch.randn(HIDDEN))
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN))
        self.zeros = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))
        self.rare = nn.Linear(HIDDEN, HIDDEN)
        self.other_norm = nn.LayerNorm(HIDDEN)
        if defect == "shared norm weight":
            self.other_norm.weight = self.norm.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        y = self.a(h) + torch.tanh(self.b(h))
        if self.defect == "residual":
            y = y + h
        elif self.defect == "hidden consumer":
            y = y + (h * self.hidden_reader).sum(-1, keepdim=True)
        elif self.defect == "view":
            y = y + torch.tanh(h.view(-1)[: HIDDEN // 2]).sum() * self.hidden_reader
        elif self.defect == "called twice":
            y = y + self.a(torch.relu(x))
        elif self.defect == "norm twice":
            y = y + self.norm(y)
        elif self.defect == "functional linear":
            y = y + nn.functional.linear(h, self.weight)
        elif self.defect == "functional linear of zeros":
            y = y + nn.functional.linear(h, self.zeros)
        elif self.defect == "negligible":
            y = y + 1e-30 * (h @ self.weight)
        elif self.defect == "times zero":
            y = y + 0.0 * h
        elif self.defect == "scale-invariant":
            y = y + torch.sign(h)
        elif self.defect == "outvoted router":
            # Always chooses the second expert, whatever h is.
            votes = torch.stack([h.mean(-1), h.mean(-1) + 1e6], -1)
            y = torch.where(votes.argmax(-1, keepdim=True) == 1, y, -y)
        elif self.defect == "python branch":
            y = -y if float(h.abs().max()) > 1e6 else y
        elif self.defect == "no token for the expert":
            chosen = (input_ids == VOCAB).nonzero(as_tuple=True)  # no token has this id
            y = y.index_put(chosen, h[chosen] @ self.weight, accumulate=True)
        elif self.defect == "expert not called":
            y = self.rare(h) if int(input_ids.max()) >= VOCAB else y
        elif self.defect == "norm's weight read":
            y = y + 0.0 * self.norm.weight
        elif self.defect == "linear's weight read":
            y = y + 0.0 * nn.functional.linear(x, self.a.weight)
        elif self.defect == "in place":
            h.clamp_(-1e6, 1e6)
        y = self.other_norm(y)
        return (y, h) if self.defect == "returned" else y  # type: ignore[return-value]


def found_in_block(defect: str = "") -> dict[tuple[str, ...], str | None]:
    model = Block(defect)
    if defect != NOT_CALLED:
        del model.rare  # a linear that does not run but could read the norm is a defect of its own
    return found(model)


def test_block_without_defect() -> None:
    assert found_in_block() == {("a", "b"): "norm"}


# Readers that change no output on the sample: comparing outputs alone would allow folding into the norm.
UNSEEN = [
    *(
        "functional linear of zeros",
        "negligible",
        "times zero",
        "scale-invariant",
        "outvoted router",
    ),
    *("python branch", "no token for the expert", "norm's weight read", "linear's weight read"),
    "in place",
]
# Defects of other kinds.
RETURNED, NOT_CALLED = "returned", "expert not called"


@pytest.mark.parametrize(
    "defect",
    [
        *("shared norm weight", "residual", "hidden consumer", "view", "called twice"),
        *("norm twice", "functional linear"),
        *(*UNSEEN, RETURNED, NOT_CALLED),
    ],
)
def test_planted_readers_are_caught(defect: str) -> None:
    result = found_in_block(defect)
    if defect == NOT_CALLED:
        assert result == {("a", "b"): None, ("rare",): None}
    elif defect == "called twice":
        # `a` has two inputs, so `b` forms a group alone, and `a` also reads its norm.
        assert result == {("a",): None, ("b",): None}
    else:
        assert result == {("a", "b"): None}


@pytest.mark.parametrize("defect", UNSEEN)
def test_outputs_alone_do_not_show_every_reader(
    defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only following the operations catches these readers."""
    monkeypatch.setattr(groups_module, "_hidden_readers", lambda *_: {})
    assert found_in_block(defect) == {("a", "b"): "norm"}


def test_the_reason_names_the_reader() -> None:
    model = Block("scale-invariant")
    del model.rare
    groups = find_groups(ModelView(model), ["a", "b"], {"input_ids": token_batches()[0]})
    assert [g.reason for g in groups] == [
        "norm is read by something else as well (aten.sign reads it)"
    ]


def test_operators_that_cannot_be_followed_are_not_an_error() -> None:
    """Some operators, such as flex attention, refuse to run under a dispatch mode. Their groups divide at run time."""

    class Unfollowed(Block):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
                raise NotImplementedError("no rule for this mode\nmore")
            return super().forward(input_ids)

    model = Unfollowed()
    del model.rare
    (group,) = find_groups(ModelView(model), ["a", "b"], {"input_ids": token_batches()[0]})
    assert group.producer is None
    assert group.reason == (
        "norm is read by something else as well (cannot be followed: no rule for this mode)"
    )


def test_linears_whose_weight_is_read_elsewhere_stay_in_float() -> None:
    """They stay in float, because quantizing or scaling would change the other reader. Tied ones may be quantized."""
    model = Block("linear's weight read")
    batch = {"input_ids": token_batches()[0]}
    assert stays_in_float(ModelView(model), ["a", "b"], batch) == {
        "a": "aten.t reads its parameters from outside: stays in float"
    }
    model = Block()
    model.b = nn.Linear(HIDDEN, HIDDEN)
    model.b.weight = model.a.weight
    assert stays_in_float(ModelView(model), ["a", "b"], batch) == {}


class Mixture(nn.Module):
    """Experts that are modules: each is called with the tokens that its router chose, if any."""

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.router = nn.Linear(HIDDEN, 16)
        self.up = nn.ModuleList(nn.Linear(HIDDEN, 24) for _ in range(16))
        self.down = nn.ModuleList(nn.Linear(24, HIDDEN) for _ in range(16))
        self.dense = dense

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.embed(input_ids))
        best = self.router(h).argmax(-1)
        y = torch.zeros_like(h)
        for i in range(16):
            chosen = best == i
            if bool(chosen.any()):
                # With `dense`, an expert that is called reads all tokens, and so the norm's output itself.
                x = h if self.dense else h[chosen]
                out = self.down[i](torch.relu(self.up[i](x)))
                y[chosen] += out[chosen] if self.dense else out
        return y


@pytest.mark.parametrize("dense", [False, True])
def test_experts_that_the_sample_does_not_reach_are_smoothed(dense: bool) -> None:
    """They are smoothed by division, and nothing that they may read is folded. The router stays in float."""
    model = Mixture(dense)
    data = token_batches()
    before = [model(ids) for ids in data]
    statistics = calibrate_model(model, data, EXACT, progress=False)
    reached = {n for n in statistics.absmax if n.startswith("up")}
    statistics.sample = {"input_ids": data[0][:1, :2]}  # two tokens reach two experts at most
    smooth_lm(model, statistics, config=EXACT)
    layers = layers_of(model)
    assert {
        n for n in layers if n.startswith("up") and layers[n]["smoothing"] == "runtime"
    } == reached
    assert skip_reasons(model) == {
        "router": "aten.argmax reads its output: it selects, and stays in float"
    }
    silent = [e for e in layers.values() if e["reason"] == "not called on the sample batch"]
    assert len(silent) >= 2 * (len(reached) - 2) > 0
    # Both models add the same numbers over K in the same order, so the results are equal bit for bit.
    assert all(torch.equal(model(ids), y) for ids, y in zip(data, before, strict=True))


class Gated(nn.Module):
    """A product of two linears, only one of which may absorb the factors."""

    def __init__(self, function: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(8, 16)
        self.gate = nn.Linear(8, 16)
        self.down = nn.Linear(16, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.up(x), self.gate(x)
        if self.function == "product":
            h = up * torch.sigmoid(gate)
        elif self.function == "gelu":
            h = torch.nn.functional.gelu(gate) + 0 * up
        elif self.function == "clamp":
            h = up.clamp(-1e6, 1e6) * torch.sigmoid(gate)  # does not clamp any value of the sample
        elif self.function == "its own factor":
            h = up * (up * 0 + 1)
        elif self.function == "leaky_relu":
            h = torch.nn.functional.leaky_relu(up)
        elif self.function == "sum":
            h = up + gate
        else:  # the producer is read again after the gate
            h = up * torch.sigmoid(gate)
            return self.down(h) + up.mean(-1, keepdim=True)
        return self.down(h)


@pytest.mark.parametrize(
    ("function", "producer"),
    [
        ("product", "up"),
        *(("gelu", None), ("leaky_relu", "up"), ("sum", None)),
        *(("read again", None), ("clamp", None), ("its own factor", None)),
    ],
)
def test_linear_producers_are_probed(function: str, producer: str | None) -> None:
    model = Gated(function)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    groups = find_groups(ModelView(model), ["up", "gate", "down"], {"x": x})
    assert [(g.linears, g.producer) for g in groups] == [
        (("up", "gate"), None),
        (("down",), producer),
    ]
    assert all(g.reason for g in groups if g.producer is None)


def test_half_precision_proves_the_same_producers() -> None:
    """Powers of two are exact in bfloat16 and float16 as well, so the same producers are proved."""
    for dtype in (torch.bfloat16, torch.float16):
        result = found(make_model("llama", dtype=dtype))
        assert sum(p is not None for p in result.values()) == 8, (dtype, result)


def test_gqa_divides_at_run_time_and_says_why() -> None:
    model = make_model("llama_gqa")
    assert GQA["num_key_value_heads"] == 2
    linears = ModelView(model).linears
    groups = find_groups(ModelView(model), linears, {"input_ids": token_batches()[0]})
    reasons = {g.reason for g in groups if g.linears[0].endswith("o_proj")}
    assert reasons == {"no producer scales its channels one by one"}
