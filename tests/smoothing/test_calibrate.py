"""Calibration: running per-channel maxima, kinds of data, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels import SmoothQuantError
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.smoothing.calibrate import calibration_batches, collect_statistics
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from tests.support.models import VOCAB, make_model, token_batches


class WordTokenizer:
    """Maps each word to a number. Calibration needs no more of a tokenizer."""

    def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        ids = [sum(map(ord, word)) % VOCAB for word in text.split()]
        return {"input_ids": torch.tensor([ids], dtype=torch.long)}


def statistics(model: nn.Module, data: Any, **options: Any) -> Any:
    linears = ModelView(model).linears
    return collect_statistics(model, linears, calibration_batches(data, **options), progress=False)


def by_hand(model: nn.Module, name: str, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The largest |input| of each channel of one layer, without the padding, from all inputs at once."""
    rows: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            x = rows.pop()
            kept.append(x.reshape(-1, x.shape[-1])[mask.flatten().bool()])
    handle.remove()
    return torch.cat(kept).float().abs().max(0).values


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_maxima_equal_those_of_all_inputs(family: str) -> None:
    model = make_model(family)
    data = token_batches()
    result = statistics(model, data)
    assert result.tokens == 4 * 2 * 24
    linears = ModelView(model).linears
    assert set(result.absmax) == set(linears)
    for name in linears:
        expected = by_hand(model, name, [{"input_ids": ids} for ids in data])
        assert torch.equal(result.absmax[name], expected), name
        assert result.absmax[name].dtype == torch.float32


def test_peak_is_the_largest_token_over_the_median() -> None:
    x = torch.ones(9, 4)
    x[:, 1] = torch.tensor([2.0, 3, 4, 5, 6, 7, 8, 9, -300])
    result = ActivationStatistics()
    result.update("layer", x[:5], None)
    result.update("layer", x[5:], None)
    assert result.peak("layer") == 300 / 6
    result.update("zeros", torch.zeros(3, 4), None)
    assert result.peak("zeros") == 1.0


def test_padding_does_not_count() -> None:
    """The tokens at the padded positions have larger activations than all others."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 0
        model.model.embed_tokens.weight[0, 3] = 1e4
    ids = token_batches(1)[0].clamp_min(1)
    ids[:, 18:] = 0
    mask = torch.ones_like(ids)
    mask[:, 18:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    masked, name = statistics(model, [batch]), "model.layers.0.self_attn.q_proj"
    assert masked.tokens == 2 * 18
    assert torch.equal(masked.absmax[name], by_hand(model, name, [batch]))
    everything = statistics(model, [{"input_ids": ids}])
    assert everything.absmax[name][3] > 1.5 * masked.absmax[name][3]


def test_all_kinds_of_data_give_the_same_statistics() -> None:
    model = make_model("llama")
    text = "the quick brown fox jumps over the lazy dog"
    ids = WordTokenizer()(text, "pt")["input_ids"]
    kinds: list[list[Any]] = [
        [ids],
        [ids[0]],
        [ids.int()],
        [{"input_ids": ids}],
        [{"input_ids": ids[0], "note": "kept out"}],
        [text],
    ]
    results = [statistics(model, data, tokenizer=WordTokenizer()) for data in kinds]
    for result in results[1:]:
        assert result.tokens == results[0].tokens == 9
        for name, absmax in results[0].absmax.items():
            assert torch.equal(result.absmax[name], absmax)


def test_generators_windows_and_the_token_limit() -> None:
    words = " ".join(f"w{i}" for i in range(100))
    tokenizer = WordTokenizer()
    batches = list(
        calibration_batches(
            (w for w in [words] * 9), tokenizer=tokenizer, window=30, max_tokens=150
        )
    )
    lengths = [b["input_ids"].shape[1] for b in batches]
    assert lengths == [30, 30, 30, 10, 30, 20]
    whole = WordTokenizer()(words, "pt")["input_ids"]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches[:4]], dim=1), whole)


def test_empty_strings_and_batches_are_skipped() -> None:
    data = ["", torch.zeros(0, dtype=torch.long), torch.tensor([1, 2])]
    batches = list(calibration_batches(data, tokenizer=WordTokenizer()))
    assert [b["input_ids"].tolist() for b in batches] == [[[1, 2]]]


def test_the_error_names_the_first_layer_with_nan() -> None:
    model = make_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[5] = float("nan")
    with pytest.raises(SmoothQuantError, match=r"layer model\.layers\.1\.mlp\.gate_proj \(1 of 32"):
        statistics(model, token_batches())


def test_inf_in_a_later_batch_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    linears = dict(model.named_modules())
    good, bad = torch.ones(2, 4), torch.full((2, 4), float("inf"))
    data = [{"input": good}, {"input": bad}, {"input": good}]
    with pytest.raises(SmoothQuantError, match="layer 0"):
        collect_statistics(model, {"0": linears["0"]}, calibration_batches(data), progress=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "calibration data is empty"),
        ([""], "calibration data is empty"),
        ("one string", "put a single one into a list"),
        ({"input_ids": torch.ones(1, 2)}, "put a single one into a list"),
        (5, "got int"),
        ([5], "got int"),
        ([torch.ones(2, 3)], "token ids"),
        ([{"note": "a", "id": 3}], "must hold tensors"),
    ],
)
def test_wrong_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        statistics(make_model("llama"), data, tokenizer=WordTokenizer())


def test_strings_need_a_tokenizer() -> None:
    with pytest.raises(SmoothQuantError, match="tokenizer="):
        statistics(make_model("llama"), ["text"])


def test_hooks_and_modes_are_restored_after_an_error() -> None:
    model = make_model("llama").train()
    with pytest.raises(SmoothQuantError):
        statistics(model, [torch.tensor([1, 2]), 5])
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
