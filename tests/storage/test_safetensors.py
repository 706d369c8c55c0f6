"""The alignment of a float weight decides the order in which a product of few tokens adds, so it must not change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_kernels import load_quantized, quantize_model, save_quantized
from smoothquant_kernels.storage.safetensors import ALIGNMENT, read_header
from tests.support.checkpoints import refusal
from tests.support.models import make_model, token_batches

IDS = token_batches(1)[0]


def tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def as_mapped(model: Any, offset: int) -> Any:
    """Moves every parameter `offset` bytes past an aligned address, as transformers leaves those of a mapped file."""
    for parameter in model.parameters():
        data = parameter.data
        place = torch.empty(data.numel() * data.element_size() + 2 * ALIGNMENT, dtype=torch.uint8)
        start = -place.data_ptr() % ALIGNMENT + offset
        moved = place[start : start + data.numel() * data.element_size()]
        parameter.data = moved.view(data.dtype).view(data.shape).copy_(data)
        assert parameter.data_ptr() % ALIGNMENT == offset
    return model


@pytest.mark.parametrize("offset", [8, 16])
@pytest.mark.parametrize("name", ["llama_gqa", "opt"])
def test_few_tokens_give_the_same_bits_after_loading(
    tmp_path: Path, name: str, offset: int
) -> None:
    """Decoding multiplies one token by the head, which stays in float."""
    saved = quantize_model(as_mapped(make_model(name), offset))
    save_quantized(saved, tmp_path / "q")
    loaded = load_quantized(tmp_path / "q")
    with torch.no_grad():
        for tokens in (1, 2, 3, 4, IDS.shape[1]):
            ids = IDS[:1, :tokens]
            assert torch.equal(saved(ids).logits, loaded(ids).logits), tokens


def test_quantizing_aligns_weights_and_keeps_ties() -> None:
    model = as_mapped(make_model("opt"), 8)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    before = embedding.weight.detach().clone()
    quantize_model(model)
    assert head.weight is embedding.weight and torch.equal(head.weight, before)
    assert not [t for t in tensors(model) if t.data_ptr() % ALIGNMENT]


PLAIN = {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        "[]",
        json.dumps({"w": None}),
        json.dumps({"w": {"dtype": "I8"}}),
        json.dumps({"w": {**PLAIN, "dtype": ["I8"]}}),
        json.dumps({"w": {**PLAIN, "shape": 2}}),
        json.dumps({"w": {**PLAIN, "shape": [-2]}}),
        json.dumps({"w": {**PLAIN, "data_offsets": [0, 1, 2]}}),
        json.dumps({"w": {**PLAIN, "data_offsets": [2, 0]}}),
        json.dumps({"w": {**PLAIN, "data_offsets": [0, 3]}}),
    ],
)
def test_an_altered_header_is_refused(header: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"

    def write(text: str) -> None:
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"ab")

    write(json.dumps({"w": PLAIN}))
    assert read_header(file)[0] == {"w": PLAIN}
    write(header)
    assert "cannot be read" in refusal(lambda: read_header(file))
