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

#: Row lengths that the producers of int8 activations meet, most common first. A norm's output is as wide as the
#: model; an activation function's as wide as the MLP.
HIDDEN_WIDTHS = (4096, 5120, 8192)  # LLaMA-7B, Llama 3 8B; LLaMA-13B, OPT-13B; LLaMA-70B
MLP_WIDTHS = (14336, 11008, 28672)  # Llama 3 8B; LLaMA-7B; LLaMA-70B
#: A prompt, one decoded token, a batch of decoded tokens, a long prompt, what lies between.
GPU_TOKENS = (2048, 1, 64, 8192, 16, 256)

#: The same in a rehearsal on a CPU: a width with a tail, and few rows.
REHEARSAL_WIDTHS = (256, 515)
REHEARSAL_TOKENS = (16, 1)
