"""Fixtures: a tiny random LLaMA with a tokenizer, a text of its words, and its quantized checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.command_line import QUANTIZE, TEXT, VOCABULARY, Result, word_tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaMA and a tokenizer of twenty words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli-text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def checkpoint(tiny: Path, text: Path) -> Path:
    output = tiny.parent / "checkpoint"
    document = Result(
        "quantize", tiny, "-o", output, "--calibration", text, *QUANTIZE, "--json"
    ).json
    assert document["output"] == str(output)
    return output
