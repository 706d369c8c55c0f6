"""Saved float models for the tests of streamed quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tests.support.models import CONFIGS, GQA, make_model, token_batches

BATCHES = token_batches(3)


def family(name: str) -> Any:
    changed = {
        "tied": lambda: transformers.LlamaConfig(**GQA, tie_word_embeddings=True),
        "gemma2": lambda: transformers.Gemma2Config(**GQA, head_dim=8, sliding_window=8),
    }
    CONFIGS.update(changed)
    return make_model(name)


def save_float(model: Any, folder: Path, *, shards: str = "30KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


class Stopped(Exception):
    """Stops the streaming, as an interruption would."""
