"""The shapes that benchmarks measure: (N, K) of `nn.Linear` weights in published models."""

from __future__ import annotations

#: The CPU benchmark: square attention, both MLP directions of LLaMA-7B, and the MLP of SmolLM2-135M.
CPU_LINEARS = {
    "LLaMA-7B attention": (4096, 4096),
    "LLaMA-7B up": (11008, 4096),
    "LLaMA-7B down": (4096, 11008),
    "SmolLM2-135M up": (1536, 576),
}
CPU_TOKENS = (1, 16, 64, 256, 1024)
