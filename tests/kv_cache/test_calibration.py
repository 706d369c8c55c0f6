"""Calibration of the int8 cache: the maxima of what a cache would hold, and a model that stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from smoothquant_kernels import (
    Int8KVCache,
    SmoothQuantConfig,
    SmoothQuantError,
    calibrate_kv_cache,
    optimize_for_inference,
    quantize_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.kv_cache import recording
from smoothquant_kernels.kv_cache.calibration import KVCalibration, LayerMaxima, calibration_of
from tests.support.models import GQA, make_model, small_t5, token_batches

FAMILIES = ("llama_gqa", "mistral", "qwen3", "opt", "gpt_neox", "gpt2")


def calibrated(model: nn.Module, data: Any = None, **options: Any) -> KVCalibration:
    return calibrate_kv_cache(
        model, token_batches() if data is None else data, progress=False, **options
    )


def cached(model: Any, batches: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """The largest keys and values of each layer in transformers' own cache, [H, D] each."""
    found: list[list[tuple[Tensor, Tensor]]] = []
    for batch in batches:
        cache = t.DynamicCache()
        with torch.no_grad():
            model(input_ids=batch, cache=cache, use_cache=True)
        found.append(
            [(x.keys.abs().amax((0, 2)), x.values.abs().amax((0, 2))) for x in cache.layers]
        )
    return [
        tuple(torch.stack(parts).amax(0) for parts in zip(*layer, strict=True))  # type: ignore[misc]
        for layer in zip(*found, strict=True)
    ]


def registered() -> dict[str, Any]:
    return dict(t.AttentionInterface._global_mapping)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_are_what_a_cache_holds(family: str, attention: str) -> None:
    model: Any = make_model(family)
    model.set_attn_implementation(attention)
    before = registered()
    found = calibrated(model)
    assert registered() == before
    assert model.config._attn_implementation == attention
    assert found.tokens == 4 * 48
    assert list(found.layers) == [0, 1]
    for layer, (k, v) in zip(found.layers.values(), cached(model, token_batches()), strict=True):
        assert torch.equal(layer.k, k)
        assert torch.equal(layer.v, v)
        assert layer.q.shape == k.shape


def test_queries_are_the_largest_of_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama_gqa")
    seen: list[Tensor] = []
    original = recording.KVRecorder._record

    def spy(self: Any, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if layer == 1:
            seen.append(query.abs().amax((0, 2)))
        original(self, layer, query, key, value)

    monkeypatch.setattr(recording.KVRecorder, "_record", spy)
    found = calibrated(model)
    heads = torch.stack(seen).amax(0)  # 4 query heads, of which two in a row read one
    assert torch.equal(found.layers[1].q, torch.stack([heads[:2].amax(0), heads[2:].amax(0)]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side: str) -> None:
    model: Any = make_model("llama_gqa")
    with torch.no_grad():
        # The padding would be seen, in the first channel of the values.
        attention = model.model.layers[0].self_attn
        model.model.embed_tokens.weight[3] = 50 * attention.v_proj.weight[0]
    ids = token_batches(1)[0].clamp(min=4)
    pad = torch.full((2, 5), 3)
    parts, marks = [ids, pad], [torch.ones_like(ids), torch.zeros_like(pad)]
    order = [1, 0] if side == "left" else [0, 1]
    batch = {
        "input_ids": torch.cat([parts[i] for i in order], 1),
        "attention_mask": torch.cat([marks[i] for i in order], 1),
    }
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone, padded = calibrated(copy.deepcopy(model), [ids]), calibrated(model, [batch])
    assert padded.tokens == alone.tokens == ids.numel()
    for a, b in zip(alone.layers.values(), padded.layers.values(), strict=True):
        for name in "qkv":  # the mask changes the order of sums
            torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=1e-4, atol=1e-5)
    unmasked = calibrated(copy.deepcopy(model), [{"input_ids": batch["input_ids"]}])
    assert unmasked.layers[0].v[0, 0] > 1.5 * alone.layers[0].v[0, 0]


def test_it_measures_the_quantized_model_and_leaves_it_as_it_is() -> None:
    ids = token_batches()
    model: Any = make_model("llama_gqa")
    smooth_and_quantize(model, ids, SmoothQuantConfig(), progress=False)
    plain = calibrated(copy.deepcopy(model))
    optimize_for_inference(model)
    with torch.no_grad():
        before = model(input_ids=ids[0]).logits
    modules, training = [id(m) for m in model.modules()], model.training
    found = calibrated(model)
    assert [id(m) for m in model.modules()] == modules
    assert model.training is training
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids[0]).logits, before)
    assert calibration_of(model) is found
    for a, b in zip(plain.layers.values(), found.layers.values(), strict=True):
        # Fused norms round in another order, which may move an int8 input by one step of 127.
        torch.testing.assert_close(a.k, b.k, rtol=0.02, atol=0.02)


def test_softcap_and_sinks_go_through_the_models_own_attention() -> None:
    torch.manual_seed(0)
    config = t.Gemma2Config(
        **GQA, head_dim=8, attn_logit_softcapping=2.0, sliding_window=8, query_pre_attn_scalar=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = t.Gemma2ForCausalLM(config).eval()
    ids = token_batches(1)
    found = calibrated(model, ids)
    (k, v) = cached(model, ids)[1]
    assert torch.equal(found.layers[1].k, k)
    assert torch.equal(found.layers[1].v, v)


def test_data_are_read_like_those_of_the_weights() -> None:
    model = make_model("llama")
    one = calibrated(model, iter(token_batches(100)), max_tokens=96)
    assert one.tokens == 96  # an endless iterable would end too
    assert torch.equal(one.layers[0].k, calibrated(model, token_batches(2)).layers[0].k)


def test_a_failure_leaves_model_and_registry_alone() -> None:
    model: Any = make_model("llama")
    earlier, before = calibrated(model), registered()

    def data() -> Any:
        yield token_batches(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(model, data())
    assert registered() == before
    assert calibration_of(model) is earlier
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(SmoothQuantError, match="v of attention layer 1 holds NaN or Inf"):
        calibrated(model)
    assert calibration_of(model) is earlier
    assert registered() == before


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (small_t5, token_batches(1), "is an encoder-decoder"),
        (lambda: nn.Linear(4, 4), token_batches(1), "has no attention layer of transformers"),
        (lambda: make_model("bloom"), token_batches(1), "does not go through the attention"),
        (lambda: make_model("llama"), [], "there is no calibration data"),
        (lambda: make_model("llama"), ["text"], "pass tokenizer="),
        (lambda: make_model("llama"), token_batches(1)[0][0], "must be token-id tensors"),
    ],
)
def test_refusals(make: Any, data: Any, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        calibrated(make(), data)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True])
def test_a_number_of_tokens_is_a_whole_one(wrong: Any) -> None:
    with pytest.raises(SmoothQuantError, match="max_tokens must be a whole number from 1"):
        calibrated(make_model("llama"), max_tokens=wrong)


def test_factors() -> None:
    q, k, v = torch.tensor([[1.0, 4.0]]), torch.tensor([[4.0, 1.0]]), torch.tensor([[127.0, 0.0]])
    found = KVCalibration({3: LayerMaxima(q, k, v)}, 7)
    k_scale, v_scale = found.factors(3, "static")
    assert k_scale is not None and v_scale is not None
    torch.testing.assert_close(k_scale, k * (1.1 / 127))
    torch.testing.assert_close(v_scale, torch.tensor([[1.1, 1.0]]))  # a dead channel: 1
    assert found.factors(3, "per_token") == (None, None)
    smooth, nothing = found.factors(3, "per_token", 0.5)
    assert smooth is not None and nothing is None
    torch.testing.assert_close(smooth, torch.tensor([[2.0, 0.5]]))


def test_what_others_register_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data may load a model that brings its own attention."""
    monkeypatch.setattr(t.AttentionInterface, "_global_mapping", registered())
    model = make_model("llama_gqa")
    before = registered()

    def data() -> Any:
        yield token_batches()[0]
        t.AttentionInterface.register("of_another_model", before["sdpa"])

    calibrated(model, data())
    assert registered() == {**before, "of_another_model": before["sdpa"]}


def test_smoothing_drops_an_earlier_calibration() -> None:
    """Values into which factors were folded are other values."""
    model: Any = make_model("llama")
    first = calibrated(model)
    with pytest.raises(SmoothQuantError):
        smooth_lm(model, [], progress=False)
    assert calibration_of(model) is first
    smooth_lm(model, token_batches(), progress=False)
    assert calibration_of(model) is None
    with pytest.raises(SmoothQuantError, match="needs a calibration, and the model has none"):
        Int8KVCache(model, scheme="static")
    second = calibrated(model)
    assert (first.layers[0].v / second.layers[0].v).max() > 1.5
    quantize_model(model)
    assert calibration_of(model) is second
