"""What a decoder layer should take on a GPU: fused, unfused, and in float16 by torch.compile. Nothing was measured.

Every kernel takes as long as its bytes or its multiply-adds do, at least LEAST, and GAP passes before the next one. The
int8 GEMMs are the dispatch's own arithmetic (planner.py), but never above the best rate that anybody measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from benchmarks.lib.blocks import GPU_SHAPES, Shape

from . import yardstick
from .gpus import GPUS
from .planner import predict

#: Microseconds between two kernels of a CUDA graph, and the least that a kernel takes.
GAP, LEAST = 1.0, 1.0
#: Share of the data sheet's bandwidth that a kernel reaches, as in csrc/gemm/cost.cpp.
MEMORY = 0.9
#: Share of the dense float16 peak that causal attention reaches over a prompt.
ATTENTION = 0.5
#: The best int8 rates of the yardstick's tables, in TOPS (yardstick.csv says from where).
BEST_INT8 = {"A100": 586, "L40S": 662, "H100": 1425}

ASSUMPTIONS = {
    "between kernels": f"{GAP:g} us in a CUDA graph, for every variant; a kernel takes at least {LEAST:g} us",
    "memory": f"{100 * MEMORY:.0f} % of the data sheet; activations come from memory, none from L2",
    "int8 GEMMs": "the dispatch's expected time, at most at the best rate that others measured: "
    + ", ".join(f"{rate:,} TOPS ({gpu})" for gpu, rate in BEST_INT8.items()),
    "float16 GEMMs": "the best bfloat16 rate that others measured on the GPU, no waves, no overhead",
    "attention": f"{100 * ATTENTION:.0f} % of the float16 peak for a prompt, float16 keys and values from memory for a "
    "token; the same for every variant",
    "float16": "`torch.compile`: 4 merged GEMMs; one kernel each for a norm with its residual, the SiLU product, and "
    "rotary positions with the new keys and values",
    "fused": "4 merged GEMMs, 4 kernels that quantize (for a single token 3, as `host_time` counts), rotary positions "
    "in one kernel as in float16",
    "unfused": "as `quantize_model` leaves it: 7 GEMMs, 7 quantizers (for a single token none) and the 31 kernels of "
    "torch that `host_time` counts",
}

#: (phase, sequences, new tokens of each, tokens before them), and how many times as fast as float16 it should be.
SITUATIONS = {
    ("prefill", 1, 2048, 0): 1.6,
    ("decode", 1, 1, 1024): 1.7,
    ("decode", 16, 1, 1024): 1.7,
}
MODELS = ("LLaMA-7B", "Llama 3 8B")
HEADER = ["GPU", "model", "phase", "sequences", "float16 us", "unfused us", "fused us"]
HEADER += ["fused vs float16", "target", "fused vs unfused", "GEMMs us", "quantizers us", "rest us"]


@dataclass(frozen=True)
class Layer:
    """Microseconds of the GEMMs, of the kernels that quantize, and of all others with attention; and the kernels."""

    gemms: float
    quantizers: float
    rest: float
    kernels: int

    @property
    def us(self) -> float:
        return self.gemms + self.quantizers + self.rest


@cache
def best_bf16(gpu: str) -> float:
    """The best bfloat16 rate of the yardstick, in TFLOPS."""
    rows = [row for row in yardstick.measured() if row.gpu == gpu and row.bf16_us]
    return max(2e-6 * row.m * row.n * row.k / row.bf16_us for row in rows if row.bf16_us)


@dataclass(frozen=True)
class Planned:
    """The kernels of one layer of `shape` on one GPU for m tokens."""

    gpu: str
    shape: Shape
    sequences: int
    tokens: int
    start: int

    @property
    def m(self) -> int:
        return self.sequences * self.tokens

    @property
    def is_single(self) -> bool:
        """A single token is quantized by the launch of its GEMM."""
        return self.m == 1

    def memory(self, bytes_moved: float) -> float:
        return bytes_moved / (MEMORY * GPUS[self.gpu].gb_per_s) / 1e3

    def moved(self, bytes_of_a_token: float) -> float:
        """A kernel that reads and writes so many bytes for each token."""
        return max(LEAST, self.memory(self.m * bytes_of_a_token)) + GAP

    def int8(self, n: int, k: int, residual: bool = False) -> float:
        """A GEMM. Reading a residual is added as if nothing hid it."""
        best = 2e-6 * self.m * n * k / BEST_INT8[self.gpu]
        added = self.memory(2 * self.m * n) if residual else 0.0
        return max(predict(GPUS[self.gpu], self.m, n, k).us, best) + added + GAP

    def float16(self, n: int, k: int) -> float:
        memory = self.memory(2 * (n * k + self.m * (n + k)))
        return max(LEAST, memory, 2e-6 * self.m * n * k / best_bf16(self.gpu)) + GAP

    def attention(self) -> float:
        width = self.shape.heads * self.shape.head_dim
        if self.tokens > 1:
            operations = 2 * self.sequences * self.tokens**2 * width
            return operations / (ATTENTION * GPUS[self.gpu].tops / 2) / 1e6 + GAP
        kept = 4 * self.sequences * (self.start + 1) * self.shape.kv_heads * self.shape.head_dim
        return max(LEAST, self.memory(kept)) + GAP

    @property
    def _widths(self) -> tuple[int, int, int, int]:
        s = self.shape
        return s.hidden, s.mlp, s.heads * s.head_dim, s.kv_heads * s.head_dim

    def rotated(self) -> float:
        """Rotary positions and the new keys and values in one kernel."""
        _, _, q, kv = self._widths
        return self.moved(4 * (q + 2 * kv))

    def compiled_float16(self) -> Layer:
        hidden, mlp, _, _ = self._widths
        gemms = sum(self.float16(*size) for size in self.shape.sizes.values())
        # Twice the sum with the residual and its norm: two values in, two out.
        rest = 2 * self.moved(8 * hidden) + self.moved(6 * mlp) + self.rotated() + self.attention()
        return Layer(gemms, 0.0, rest, 9)

    def fused(self) -> Layer:
        hidden, mlp, q, _ = self._widths
        added = ("o", "down")
        gemms = sum(self.int8(*size, name in added) for name, size in self.shape.sizes.items())
        quantizers = 2 * self.moved(3 * hidden) + self.moved(5 * mlp)
        quantizers += 0.0 if self.is_single else self.moved(3 * q)
        rest = self.rotated() + self.attention()
        return Layer(gemms, quantizers, rest, 9 if self.is_single else 10)

    def unfused(self) -> Layer:
        hidden, mlp, q, kv = self._widths
        pairs = [(n, hidden) for n in (q, kv, kv, mlp, mlp)] + [(hidden, q), (hidden, mlp)]
        gemms = sum(self.int8(n, k) for n, k in pairs)
        quantizers = 0.0 if self.is_single else sum(self.moved(3 * k) for _, k in pairs)
        norm = [
            6,
            8,
            4,
            0,
            0,
            8,
            6,
            4,
        ]  # to float32, square, mean, eps, rsqrt, product, back, weight
        rotary = [2, 4, 4, 4, 6]  # minus, joined, two products, sum; of q and of k
        rest = 2 * sum(self.moved(b * hidden) for b in norm) + 2 * self.moved(6 * hidden)
        rest += sum(self.moved(b * width) for b in rotary for width in (q, kv))
        rest += self.moved(4 * mlp) + self.moved(6 * mlp) + self.attention()
        return Layer(gemms, quantizers, rest, (7 if self.is_single else 14) + 31)


def table(
    gpus: Sequence[str] = tuple(BEST_INT8), models: Sequence[str] = MODELS
) -> tuple[list[str], list[list[str]]]:
    """A line for each GPU, model and situation."""
    shapes = {shape.model: shape for shape in GPU_SHAPES}
    rows = []
    for gpu in gpus:
        for model in models:
            for (phase, sequences, tokens, start), target in SITUATIONS.items():
                one = Planned(gpu, shapes[model], sequences, tokens, start)
                float16, unfused, fused = one.compiled_float16(), one.unfused(), one.fused()
                ratio = float16.us / fused.us
                context = f"{phase} {tokens}" if tokens > 1 else f"{phase} after {start:,}"
                times = [f"{layer.us:.0f}" for layer in (float16, unfused, fused)]
                met = "met" if ratio >= target else "missed"
                speed = [f"{ratio:.2f}x", f"{target:g}x {met}", f"{unfused.us / fused.us:.2f}x"]
                parts = [f"{us:.0f}" for us in (fused.gemms, fused.quantizers, fused.rest)]
                rows.append([gpu, model, context, str(sequences), *times, *speed, *parts])
    return HEADER, rows
