"""Which linears are grouped and which producers are proved, per family and with planted defects."""

from __future__ import annotations

import pytest
import torch
from models import CONFIGS, GQA, HIDDEN, VOCAB, make_model, token_batches
from torch import nn

from smoothquant_kernels.groups import find_groups
from smoothquant_kernels.modules import partition_linears

_LLAMA = {
    "q_proj k_proj v_proj": "input_layernorm",
    "gate_proj up_proj": "post_attention_layernorm",
    "down_proj": "up_proj",
}
# Per decoder layer: the linears that read one tensor -> what can absorb their factors.
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
        "fc2": "fc1",  # behind a ReLU
    },
    "bloom": {
        "query_key_value": "input_layernorm",
        "dense": None,
        "dense_h_to_4h": "post_attention_layernorm",
        "dense_4h_to_h": None,  # behind a GELU
    },
    # the residual branch reads the norms' outputs as well
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


def found(model: nn.Module, **options: str) -> dict[tuple[str, ...], str | None]:
    linears, _ = partition_linears(model)
    groups = find_groups(model, linears, {"input_ids": token_batches()[0]}, **options)
    return {g.linears: g.producer for g in groups}


@pytest.mark.parametrize("family", CONFIGS)
def test_groups_of_each_family(family: str) -> None:
    """Every layer has exactly the expected groups with the expected producers, and nothing else."""
    result = found(make_model(family))
    layers: dict[str, dict[str, str | None]] = {}
    for names, producer in result.items():
        layer = next(part for part in names[0].split(".") if part.isdigit())
        # shortest suffixes that the table uses
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
    assert set(found(make_model("opt"), folding="never").values()) == {None}


class Block(nn.Module):
    """norm -> two linears, with room for defects that a mapping table would not notice."""

    def __init__(self, defect: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.defect = defect
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.a = nn.Linear(HIDDEN, HIDDEN)
        self.b = nn.Linear(HIDDEN, HIDDEN)
        self.hidden_reader = nn.Parameter(torch.randn(HIDDEN))
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
        return self.other_norm(y)


def test_block_without_defect() -> None:
    assert found(Block()) == {("a", "b"): "norm"}


@pytest.mark.parametrize(
    "defect",
    ["shared norm weight", "residual", "hidden consumer", "view", "called twice", "norm twice"],
)
def test_planted_consumers_are_caught(defect: str) -> None:
    result = found(Block(defect))
    if defect == "called twice":
        # `a` has two inputs, so `b` is alone with the norm, which `a` reads too
        assert result == {("a",): None, ("b",): None}
    else:
        assert result == {("a", "b"): None}


class Gated(nn.Module):
    """Two linears meet in a product; only one of them may take the factors."""

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
        elif self.function == "leaky_relu":
            h = torch.nn.functional.leaky_relu(up)
        elif self.function == "sum":
            h = up + gate
        else:  # the producer is read again behind the gate
            h = up * torch.sigmoid(gate)
            return self.down(h) + up.mean(-1, keepdim=True)
        return self.down(h)


@pytest.mark.parametrize(
    ("function", "producer"),
    [("product", "up"), ("gelu", None), ("leaky_relu", "up"), ("sum", None), ("read again", None)],
)
def test_linear_producers_are_probed(function: str, producer: str | None) -> None:
    model = Gated(function)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    groups = find_groups(model, ["up", "gate", "down"], {"x": x})
    assert [(g.linears, g.producer) for g in groups] == [
        (("up", "gate"), None),
        (("down",), producer),
    ]
    assert all(g.reason for g in groups if g.producer is None)


def test_probe_survives_half_precision() -> None:
    """Powers of two are exact in bfloat16 and float16 too: the same producers are proved."""
    for dtype in (torch.bfloat16, torch.float16):
        result = found(make_model("llama", dtype=dtype))
        assert sum(p is not None for p in result.values()) == 8, (dtype, result)


def test_gqa_keeps_the_runtime_division_with_a_reason() -> None:
    model = make_model("llama_gqa")
    assert GQA["num_key_value_heads"] == 2
    linears, _ = partition_linears(model)
    groups = find_groups(model, linears, {"input_ids": token_batches()[0]})
    reasons = {g.reason for g in groups if g.linears[0].endswith("o_proj")}
    assert reasons == {"no producer scales its channels one by one"}
