"""`folding="only"`: nothing divides at run time, and v_proj absorbs o_proj's factors under grouped-query attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    calibrate_model,
    quantize_model,
    smooth_lm,
)
from smoothquant_kernels.modeling.groups import find_groups
from smoothquant_kernels.modeling.probe import Repeats
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import is_float_linear, pending_smooth, weight_of
from smoothquant_kernels.reference import smoothing_factors
from tests.support.models import LLAMA_LIKE, layers_of, logits, make_model, token_batches

IDS = token_batches(1, length=40)[0]
ONLY = SmoothQuantConfig(
    folding="only", rotation="none", smooth_rounding="power_of_two", only_where_better=False
)
#: Groups of query heads: name -> heads of keys and values, of four query heads.
GROUPED = {"llama_gqa": 2, "qwen2": 2, "mistral": 2, "qwen3": 2, "multi_query": 1}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    if family != "multi_query":
        return make_model(family, dtype=dtype)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA_LIKE, num_key_value_heads=1, attention_bias=True)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    return model.to(dtype)


def smoothed(model: nn.Module, config: SmoothQuantConfig = ONLY) -> Any:
    return smooth_lm(copy.deepcopy(model), token_batches(), config=config, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", GROUPED)
def test_o_proj_is_folded_into_v_proj(family: str, dtype: torch.dtype) -> None:
    model = make(family, dtype)
    result = smoothed(model)
    before, after = logits(model, IDS), logits(result, IDS)
    if dtype == torch.float16:
        # Values below 2^-14 are subnormal, so they round otherwise at another scale, by at most 2^-25 each. That can
        # move a later rounding to float16, so the fold may only not add to the error that float16 has anyway.
        exact = logits(copy.deepcopy(model).double(), IDS)
        assert (after - exact).abs().max() <= 1.25 * (before - exact).abs().max()
    else:
        assert torch.equal(after, before)
    layers = layers_of(result)
    assert {layer["smoothing"] for layer in layers.values()} == {"folded"}
    assert not any(pending_smooth(m) is not None for m in result.modules() if is_float_linear(m))
    for i in range(2):
        name = f"model.layers.{i}.self_attn"
        assert layers[f"{name}.o_proj"]["reason"] == f"into {name}.v_proj"
        factors = ratio(result, model, f"{name}.o_proj", rows=False)
        copies = factors.view(GROUPED[family], 4 // GROUPED[family], -1)
        assert torch.equal(copies, copies[:, :1].expand_as(copies))
        assert len(factors.unique()) > 1
        # v_proj reads factors of its own, and its outputs are divided by o_proj's.
        produced = ratio(result, model, f"{name}.v_proj", rows=True)
        assert torch.equal(produced * copies[:, 0].reshape(-1), torch.ones_like(produced))


def ratio(new: Any, old: Any, name: str, *, rows: bool) -> Tensor:
    """What a smoothed weight was multiplied by in each column; or in each row, apart from the factors of columns."""
    a, b = (weight_of(m.get_submodule(name)).double() for m in (new, old))
    found = a / b
    if rows:
        found = found / ratio(new, old, name.replace("v_proj", "k_proj"), rows=False)
    return found.nanmedian(1 if rows else 0).values


@pytest.mark.parametrize("norms", [("max", "max"), ("rms", "rms"), ("max", "rms")])
def test_factors_balance_all_copies_of_a_channel_together(norms: tuple[str, str]) -> None:
    model = make("llama_gqa")
    config = ONLY.replace(
        smooth_rounding="none", alpha=0.4, activation_norm=norms[0], weight_norm=norms[1]
    )
    statistics = calibrate_model(model, token_batches(), config, progress=False)
    result = smooth_lm(copy.deepcopy(model), statistics, config=config, progress=False)
    name = "model.layers.1.self_attn.o_proj"
    weight = weight_of(model.get_submodule(name)).detach()

    def together(values: Tensor, norm: str) -> Tensor:
        heads = values.view(2, 2, 8)  # kv head, query head of it, channel
        both = heads.amax(1) if norm == "max" else heads.square().mean(1).sqrt()
        return both[:, None].expand_as(heads).reshape(-1)

    columns = {"max": weight.abs().amax(0), "rms": weight.double().square().mean(0).sqrt().float()}
    expected = smoothing_factors(
        together(statistics.norms(name, norms[0]), norms[0]),
        together(columns[norms[1]], norms[1]),
        0.4,
    )
    got = (weight_of(result.get_submodule(name)).double() / weight.double()).nanmedian(0).values
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=0)  # a product and a division


def test_other_foldings_do_not_share_factors() -> None:
    """A division at run time balances each query head alone, so v_proj is left alone."""
    layers = layers_of(smoothed(make("llama_gqa"), ONLY.replace(folding="auto")))
    assert layers["model.layers.0.self_attn.o_proj"]["smoothing"] == "runtime"


class Repeating(nn.Module):
    """A linear whose output is repeated in one of several ways and read by another linear."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.way = nn.Linear(8, 6), nn.Linear(12, 8), way

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.nn.functional.one_hot(input_ids % 8, 8).float()
        y = self.a(x)
        if self.way == "tile":
            y = y.repeat(1, 1, 2)
        elif self.way == "elements":
            y = y.repeat_interleave(2, -1)
        elif self.way == "heads":
            y = y.unflatten(-1, (3, 2)).repeat_interleave(2, -2).flatten(-2)
        elif self.way == "shuffled":
            y = y.repeat(1, 1, 2)[..., torch.arange(12) * 5 % 12]
        else:
            y = torch.cat([y, y.square()], -1)
        return self.b(y)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("tile", Repeats(2, 6)),
        ("elements", Repeats(2, 1)),
        ("heads", Repeats(2, 2)),
        ("shuffled", None),
        ("squared", None),
    ],
)
def test_the_order_of_copies_is_found(way: str, expected: Repeats | None) -> None:
    model = Repeating(way).eval()
    groups = find_groups(ModelView(model), ["a", "b"], {"input_ids": IDS}, narrower=True)
    assert [g.producer for g in groups] == [None, "a" if expected else None]
    if expected:
        assert groups[1].repeats == expected
    assert find_groups(ModelView(model), ["a", "b"], {"input_ids": IDS})[1].producer is None


def test_repeats_spread_and_gather() -> None:
    heads = Repeats(3, 2)
    spread = heads.spread(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert spread.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert heads.by_copy(torch.arange(12.0)).tolist() == [
        [0, 2, 4],
        [1, 3, 5],
        [6, 8, 10],
        [7, 9, 11],
    ]
    assert torch.equal(Repeats().spread(spread), spread)


def test_what_cannot_be_folded_stays_unsmoothed() -> None:
    """Phi-3's o_proj reads a part of qkv_proj's output, and its down_proj a product of two halves."""
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0)
    ).eval()
    result = smoothed(model)
    assert torch.equal(logits(result, IDS), logits(model, IDS))
    layers = layers_of(result)
    left = {n for n, layer in layers.items() if layer["smoothing"] == "none"}
    assert left == {
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")
    }
    for name in left:
        assert layers[name]["reason"] == (
            "nothing divides at run time, and no producer scales its channels one by one"
        )
        assert torch.equal(
            weight_of(result.get_submodule(name)), weight_of(model.get_submodule(name))
        )
    quantized = quantize_model(result)
    assert all(quantized.get_submodule(name).inv_smooth is None for name in layers)


def test_required_refuses_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0)
    ).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(SmoothQuantError) as caught:
        smooth_lm(model, token_batches(), config=ONLY.replace(folding="required"), progress=False)
    assert str(caught.value).startswith(
        "model.layers.0.self_attn.o_proj (4 of 8 layers) would stay unsmoothed, which "
        "folding='required' forbids: nothing divides at run time"
    )
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not hasattr(model, "smoothquant_info")
    assert smoothed(make("llama_gqa"), ONLY.replace(folding="required"))


def test_a_refused_fold_stays_unsmoothed() -> None:
    """A hook on v_proj may read what the fold scales."""
    model = make("llama_gqa")
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *_: None)
    layer = layers_of(smoothed(model))["model.layers.0.self_attn.o_proj"]
    assert layer["smoothing"] == "none" and layer["reason"].startswith(
        "nothing divides at run time, and a forward hook on model.layers.0.self_attn.v_proj"
    )


def test_static_ranges_and_peaks_are_those_of_the_unsmoothed_input() -> None:
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0)
    ).eval()
    config = ONLY.replace(activation_scheme="static", massive_activations="keep")
    statistics = calibrate_model(model, token_batches(), config, progress=False)
    result = smooth_lm(copy.deepcopy(model), statistics, config=config, progress=False)
    name = "model.layers.1.mlp.down_proj"
    layer = layers_of(result)[name]
    assert layer["x_absmax"] == float(statistics.absmax[name].max())
    assert layer["x_peak"] == statistics.peak(name)
    rotated = config.replace(rotation=8)
    statistics = calibrate_model(model, token_batches(), rotated, progress=False)
    result = smooth_lm(copy.deepcopy(model), statistics, config=rotated, progress=False)
    layer = layers_of(result)[name]
    assert layer["x_absmax"] == statistics.range_of(name, None, 8)
    assert layer["x_peak"] == statistics.peak(name, None, 8)
