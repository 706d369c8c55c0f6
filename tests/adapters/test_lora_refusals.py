"""What LoRA on quantized layers refuses, before it changes anything."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels import (
    SmoothQuantError,
    quantize_model,
    register_peft,
    smooth_and_quantize,
)
from smoothquant_kernels.modeling.record import rescaled_layers
from smoothquant_kernels.nn.parallel.linear import ShardedLinear
from tests.adapters.test_lora import IDS, config, float_adapter, quantized, randomize, relative
from tests.support.models import EXACT, logits, make_model, token_batches


def folded() -> nn.Module:
    return smooth_and_quantize(
        make_model("llama"), token_batches(2, 16), config=EXACT, progress=False
    )


def refused(model: nn.Module, match: str, **options: Any) -> None:
    """Asserts that the adapter is refused and that no module has changed."""
    from peft import get_peft_model

    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(SmoothQuantError, match=match):
        get_peft_model(model, config(**options))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_merging() -> None:
    """Also where float layers have an adapter, which peft would merge before it reached an int8 layer."""
    from peft import get_peft_model

    model = quantize_model(make_model("llama"))
    made = get_peft_model(model, config(target_modules=["down_proj", "lm_head"]))
    randomize(made)
    before = logits(made, IDS)
    for call in (made.merge_adapter, made.merge_and_unload, made.base_model.merge_adapter):
        with pytest.raises(SmoothQuantError, match=r"2 int8 layers .*down_proj first.*quantize"):
            call()
    with pytest.raises(SmoothQuantError, match="merge the adapter into the float model"):
        made.base_model.model.model.layers[0].mlp.down_proj.merge()
    assert torch.equal(logits(made, IDS), before)
    made.unmerge_adapter()  # nothing is merged
    assert torch.equal(logits(made, IDS), before)


# --- folded factors -----------------------------------------------------------------------------------------


def test_folded_factors_are_refused() -> None:
    refused(folded(), r"14 of them .*folding='never'")
    # o_proj's factors are in v_proj: the output of the one and the input of the other are not the float model's
    refused(folded(), r"v_proj", target_modules=["v_proj"])
    moved = rescaled_layers(folded())
    layer = "model.layers.0.self_attn"
    assert moved[f"{layer}.o_proj"] == f"folded into {layer}.v_proj"
    assert moved["model.layers.0.input_layernorm"] == f"it holds the factors of {layer}.q_proj"
    assert not rescaled_layers(quantized(make_model("llama")))
    assert not rescaled_layers(quantize_model(make_model("llama")))
    part = nn.ModuleDict({"inner": folded()})
    assert set(rescaled_layers(part)) == {f"inner.{name}" for name in moved}


def test_an_adapter_of_the_float_model_is_wrong_on_folded_layers(tmp_path: Path) -> None:
    """The reason for the refusal. An adapter that is trained on such a model is allowed by `folded=True`."""
    from peft import PeftModel

    model = make_model("llama")
    right = logits(float_adapter(model, tmp_path), IDS)
    with pytest.raises(SmoothQuantError, match="adapter 'default' targets 14 int8 layers"):
        PeftModel.from_pretrained(folded(), tmp_path)
    register_peft(folded=True)
    wrong = logits(PeftModel.from_pretrained(folded(), tmp_path), IDS)
    assert relative(wrong, right) > 0.2
    register_peft()
    refused(folded(), "folded=True")


def test_layers_that_are_not_folded_are_allowed_in_a_folded_model() -> None:
    from peft import get_peft_model

    model = smooth_and_quantize(
        make_model("llama_gqa"), token_batches(2, 16), config=EXACT, progress=False
    )
    assert get_peft_model(model, config(target_modules=["o_proj"])) is not None


# --- other adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_initializations_that_change_the_weight(how: str) -> None:
    options = {}
    if how == "loftq":
        pytest.importorskip("scipy")  # for the configuration itself
        options = {"loftq_config": {"loftq_bits": 8}}
    refused(
        quantize_model(make_model("llama")), f"'{how}' changes", init_lora_weights=how, **options
    )


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal"])
def test_initializations_that_do_not(how: Any) -> None:
    from peft import get_peft_model

    model = get_peft_model(quantize_model(make_model("llama")), config(init_lora_weights=how))
    assert logits(model, IDS).isfinite().all()


def test_modules_to_save() -> None:
    model = quantize_model(make_model("llama"))
    options = {"target_modules": ["q_proj"]}
    refused(model, "modules_to_save, and model.layers.0.mlp.down_proj is int8",
            modules_to_save=["down_proj"], **options)  # fmt: skip


def test_a_second_adapter_is_checked_too() -> None:
    from peft import get_peft_model

    made = get_peft_model(quantize_model(make_model("llama")), config())
    before = logits(made, IDS)
    with pytest.raises(SmoothQuantError, match="'second' targets 14 int8 layers"):
        made.add_adapter("second", config(init_lora_weights="pissa"))
    assert torch.equal(logits(made, IDS), before)


def test_a_part_of_a_layer() -> None:
    model: Any = quantize_model(make_model("llama"))
    layer = model.model.layers[1].mlp.up_proj
    layer.__class__, layer.part = ShardedLinear, "rows 0 to 43 of 88"
    refused(model, "up_proj .rows 0 to 43 of 88.: attach")


def test_layers_of_other_adapters_are_refused_by_peft() -> None:
    from peft import IA3Config, get_peft_model

    some = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"W8A8Linear.* is not supported"):
        get_peft_model(quantize_model(make_model("llama")), some)


def test_a_model_that_was_copied() -> None:
    from peft import get_peft_model

    made = get_peft_model(quantize_model(make_model("llama")), config())
    randomize(made)
    assert torch.equal(logits(copy.deepcopy(made), IDS), logits(made, IDS))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SmoothQuantError, match="pip install"):
        register_peft()
