"""Calibration batches of every kind: their samples, their sizes, where they may be cut, and refusals."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from torch import Tensor, nn

from smoothquant_kernels import SmoothQuantConfig, SmoothQuantError, calibrate_model, smooth_lm
from smoothquant_kernels.smoothing.calibrate import calibration_batches
from tests.support.models import LLAMA_LIKE, VOCAB, make_model, small_t5, token_batches

SMALL: dict[str, Any] = {**LLAMA_LIKE, "num_hidden_layers": 1, "max_position_embeddings": 32}
IMAGE = 120


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 100, (rows, length), generator=generator)


def classifier() -> nn.Module:
    return t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=3)).eval()  # type: ignore[no-any-return]


class Named(nn.Module):
    """Its forward takes these entries and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        result: Tensor = self.layer(self.embed(input_ids))
        return result


def vit() -> nn.Module:
    config = t.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return t.ViTForImageClassification(config).eval()  # type: ignore[no-any-return]


def llava() -> nn.Module:
    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = t.LlamaConfig(**{**SMALL, "max_position_embeddings": 128}, num_key_value_heads=4)
    config = t.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4
    )
    return t.LlavaForConditionalGeneration(config).eval()  # type: ignore[no-any-return]


def with_images(at: list[list[int]], length: int = 48) -> dict[str, Tensor]:
    """Rows of text with an image of four placeholder tokens at each of these positions."""
    text = ids(len(at), length)
    for row, places in enumerate(at):
        for place in places:
            text[row, place : place + 4] = IMAGE
    images = sum(map(len, at))
    return {
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "pixel_values": torch.randn(images, 3, 16, 16),
    }


def measured(model: nn.Module, *data: Any, **options: Any) -> Any:
    return calibrate_model(model, data, progress=False, **options)


def test_classifier_labels_stay_one_per_row() -> None:
    batch = {"input_ids": ids(4, 16), "labels": torch.tensor([0, 1, 2, 0])}
    statistics = measured(classifier(), batch)
    assert statistics.tokens == 64 and statistics.sample["labels"].shape == (1,)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_a_single_sample_gets_a_batch_dimension(kind: Any) -> None:
    sample = {
        "input_ids": kind(ids(1, 9)[0].tolist()),
        "attention_mask": kind([1] * 9),
        "labels": 2,
        "text": "a column",
        "idx": 7,
    }
    (batch,) = calibration_batches([sample], model=Named())
    assert {n: tuple(v.shape) for n, v in batch.items()} == {
        "input_ids": (1, 9),
        "attention_mask": (1, 9),
        "labels": (1,),
    }


def test_a_single_image_gets_a_batch_dimension() -> None:
    (batch,) = calibration_batches([{"pixel_values": [np.zeros((3, 16, 16))]}], model=vit())
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    (batch,) = calibration_batches([{"pixel_values": torch.zeros(3, 16, 16)}], model=vit())
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


def test_batches_of_data_loaders() -> None:
    data = torch.utils.data.TensorDataset(ids(4, 8))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    assert [b["input_ids"].shape for b in calibration_batches(loader)] == [(2, 8)] * 2
    rows: Any = [{"input_ids": i, "idx": n, "text": "x"} for n, i in enumerate(ids(4, 8))]
    named = torch.utils.data.DataLoader(rows, batch_size=2)
    batches = list(calibration_batches(named, model=Named()))
    assert [list(b) for b in batches] == [["input_ids"]] * 2
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids(4, 8), ids(4, 8)))
    with pytest.raises(SmoothQuantError, match="members have no names: pass a dict"):
        list(calibration_batches(pairs))


def endless(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    yield from itertools.islice(itertools.repeat(batch), 50)
    raise AssertionError("the loader was read to its end")


@pytest.mark.parametrize(
    ("make", "batch", "each"),
    [
        (
            vit,
            {"pixel_values": torch.zeros(2, 3, 16, 16)},
            2 * 5,
        ),  # four patches and the class token
        (lambda: make_model("llama"), {"inputs_embeds": torch.zeros(2, 6, 32)}, 12),
        (lambda: make_model("llama"), {"input_ids": ids(2, 6)}, 12),
    ],
    ids=["images", "embeddings", "tokens"],
)
def test_an_endless_loader_is_read_only_as_far_as_needed(make: Any, batch: Any, each: int) -> None:
    config = SmoothQuantConfig(calibration_tokens=5 * each)
    statistics = calibrate_model(make(), endless(batch), config, progress=False)
    assert statistics.tokens == 5 * each


def test_text_and_images_of_the_sample_stay_together() -> None:
    model = llava()
    statistics = measured(model, with_images([[40], [3]]))
    assert statistics.sample["input_ids"].shape == (1, 48)
    assert statistics.sample["pixel_values"].shape == (1, 3, 16, 16)
    # Two images in the first row and none in the second, so there are as many images as rows.
    uneven = with_images([[3, 30], []])
    assert measured(model, uneven).sample["input_ids"].shape == (2, 48)
    before = model(**uneven).logits
    smooth_lm(model, [uneven], progress=False)
    # verify_tolerance allows 1e-5 on the sample; these rows get twice that.
    assert (model(**uneven).logits - before).abs().max() < 2e-5 * before.abs().max()


def test_the_sample_has_little_padding() -> None:
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[:, :60] = 0
    statistics = measured(make_model("llama"), {"input_ids": ids(2, 80), "attention_mask": mask})
    assert torch.equal(statistics.sample["input_ids"], ids(2, 80)[:1, 48:])
    assert int(statistics.sample["attention_mask"].sum()) == 20


def test_the_sample_keeps_what_the_model_needs() -> None:
    """The classifier needs the end token, which comes after the first 32 tokens."""
    config = t.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_labels=2,
        eos_token_id=2, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    text = ids(2, 48)
    text[:, -1] = 2
    statistics = measured(t.BartForSequenceClassification(config), {"input_ids": text})
    assert statistics.sample["input_ids"].shape == (1, 48)


def test_only_plain_text_is_cut_at_the_end() -> None:
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, :6] = 0
    text = {"input_ids": ids(1, 20), "attention_mask": mask}
    (cut,) = calibration_batches([text], max_tokens=5)
    assert cut["input_ids"].shape == (1, 11) and int(cut["attention_mask"].sum()) == 5
    positions = torch.arange(20).expand(3, 1, 20)
    square = torch.ones(1, 1, 20, 20).tril()
    (cut,) = calibration_batches(
        [{"input_ids": ids(1, 20), "position_ids": positions, "attention_mask": square}],
        max_tokens=5,
    )
    assert [tuple(v.shape) for v in cut.values()] == [(1, 5), (3, 1, 5), (1, 1, 5, 5)]
    for batch in (with_images([[30]]), {"input_ids": ids(1, 20), "decoder_input_ids": ids(1, 20)}):
        (whole,) = calibration_batches([batch], max_tokens=5)
        assert whole["input_ids"].shape == batch["input_ids"].shape


class Letters:
    model_max_length = 10**30  # transformers' value for a tokenizer without a limit

    def __call__(self, text: str, return_tensors: str) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([[ord(c) % 90 + 5 for c in text]])}


def test_windows_fit_the_model_and_the_tokenizer() -> None:
    gpt2 = t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    )
    roberta = t.RobertaModel(t.RobertaConfig(**{**SMALL, "max_position_embeddings": 34}))
    for model in (gpt2, roberta):
        assert measured(model, "a text that is longer " * 3, tokenizer=Letters()).tokens == 66
        with pytest.raises(SmoothQuantError, match=r"40 tokens in a row .* has 32 positions"):
            measured(model, ids(1, 40))
    short = Letters()
    short.model_max_length = 20
    batches = calibration_batches(["a text that is longer"] * 2, tokenizer=short)
    assert max(b["input_ids"].shape[1] for b in batches) == 20


@pytest.mark.parametrize(
    ("make", "batch", "message"),
    [
        (small_t5, {"input_ids": ids(1, 8)}, "nothing for its decoder to read: pass `labels` or"),
        (Named, {"input_ids": ids(1, 8), "images": torch.zeros(1, 3)}, "takes no images"),
        (lambda: make_model("opt"), {"input_ids": [[1, 2], [3]]}, "pad it to one shape"),
        (lambda: make_model("opt"), {"input_ids": {"a": 1}}, "is a dict: pass tensors"),
        (vit, {"pixel_values": torch.zeros(1, 3, 20, 20)}, "does not run on a calibration batch with pixel_values"),
        (lambda: make_model("llama"), {"inputs_embeds": torch.zeros(1, 8, 32, dtype=torch.float64)},
         r"does not run on a calibration batch with inputs_embeds float64 \[1, 8, 32\] \(RuntimeError: .*dtype"),
        (lambda: make_model("llama"), {"input_ids": ids(2, 8), "position_ids": torch.arange(8)},
         r"with input_ids \[2, 8\], position_ids \[8\] \((Runtime|Index)Error: "),
    ],
)  # fmt: skip
def test_refusals_say_what_to_pass(make: Any, batch: Any, message: str) -> None:
    with pytest.raises(SmoothQuantError, match=message):
        measured(make(), batch)


def test_a_warning_says_that_the_data_ended_early() -> None:
    model, data = make_model("llama"), token_batches(1, 12)
    config = SmoothQuantConfig(calibration_tokens=64)
    with pytest.warns(UserWarning, match="ended after 24 of the 64 tokens asked for"):
        calibrate_model(model, data, config, progress=False)
    assert calibrate_model(model, data, config.replace(calibration_tokens=48)).shortage() is None
