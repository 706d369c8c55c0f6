"""peft, with LoRA registered for quantized layers for the time of a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    peft = pytest.importorskip("peft")
    from smoothquant_kernels import register_peft

    mapping = peft.PEFT_TYPE_TO_TUNER_MAPPING
    before = mapping[peft.PeftType.LORA]
    register_peft()
    yield
    mapping[peft.PeftType.LORA] = before
