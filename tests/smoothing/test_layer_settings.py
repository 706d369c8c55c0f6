"""Settings of single layers: each changes its layer and no other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    calibrate_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.config import ROTATED_ALPHA
from tests.support.models import layers_of, logits, make_model, token_batches

LAYER = "model.layers.1."
STATIC = SmoothQuantConfig(
    activation_scheme="static", smooth_rounding="none", only_where_better=False
)


def quantized(config: SmoothQuantConfig, family: str = "llama") -> Any:
    return smooth_and_quantize(make_model(family), token_batches(), config, progress=False)


def test_each_setting_changes_only_its_layer() -> None:
    plain = quantized(STATIC)
    own = STATIC.replace(
        alphas={f"{LAYER}mlp.down_proj": 0.2},
        clips={f"{LAYER}self_attn.o_proj": 0.5},
        schemes={f"{LAYER}mlp.gate_proj": "per_token", f"{LAYER}mlp.up_proj": "per_tensor"},
    )
    changed = quantized(own)
    before, after = layers_of(plain), layers_of(changed)
    different = {n for n in before if before[n] != after[n]}
    # gate_proj and up_proj get their own schemes and share the default alpha of gate_proj's scheme.
    assert after[f"{LAYER}mlp.up_proj"]["alpha"] == ROTATED_ALPHA["per_token"]
    assert different == {f"{LAYER}mlp.{n}_proj" for n in ("down", "gate", "up")}
    assert after[f"{LAYER}mlp.down_proj"]["alpha"] == 0.2
    assert after[f"{LAYER}mlp.gate_proj"]["activation_scheme"] == "per_token"
    assert after[f"{LAYER}mlp.up_proj"]["activation_scheme"] == "per_tensor"
    o_proj = f"{LAYER}self_attn.o_proj"
    scales = [m.get_submodule(o_proj).x_scale for m in (plain, changed)]
    torch.testing.assert_close(scales[1], scales[0] / 2)


def test_groups_are_recorded() -> None:
    info = layers_of(quantized(STATIC))
    qkv = [f"{LAYER}self_attn.{n}_proj" for n in "qkv"]
    assert all(info[name]["group"] == qkv for name in qkv)
    assert info[f"{LAYER}mlp.down_proj"]["group"] == [f"{LAYER}mlp.down_proj"]


def test_layers_that_share_factors_must_agree() -> None:
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    config = STATIC.replace(alphas={f"{LAYER}self_attn.k_proj": 0.9})
    usual = ROTATED_ALPHA["static"]
    names = rf"{LAYER}self_attn.q_proj and {LAYER}self_attn.k_proj"
    sentence = rf"{names} read the same tensor.*{usual}.*0.9"
    with pytest.raises(SmoothQuantError, match=sentence):
        smooth_lm(model, token_batches(), config=config, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_factors_do_not_depend_on_folding(family: str) -> None:
    """Folding into the rows of v_proj or up_proj changes weights from which their own group's factors are computed."""
    statistics = calibrate_model(make_model(family), token_batches(), progress=False)
    infos, outputs = [], []
    for folding in ("auto", "never"):
        config = SmoothQuantConfig(smooth_rounding="power_of_two", folding=folding)
        model = smooth_and_quantize(make_model(family), statistics, config, progress=False)
        infos.append([(x["name"], x["x_absmax"]) for x in layers_of(model).values()])
        outputs.append(logits(model, token_batches(1)[0]))
    assert infos[0] == infos[1]
    # With powers of two, the int8 weights and activations are equal, and each scale is equal up to a power of two. So
    # the outputs differ only by the rounding of the norms.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
