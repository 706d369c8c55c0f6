"""A quantized LLaMA, and its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from smoothquant_kernels import save_quantized
from tests.support.checkpoints import quantized


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized()


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    return save_quantized(model, tmp_path / "model")
