"""The table of expected times by layer and number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.lib.shapes import LLM_LAYERS

from .gpus import GPUS
from .planner import predict

TOKENS = (1, 16, 64, 256, 2048, 8192)
LAYERS = ("LLaMA-7B o", "LLaMA-7B up", "LLaMA-7B down", "LLaMA-70B up", "Llama 3 8B kv")
HEADER = ["layer", "N x K", "tile", "bound by", "M", "floor us", "expected us", "of the floor", "TOPS"]  # fmt: skip


def table(
    gpu: str, layers: Sequence[str] = LAYERS, tokens: Sequence[int] = TOKENS
) -> tuple[list[str], list[list[str]]]:
    """layers: names in shapes.LLM_LAYERS."""
    rows = []
    for name in layers:
        layer = LLM_LAYERS[name]
        for m in tokens:
            one = predict(GPUS[gpu], m, layer.n, layer.k)
            words = [name, f"{layer.n} x {layer.k}", one.name, one.bound_by, str(m)]
            times = [f"{one.floor_us:.1f}", f"{one.us:.1f}", f"{100 * one.floor_us / one.us:.0f} %"]
            rows.append([*words, *times, f"{one.tops:.0f}"])
    return HEADER, rows
