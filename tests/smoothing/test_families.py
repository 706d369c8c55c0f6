"""Every architecture: smoothing keeps the outputs, records every linear, and agrees with docs/reference/families.md."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    W8A8Experts,
    W8A8Linear,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels.modeling.groups import Group
from smoothquant_kernels.modeling.run import evaluating, output_tensors, run
from smoothquant_kernels.nn.float_linear import is_float_linear, pending_smooth
from smoothquant_kernels.smoothing.smooth import ROUNDINGS, rounding_noise
from tests.support.families import FAMILIES, Batch
from tests.support.family_matrix import PATH, group, page
from tests.support.family_table import TABLE, role, smoothed, table

MIXTURES = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "glm4_moe"),
    *("deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "granite_moe"),
]


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All tensors that the model returns, not only the logits."""
    with evaluating(model):
        return output_tensors(run(model, batch))


def unseen(family: str) -> Batch:
    """Other data than the calibration's, so that a fold that is right only on the sample shows."""
    return FAMILIES[family].inputs(0)


# Their norms multiply by 1 + weight. (1 + w) / s - 1 is rounded even if s is a power of two.
ONE_PLUS = ["qwen3_next", "qwen3_5_moe", "gemma", "gemma2", "gemma3", "nemotron"]


def assert_kept(
    before: list[Tensor], after: list[Tensor], *, exact: bool, bound: float = 1e-5
) -> None:
    """Equal bit for bit, or within a relative 1e-5: every product that is rounded once more adds about 1e-7."""
    assert len(before) == len(after) > 0
    for x, y in zip(before, after, strict=True):
        if exact or not x.is_floating_point():
            assert torch.equal(x, y)
        else:
            # Routers mark the experts that they skip with -inf.
            assert torch.equal(x.isfinite(), y.isfinite())
            x, y = (z.nan_to_num(neginf=0.0) for z in (x, y))
            assert (y - x).abs().max() <= bound * x.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_changes_no_bit_of_any_output(family: str) -> None:
    """With factors that are powers of two, all products and sums round as before."""
    outcome = smoothed(family)
    before, after = (outputs(m, unseen(family)) for m in (outcome.model, outcome.smoothed))
    assert all(bool(t.isfinite().all()) and bool(t.any()) for t in before)
    assert_kept(before, after, exact=family not in ONE_PLUS)
    assert outcome.info["verification"]["bit_exact"] == (family not in ONE_PLUS)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_factors_keep_the_outputs(family: str) -> None:
    outcome = smoothed(family)
    config = SmoothQuantConfig(smooth_rounding="none", only_where_better=False)
    data = [FAMILIES[family].inputs(seed) for seed in (3, 4)]
    model = smooth_lm(copy.deepcopy(outcome.model), data, config=config, progress=False)
    before, after = (outputs(m, unseen(family)) for m in (outcome.model, model))
    # If rounding alone changes the output by more than about 1e-6, the bound is that of `smooth_lm` on these data.
    folded = [Group((e["name"],)) for e in outcome.info["layers"] if e["smoothing"] == "folded"]
    with evaluating(outcome.model):
        noise = rounding_noise(outcome.model, folded, unseen(family), before[0])
    assert_kept(before, after, exact=False, bound=max(1e-5, ROUNDINGS * noise))
    plans = [
        {e["name"]: e["smoothing"] for e in info["layers"]}
        for info in (model.smoothquant_info, outcome.info)
    ]
    # SigLIP's only logit is a difference of large numbers. Folds that change it by more than 1e-5 are undone.
    assert plans[0] == plans[1] or family == "siglip"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_recorded(family: str) -> None:
    outcome = smoothed(family)
    layers = {e["name"]: e for e in outcome.info["layers"]}
    skipped = {e["name"]: e for e in outcome.info["skipped"]}
    linears = {n for n, m in outcome.model.named_modules() if is_float_linear(m)}
    matrices = {
        n.rpartition(".")[0]
        for n, p in outcome.model.named_parameters()
        if p.dim() == 3 and "experts" in n
    }
    experts = {e["name"]: e for e in outcome.info.get("experts", ())}
    assert not layers.keys() & skipped.keys()
    assert layers.keys() | skipped.keys() == linears and experts.keys() == matrices
    assert all(e["reason"] for e in (*layers.values(), *skipped.values(), *experts.values()))
    for name, entry in layers.items():
        assert entry["smoothing"] in ("folded", "runtime"), entry
        divides = pending_smooth(outcome.smoothed.get_submodule(name)) is not None
        assert divides == (entry["smoothing"] == "runtime")
    assert {entry["smoothing"] for entry in experts.values()} <= {"runtime"}
    assert bool(matrices) == (family in MIXTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_int8_model_is_close_to_the_float_model(family: str) -> None:
    if family.startswith("t5") and not hasattr(W8A8Linear, "weight"):
        pytest.xfail("T5 reads the dtype of wo.weight, which W8A8Linear does not have")
    outcome = smoothed(family)
    model = quantize_model(copy.deepcopy(outcome.smoothed))
    quantized = {n for n, m in model.named_modules() if isinstance(m, (W8A8Linear, W8A8Experts))}
    named = (*outcome.info["layers"], *outcome.info.get("experts", ()))
    assert quantized == {e["name"] for e in named}
    assert model.smoothquant_info["skipped"] == outcome.info["skipped"]
    after = outputs(model, unseen(family))
    assert all(bool(t.isfinite().all()) for t in after)
    # int8 rounds each operand by at most 1/254 of its range. A wrong scale or layout causes far more than 25 %.
    for x, y in zip(outputs(outcome.model, unseen(family)), after, strict=True):
        if (
            family in MIXTURES
        ):  # a router may send a token to another expert, so the median token counts
            errors = (y - x).flatten(0, -2).norm(dim=-1) / x.flatten(0, -2).norm(dim=-1)
            assert errors.median() < 0.25
        else:
            assert (y - x).norm() < 0.25 * x.norm()


def test_the_families_page_and_its_table_are_up_to_date() -> None:
    if f"with transformers {transformers.__version__}." not in PATH.read_text(encoding="utf-8"):
        pytest.skip(f"{PATH} was written with another version of transformers")
    for path, text in ((PATH, page()), (TABLE, table())):
        assert path.read_text(encoding="utf-8") == text, (
            f"{path} is out of date: run python -m tests.support.family_table --write, and read the difference"
        )


def test_every_linear_of_the_matrix_has_the_column_of_its_group() -> None:
    """A name that no expression knows would hide among the other linears."""
    other = {
        role(layer["name"]).split(".")[-1]
        for family in FAMILIES
        for layer in smoothed(family).info["layers"]
        if group(role(layer["name"])) == "other linears"
    }
    assert other == {
        *("project_in", "project_out", "shared_expert_gate", "classifier", "dense", "head"),
        *("text_projection", "visual_projection", "vocab_transform"),
    }


# --- outcomes that follow from the architecture, above all where tables of module names are known to be wrong ---------

_QKV = "q_proj k_proj v_proj"
# The ends of the names of linears that read one tensor -> the end of the name of the producer they fold into, or None.
EXPECTED: dict[str, dict[str, str | None]] = {
    # Post-LN: the residual branch starts after the norms.
    "opt_350m": {"fc1": None, "q_proj k_proj v_proj": None, "out_proj": "v_proj", "fc2": "fc1"},
    # The residual branch reads the norms' outputs.
    "bloom_post": {"query_key_value": None, "dense_h_to_4h": None},
    "bloom": {"query_key_value": "input_layernorm", "dense_h_to_4h": "post_attention_layernorm"},
    # One norm feeds both branches.
    "falcon_7b": {"query_key_value dense_h_to_4h": "input_layernorm"},
    "falcon_40b": {"query_key_value": "ln_attn", "dense_h_to_4h": "ln_mlp"},
    "falcon_rw": {
        "query_key_value": "input_layernorm",
        "dense_h_to_4h": "post_attention_layernorm",
    },
    "cohere": {f"{_QKV} gate_proj up_proj": "input_layernorm"},
    "cohere2": {f"{_QKV} gate_proj up_proj": "input_layernorm"},
    "stablelm_parallel": {f"{_QKV} gate_proj up_proj": "input_layernorm"},
    "gptj": {f"{_QKV} fc_in": "ln_1"},
    "phi": {f"{_QKV} fc1": "input_layernorm"},
    # Four norms a layer, of which the post-norms feed only the residual sum.
    "gemma2": {_QKV: "input_layernorm", "gate_proj up_proj": "pre_feedforward_layernorm"},
    "gemma3": {_QKV: "input_layernorm", "gate_proj up_proj": "pre_feedforward_layernorm"},
    "glm4": {_QKV: "input_layernorm", "gate_up_proj": "post_attention_layernorm"},
    # Layer 0 is dense. In layer 1 the router reads the norm.
    "glm4_moe": {
        _QKV: "input_layernorm",
        "mlp.gate_proj mlp.up_proj": "post_attention_layernorm",
        "shared_experts.gate_proj shared_experts.up_proj": None,
        "shared_experts.down_proj": "shared_experts.up_proj",
    },
    "qwen2_moe": {
        _QKV: "input_layernorm",
        "shared_expert.gate_proj shared_expert.up_proj shared_expert_gate": None,
    },
    # The attention reads the residual stream itself.
    "olmo2": {_QKV: None, "gate_proj up_proj": None, "down_proj": "up_proj"},
    # The norms have no weights, and clip_qkv comes between v_proj and o_proj.
    "olmo": {_QKV: None, "gate_proj up_proj": None, "o_proj": None, "down_proj": "up_proj"},
    "deepseek_v3": {
        "q_a_proj kv_a_proj_with_mqa": "input_layernorm",
        "q_b_proj": "q_a_layernorm",
        "kv_b_proj": "kv_a_layernorm",
    },
    "nemotron": {_QKV: "input_layernorm", "up_proj": "post_attention_layernorm", "down_proj": None},
    # The model returns the output of the encoder's last norm, and the cross-attention of every layer reads it.
    "whisper": {
        "encoder_attn.k_proj encoder_attn.v_proj": None,
        "encoder_attn.q_proj": "encoder_attn_layer_norm",
    },
    "t5": {"EncDecAttention.k EncDecAttention.v": None, "SelfAttention.o": "SelfAttention.v"},
    "bert": {
        "query key value": None,
        "intermediate.dense": None,
        "attention.output.dense": "value",
    },
}


@pytest.mark.parametrize("family", EXPECTED)
def test_outcomes_that_follow_from_the_architecture(family: str) -> None:
    layers = smoothed(family).info["layers"]
    for linears, producer in EXPECTED[family].items():
        ends = linears.split()
        for end in ends:
            found = [e for e in layers if f".{e['name']}".endswith(f".{end}")]
            assert found, f"no {end} in {family}"
            for entry in found:
                mates = {role(n).split(".")[-1] for n in entry["group"]}
                assert {e.split(".")[-1] for e in ends} <= mates
                if producer is None:
                    assert entry["smoothing"] == "runtime", entry
                else:
                    assert entry["smoothing"] == "folded", entry
                    assert entry["reason"].endswith(f".{producer}"), entry
                    assert mates == {e.split(".")[-1] for e in ends}


def test_nothing_is_folded_into_post_norms() -> None:
    """In Gemma 2 and 3, the norms after the attention and after the MLP feed only the residual sum."""
    for family in ("gemma2", "gemma3"):
        outcome = smoothed(family)
        post = [
            name
            for name, _ in outcome.model.named_modules()
            if name.endswith(("post_attention_layernorm", "post_feedforward_layernorm"))
        ]
        assert len(post) == 4
        for name in post:
            weights = [m.get_submodule(name).weight for m in (outcome.model, outcome.smoothed)]
            assert torch.equal(*weights)


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """All outputs of routers and experts, in order: logits, chosen experts and their shares."""
    seen: dict[str, list[Tensor]] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            seen.setdefault(name, []).extend(t.clone() for t in tensors if isinstance(t, Tensor))

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in ("gate", "router", "experts")
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_and_experts_get_the_same_values(family: str) -> None:
    """Nothing is folded into a norm that a router or 3-D experts read, so not a single logit may change."""
    outcome = smoothed(family)
    runs = []
    for model in (outcome.model, outcome.smoothed):
        with recorded(model) as seen:
            outputs(model, unseen(family))
        runs.append(seen)
    before, after = runs
    assert before.keys() == after.keys() and len(before) >= 2
    for name, tensors in before.items():
        assert_kept(tensors, after[name], exact=family not in ONE_PLUS)
    routers = [n for n, _ in outcome.model.named_modules() if n.endswith((".gate", ".router"))]
    assert routers
    for name in routers:
        state = [m.get_submodule(name).state_dict() for m in (outcome.model, outcome.smoothed)]
        assert all(torch.equal(v, state[1][k]) for k, v in state[0].items())
