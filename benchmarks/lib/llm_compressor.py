"""How the benchmarks of peers call llm-compressor, whose modules are imported where they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.lib.smollm2 import WINDOW


def spin_quant() -> Any:
    """SpinQuant with the rotations that need nothing at run time and the one of down_proj.

    Blocks of 64 channels, the largest power of two that divides all of SmolLM2's.
    """
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier

    return SpinQuantModifier(
        rotations=["R1", "R2", "R4"], transform_type="hadamard", transform_block_size=64
    )


def one_shot(model: nn.Module, windows: list[Tensor], recipe: list[Any]) -> Callable[[], nn.Module]:
    """The work of applying a recipe with these calibration windows."""
    from datasets import Dataset
    from llmcompressor import oneshot

    rows = {
        "input_ids": [w[0].tolist() for w in windows],
        "attention_mask": [[1] * w.shape[1] for w in windows],
    }
    data = Dataset.from_dict(rows)

    def work() -> nn.Module:
        sizes = {"num_calibration_samples": len(windows), "max_seq_length": WINDOW}
        oneshot(model=model, dataset=data, recipe=recipe, **sizes)
        return model

    return work
