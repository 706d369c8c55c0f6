"""A quantized LLaMA, and its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from smoothquant_kernels import save_quantized
from smoothquant_kernels.checkpoint.compressed_tensors import hook
from tests.support.checkpoints import METHOD_MAPPINGS, quantized


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized()


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    return save_quantized(model, tmp_path / "model")


@pytest.fixture
def registered() -> Iterator[None]:
    """W8A8 folders of compressed-tensors load as int8 during the test only."""
    before = [mapping["compressed-tensors"] for mapping in METHOD_MAPPINGS]
    hook.register()
    yield
    for mapping, value in zip(METHOD_MAPPINGS, before, strict=True):
        mapping["compressed-tensors"] = value
