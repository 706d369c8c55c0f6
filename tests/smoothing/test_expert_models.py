"""Mixtures of experts of every family: calibration, factors, int8 experts, checkpoints, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smoothquant_kernels import (
    ActivationStatistics,
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Experts,
    calibrate_model,
    load_quantized,
    quantize_model,
    quantize_streamed,
    register_transformers,
    save_quantized,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.checkpoint.size import checkpoint_bytes
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.experts.source import FACTORS
from smoothquant_kernels.smoothing.experts.factors import ExpertFactors
from tests.support.checkpoints import assert_same_bits, manifest_of, refusal
from tests.support.command_line import Result
from tests.support.families import FAMILIES

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "granite_moe"]
SCHEMES = ["per_token", "per_tensor", "static"]

pytestmark = [
    pytest.mark.skipif(
        transformers.__version__ < "5", reason="transformers 4 keeps most experts as linears"
    ),
    pytest.mark.filterwarnings("ignore:the calibration data ended"),
    pytest.mark.filterwarnings("ignore:the statistics"),
]


def batches(family: str, count: int = 30) -> list[dict[str, Tensor]]:
    return [FAMILIES[family].inputs(seed) for seed in range(3, 3 + count)]


def answer(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**FAMILIES[family].inputs(0)).logits
    return logits


def experts_in(model: nn.Module) -> dict[str, W8A8Experts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, W8A8Experts)}


def float_experts(model: nn.Module) -> list[nn.Module]:
    return [found.module for found in ModelView(model).experts.values()]


def recorded(model: nn.Module, family: str) -> list[Any]:
    """All that reaches the experts of a model, and what they return: the routing among it."""
    found: list[Any] = []
    handles = [
        m.register_forward_hook(
            lambda _, args, kw, out: found.append((args, kw, out)), with_kwargs=True
        )
        for m in float_experts(model)
    ]
    answer(model, family)
    for handle in handles:
        handle.remove()
    return found


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [t for part in parts for t in flat(part)]


@pytest.mark.parametrize("family", MIXTURES)
def test_smoothing_leaves_the_routing_as_it_is(family: str) -> None:
    model = FAMILIES[family].make()
    before = recorded(model, family)
    config = SmoothQuantConfig(smooth_rounding="power_of_two", only_where_better=False)
    smooth_lm(model, batches(family, 2), config=config, progress=False)
    after = recorded(model, family)
    assert len(before) == len(after) > 0
    for one, two in zip(flat(before), flat(after), strict=True):
        assert torch.equal(one, two)
    waiting = [m.__dict__[FACTORS] for m in float_experts(model)]
    assert all(isinstance(f, ExpertFactors) and f.first.smooth is not None for f in waiting)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_int8_experts_are_near_the_float_ones(family: str, scheme: str, tmp_path: Path) -> None:
    model = FAMILIES[family].make()
    wanted = answer(model, family)
    config = SmoothQuantConfig(activation_scheme=scheme)
    smooth_and_quantize(model, batches(family), config, progress=False)
    found = experts_in(model)
    records = {e["name"]: e for e in model.smoothquant_info["experts"]}  # type: ignore[index, union-attr]
    assert found and found.keys() == records.keys()
    assert not ModelView(FAMILIES[family].make()).experts.keys() - found.keys()
    for name, layer in found.items():
        assert records[name]["smoothing"] == "runtime"
        assert records[name]["schemes"] == list(layer.schemes)
        assert records[name]["num_experts"] == layer.num_experts
    got = answer(model, family)
    # A router may send a token to another expert, so the median token counts; see test_families.
    errors = (got - wanted).flatten(0, -2).norm(dim=-1) / wanted.flatten(0, -2).norm(dim=-1)
    assert errors.median() < 0.15
    folder = save_quantized(model, tmp_path / "saved")
    loaded: Any = load_quantized(folder)
    assert_same_bits(answer(loaded, family), got)
    assert loaded.smoothquant_info == model.smoothquant_info
    ids = FAMILIES[family].inputs(0)["input_ids"]
    made = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert_same_bits(made, model.generate(ids, max_new_tokens=4, do_sample=False))  # type: ignore[operator]


def test_factors_and_ranges_are_those_of_the_formula() -> None:
    model = FAMILIES["mixtral"].make()
    data = batches("mixtral", 3)
    config = SmoothQuantConfig(
        rotation="none", smooth_rounding="none", only_where_better=False, alpha=0.4
    )
    name, found = next(iter(ModelView(model).experts.items()))
    inputs: list[Tensor] = []
    handle = found.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in data:
        with torch.no_grad():
            model(**batch)
    handle.remove()
    smooth_lm(model, data, config=config, progress=False)
    factors: ExpertFactors = found.module.__dict__[FACTORS]
    x = torch.cat(inputs)
    weight: Tensor = found.first.detach()
    wanted = x.abs().amax(0) ** 0.4 / weight.abs().amax((0, 1)) ** 0.6
    assert factors.first.smooth is not None
    torch.testing.assert_close(factors.first.smooth, wanted)
    assert factors.first.absmax == pytest.approx(float((x / wanted).abs().max()), rel=1e-5)
    assert name.endswith("experts") and factors.unseen == 0


def test_an_expert_without_tokens_has_a_defined_treatment(tmp_path: Path) -> None:
    model: Any = FAMILIES["mixtral"].make()
    router = next(m for n, m in model.named_modules() if n.endswith("mlp.gate"))
    router.weight.data[2] = 0.0  # loses against three others, of which two are always positive
    router.weight.data[:2] = router.weight.data[:2].abs()
    experts = float_experts(model)[0]
    config = SmoothQuantConfig(activation_scheme="static", only_where_better=False)
    smooth_lm(model, batches("mixtral", 1), config=config, progress=False)
    factors: ExpertFactors = experts.__dict__[FACTORS]
    assert factors.second.smooth is not None
    ones = [bool((s == 1).all()) for s in factors.second.smooth]
    assert sum(ones) == factors.unseen
    quantize_model(model, config=config)
    record = model.smoothquant_info["experts"][0]
    assert record["unseen"] == factors.unseen
    if factors.unseen:
        folder = save_quantized(model, tmp_path / "saved")
        seen = Result("inspect", folder)
        assert "unseen in calibration" in " ".join(seen.out.split())


def test_padding_does_not_count() -> None:
    plain = batches("qwen3_moe", 2)
    padded = [
        {
            "input_ids": torch.cat([b["input_ids"], torch.ones(1, 5, dtype=torch.long)], 1),
            "attention_mask": torch.cat([torch.ones(1, 12), torch.zeros(1, 5)], 1).long(),
        }
        for b in plain
    ]
    model = FAMILIES["qwen3_moe"].make()
    one, two = (calibrate_model(model, data, progress=False) for data in (plain, padded))
    keys = [n for n in one.absmax if ".experts." in n]
    assert keys and {n for n in two.absmax if ".experts." in n} == set(keys)
    for name in keys:
        torch.testing.assert_close(one.absmax[name], two.absmax[name])
        assert one.counts[name] == two.counts[name]


def test_statistics_of_parts_add_up_and_survive_a_file(tmp_path: Path) -> None:
    data = batches("granite_moe", 4)
    model = FAMILIES["granite_moe"].make()
    whole = calibrate_model(model, data, progress=False)
    parts = [calibrate_model(model, part, progress=False) for part in (data[:1], data[1:])]
    parts[0].merge(parts[1])
    again = ActivationStatistics.load(parts[0].save(tmp_path / "statistics.safetensors"))
    models = [
        quantize_model(smooth_lm(copy.deepcopy(model), found, progress=False))
        for found in (whole, again)
    ]
    for one, two in zip(*(experts_in(m).values() for m in models), strict=True):
        # Sums of squares are added in another order, in float64.
        torch.testing.assert_close(one.up_scale, two.up_scale)
        torch.testing.assert_close(one.down_scale, two.down_scale)


def test_naive_experts_need_no_calibration() -> None:
    model = FAMILIES["mixtral"].make()
    quantize_model(model, config=SmoothQuantConfig(rotation="none"))
    for layer in experts_in(model).values():
        assert layer.up_inv_smooth is None and layer.rotations == (0, 0)
    assert {e["smoothing"] for e in model.smoothquant_info["experts"]} == {"none"}  # type: ignore[index, union-attr]


def test_settings_by_name() -> None:
    config = SmoothQuantConfig(
        skip=("model.layers.1.*",), schemes={"*.experts": "static"}, clips={"*.experts": 0.5}
    )
    plain = SmoothQuantConfig(skip=("model.layers.1.*",), schemes={"*.experts": "static"})
    models = [
        smooth_and_quantize(FAMILIES["mixtral"].make(), batches("mixtral", 3), c, progress=False)
        for c in (config, plain)
    ]
    clipped, whole = (next(iter(experts_in(m).values())) for m in models)
    assert len(experts_in(models[0])) == 1 and clipped.schemes == ("static", "static")
    assert clipped.up_x_scale is not None and whole.up_x_scale is not None
    torch.testing.assert_close(clipped.up_x_scale, whole.up_x_scale / 2)
    skipped = {e["name"]: e["reason"] for e in models[0].smoothquant_info["skipped"]}  # type: ignore[index, union-attr]
    assert skipped["model.layers.1.mlp.experts"].startswith("matches the skip pattern")


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["mixtral"].make()
    before = copy.deepcopy(model.state_dict())
    data = batches("mixtral", 2)
    static = SmoothQuantConfig(activation_scheme="static")
    assert "calibrated range for" in refusal(lambda: quantize_model(model, config=static))
    required = SmoothQuantConfig(folding="required", skip=("*_proj",))
    with pytest.raises(SmoothQuantError):
        smooth_lm(model, data, config=required, progress=False)
    experts = float_experts(model)[1]
    experts.down_proj.data[0, 0, 0] = torch.nan  # type: ignore[union-attr, index]
    for call in (
        lambda: smooth_lm(model, data, progress=False),
        lambda: quantize_model(model),
    ):
        assert "the down_proj of model.layers.1.mlp.experts has NaN or Inf" in refusal(call)
    experts.down_proj.data[0, 0, 0] = before["model.layers.1.mlp.experts.down_proj"][0, 0, 0]  # type: ignore[union-attr, index]
    assert not experts_in(model)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_other_formats_refuse_them_by_name(tmp_path: Path) -> None:
    config = SmoothQuantConfig(folding="only", rotation="none")
    model = smooth_and_quantize(
        FAMILIES["mixtral"].make(), batches("mixtral", 2), config, progress=False
    )
    said = refusal(lambda: save_quantized(model, tmp_path / "x", format="compressed-tensors"))
    assert "model.layers.0.mlp.experts holds them" in said and "'*.experts'" in said


def test_the_size_of_a_checkpoint_counts_experts(tmp_path: Path) -> None:
    model = FAMILIES["mixtral"].make()
    view = ModelView(model)
    estimate = checkpoint_bytes(model, view.linears, SmoothQuantConfig(), view.experts)
    quantize_model(smooth_lm(model, batches("mixtral", 2), progress=False))
    folder = save_quantized(model, tmp_path / "saved")
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    assert abs(estimate - (1 << 20) - size) < 0.1 * size


def test_transformers_loads_and_saves_them(tmp_path: Path) -> None:
    register_transformers()
    model = smooth_and_quantize(FAMILIES["qwen3_moe"].make(), batches("qwen3_moe"), progress=False)
    folder = save_quantized(model, tmp_path / "saved")
    loaded: Any = type(model).from_pretrained(folder)  # type: ignore[attr-defined]
    assert_same_bits(answer(loaded, "qwen3_moe"), answer(model, "qwen3_moe"))
    loaded.save_pretrained(tmp_path / "again")
    again: Any = type(model).from_pretrained(tmp_path / "again")  # type: ignore[attr-defined]
    assert_same_bits(answer(again, "qwen3_moe"), answer(model, "qwen3_moe"))
    loaded.dequantize()
    assert not experts_in(loaded)
    wanted = answer(model, "qwen3_moe")
    errors = (answer(loaded, "qwen3_moe") - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.median() < 0.1  # what rounding the activations adds


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_a_streamed_model_has_the_same_experts(family: str, tmp_path: Path) -> None:
    """Their files have the layout of the model. Those of others hold each expert's matrices, which cannot stream."""
    model: Any = FAMILIES[family].make()
    model.save_pretrained(tmp_path / "float")
    data = [b["input_ids"] for b in batches(family, 4)]
    streamed = quantize_streamed(tmp_path / "float", tmp_path / "streamed", data, progress=False)
    loaded: Any = load_quantized(streamed)
    smooth_and_quantize(model, data, progress=False)
    saved = save_quantized(model, tmp_path / "saved")
    assert manifest_of(streamed)["modules"] == manifest_of(saved)["modules"]
    assert_same_bits(answer(loaded, family), answer(model, family))
    assert loaded.smoothquant_info["experts"] == model.smoothquant_info["experts"]


def test_the_command_line_shows_them(tmp_path: Path) -> None:
    model = smooth_and_quantize(
        FAMILIES["qwen3_moe"].make(), batches("qwen3_moe", 3), progress=False
    )
    folder = save_quantized(model, tmp_path / "saved")
    seen = Result("inspect", folder, "--json").json
    (group,) = seen["experts"]
    assert group["count"] == 2 and group["num_experts"] == 4 and group["hidden"] == 32
    assert group["layers"] == "model.layers.*.mlp.experts"
    text = " ".join(Result("inspect", folder).out.split())
    assert "; 8 experts in int8" in text
