"""Models of `W4A8Linear`: made, saved, streamed, loaded, inspected, fused, refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import smoothquant_kernels
from smoothquant_kernels import (
    QuantizedActivation,
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    load_quantized,
    make_report,
    optimize_for_inference,
    quantize_model,
    quantize_streamed,
    save_quantized,
    smooth_and_quantize,
    smooth_lm,
    undo_optimization,
)
from smoothquant_kernels.nn.kinds import count_quantized, kind_of
from smoothquant_kernels.nn.parallel.model import ColwiseW8A8, RowwiseW8A8, check
from tests.nn.test_w4a8_linear import BATCHES, CONFIG
from tests.support.checkpoints import (
    WEIGHTS,
    assert_same_bits,
    logits,
    manifest_of,
    refusal,
    rewrite,
)
from tests.support.command_line import Result
from tests.support.compare import assert_bitwise_equal, assert_same_buffers
from tests.support.models import layers_of, make_model

pytestmark = pytest.mark.filterwarnings("ignore:the calibration data ended")


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized() -> Any:
    return smooth_and_quantize(make_model("llama_gqa"), BATCHES, CONFIG, progress=False)


def test_w_bit_and_formats_choose_the_kind(quantized: Any) -> None:
    assert count_quantized(quantized) == "14 W4A8Linear"
    made = quantize_model(make_model("llama_gqa"), 4)
    assert count_quantized(made) == "14 W4A8Linear"
    config = SmoothQuantConfig(formats={"*.down_proj": "w4a8", "*.o_proj": "float"})
    made = quantize_model(make_model("llama_gqa"), config=config)
    assert count_quantized(made) == "10 W8A8Linear, 2 W4A8Linear"
    config = CONFIG.replace(formats={"*.down_proj": "w8a8"}, quantize_head=True)
    made = quantize_model(make_model("llama_gqa"), config=config)
    assert isinstance(made.lm_head, W8A8Linear)  # 4 bits would blur the logits
    assert count_quantized(made) == "12 W4A8Linear, 3 W8A8Linear"
    shown = layers_of(quantized)
    assert all(la["activation_scheme"] == "per_token" for la in shown.values())


@pytest.mark.parametrize(
    "setting",
    [{"weight_rounding": "nearest"}, {"weight_rounding": "gptq", "activation_scheme": "static"}],
    ids=str,
)
def test_saved_loaded_and_streamed_models_have_the_same_bits(setting: Any, tmp_path: Path) -> None:
    config = CONFIG.replace(**setting)
    source = tmp_path / "float"
    make_model("llama_gqa").save_pretrained(source)
    made = smooth_and_quantize(make_model("llama_gqa"), BATCHES, config, progress=False)
    folder = save_quantized(made, tmp_path / "saved")
    again = load_quantized(folder)
    assert count_quantized(again) == "14 W4A8Linear"
    assert_same_bits(logits(again), logits(made))
    streamed = quantize_streamed(source, tmp_path / "streamed", BATCHES, config, progress=False)
    assert manifest_of(streamed)["modules"] == manifest_of(folder)["modules"]
    assert_same_bits(logits(load_quantized(streamed)), logits(made))


def test_from_pretrained_and_transformers_saver(quantized: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    smoothquant_kernels.register_transformers()
    folder = save_quantized(quantized, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert count_quantized(again) == "14 W4A8Linear"
    assert_same_bits(logits(again), logits(quantized))
    again.save_pretrained(tmp_path / "again")
    once_more = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_bits(logits(once_more), logits(quantized))


def test_inspect_and_size(quantized: Any, tmp_path: Path) -> None:
    folder = save_quantized(quantized, tmp_path / "saved")
    seen = Result("inspect", folder, "--json").json
    assert seen["quantized"] == 14
    assert {layer["class"] for layer in seen["layers"]} == {"W4A8Linear"}
    assert {group["format"] for group in seen["groups"]} == {"w4a8"}
    assert "w4a8 per_token" in " ".join(Result("inspect", folder).out.split())
    layer = quantized.model.layers[0].self_attn.q_proj
    kind = kind_of(layer)
    assert kind is not None
    # 32 channels take one group of 64 bytes, a step and an offset; then the scale and the factors in float32.
    assert kind.nbytes(32, 32) == 32 * 66 + 4 * 64


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ((16, -128), "a step outside [0, 15]"),
        ((-1, 0), "a step outside [0, 15]"),
        ((15, -97), "an offset with which a weight is no int8"),
    ],
)
def test_damaged_groups_are_refused(
    quantized: Any, pair: tuple[int, int], said: str, tmp_path: Path
) -> None:
    folder = save_quantized(quantized, tmp_path / "saved")
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{name}.w_group"][0, 3] = torch.tensor(pair)
    save_file(tensors, folder / WEIGHTS)
    rewrite(folder, lambda values: None)
    text = refusal(lambda: load_quantized(folder))
    assert text.startswith(f"{name}.w_group has") and said in text
    tensors[f"{name}.w_group"][0, 3] = torch.tensor([15, -98])  # the largest weight is 127
    save_file(tensors, folder / WEIGHTS)
    rewrite(folder, lambda values: None)
    load_quantized(folder)


def test_the_report_measures_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    document = make_report(
        make_model("llama_gqa"), BATCHES, tmp_path / "report", CONFIG, held=BATCHES[:1]
    )
    # 4 bits give about 20 dB, int8 about 40.
    assert all(12 < layer["sqnr"] < 30 for layer in document["layers"])


def test_fusion_leaves_them_as_they_are(quantized: Any) -> None:
    config = SmoothQuantConfig(formats={"*.mlp.*": "w4a8"})
    mixed = smooth_and_quantize(make_model("llama_gqa"), BATCHES, config, progress=False)
    for made in (copy.deepcopy(quantized), mixed):
        before, kinds = logits(made), count_quantized(made)
        optimize_for_inference(made)
        assert count_quantized(made) == kinds
        if "W8A8" in kinds:  # a fused norm is rounded once
            assert (logits(made) - before).norm() < 0.02 * before.norm()
        else:
            assert_same_bits(logits(made), before)
        undo_optimization(made)
        assert_same_bits(logits(made), before)


def test_a_shared_quantization(quantized: Any) -> None:
    attention = quantized.model.layers[0].self_attn
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    once = attention.q_proj.quantize_input(x)
    assert isinstance(once, QuantizedActivation)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert_bitwise_equal(layer(once), layer(x))


def test_tensor_parallelism_refuses_before_any_change(quantized: Any) -> None:
    name = "model.layers.1.mlp.down_proj"
    before = copy.deepcopy(quantized)
    for styles in ({name: RowwiseW8A8()}, {name: ColwiseW8A8()}):
        with pytest.raises(SmoothQuantError, match=f"{re.escape(name)} is a W4A8Linear"):
            check(quantized, styles, 2)
    assert_same_buffers(quantized, before)


def test_other_formats_refuse_them(quantized: Any, tmp_path: Path) -> None:
    said = refusal(lambda: save_quantized(quantized, tmp_path / "a", format="compressed-tensors"))
    assert "model.layers.0.self_attn.q_proj" in said and not (tmp_path / "a").exists()
    from smoothquant_kernels.checkpoint.compressed_tensors.export import exportable

    for config, what in (
        (CONFIG, "w_bit=4"),
        (SmoothQuantConfig(formats={"*.o_proj": "w4a8"}), r"formats of \*.o_proj"),
    ):
        with pytest.raises(SmoothQuantError, match=f"ask for W4A8 .{what}"):
            exportable(config)
    from smoothquant_kernels.checkpoint.vllm.parts import parts_of

    modules = manifest_of(save_quantized(quantized, tmp_path / "saved"))["modules"]
    with pytest.raises(SmoothQuantError, match="W4A8Linear, which vLLM cannot serve yet"):
        parts_of("model.layers.0.self_attn.o_proj", modules, {})


def test_smoothing_refuses_a_quantized_model(quantized: Any) -> None:
    assert "(14 W4A8Linear)" in refusal(lambda: smooth_lm(quantized, BATCHES, progress=False))


def test_lora_trains_around_them() -> None:
    peft = pytest.importorskip("peft")
    smoothquant_kernels.register_peft()
    model = peft.get_peft_model(
        quantize_model(make_model("llama_gqa"), 4),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    ids: Tensor = BATCHES[0] if isinstance(BATCHES[0], Tensor) else BATCHES[0]["input_ids"]
    model(input_ids=ids.view(1, -1), labels=ids.view(1, -1)).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(grads) == 4 and all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert any(bool((g != 0).any()) for g in grads if g is not None)
