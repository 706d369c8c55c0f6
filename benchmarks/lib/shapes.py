"""The shapes that benchmarks measure: (N, K) of `nn.Linear` weights in published models, and numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: The CPU benchmark: both MLP directions of SmolLM2-135M, square attention and both MLP directions of LLaMA-7B.
CPU_LINEARS = {
    "SmolLM2-135M up": (1536, 576),
    "SmolLM2-135M down": (576, 1536),
    "LLaMA-7B attention": (4096, 4096),
    "LLaMA-7B up": (11008, 4096),
    "LLaMA-7B down": (4096, 11008),
}
CPU_TOKENS = (1, 16, 64, 256)

#: Row lengths that the producers of int8 activations meet, most common first. A norm's output is as wide as the
#: model; an activation function's as wide as the MLP.
HIDDEN_WIDTHS = (4096, 5120, 8192)  # LLaMA-7B, Llama 3 8B; LLaMA-13B, OPT-13B; LLaMA-70B
MLP_WIDTHS = (14336, 11008, 28672)  # Llama 3 8B; LLaMA-7B; LLaMA-70B
#: A prompt, one decoded token, a batch of decoded tokens, a long prompt, what lies between.
GPU_TOKENS = (2048, 1, 64, 8192, 16, 256)

#: The same on a CPU: SmolLM2-135M and LLaMA-7B.
CPU_HIDDEN_WIDTHS, CPU_MLP_WIDTHS = (4096, 576), (11008, 1536)
CPU_PRODUCER_TOKENS = (256, 1, 16)

#: The same in a rehearsal on a CPU: a width with a tail, and few rows.
REHEARSAL_WIDTHS = (256, 515)
REHEARSAL_TOKENS = (16, 1)


@dataclass(frozen=True)
class Layer:
    """One linear layer of one model: its weight is [n, k]."""

    model: str
    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.model} {self.name}"


@dataclass(frozen=True)
class Decoder:
    """What fixes the linear layers of a decoder block: widths of the model, its MLP, and its keys (and values).

    `query` is the width of the queries (heads x their width) where it is not that of the model; of a mixture of
    `experts` each has an MLP of its own.
    """

    model: str
    hidden: int
    mlp: int
    kv: int
    gated: bool = True
    query: int = 0
    experts: int = 1

    @property
    def q(self) -> int:
        return self.query or self.hidden

    def layers(self) -> tuple[Layer, ...]:
        """The most telling first. `qkv` and `gate_up` are fused; `up` has the shape of gate too, and `o` that of q
        where the queries are as wide as the model."""
        h = self.hidden
        up, down, o = ("up", "down", "o") if self.gated else ("fc1", "fc2", "out")
        shapes = {up: (self.mlp, h), down: (h, self.mlp), o: (h, self.q)}
        shapes["qkv"] = (self.q + 2 * self.kv, h)
        if self.gated:
            shapes["gate_up"] = (2 * self.mlp, h)
        if self.kv != h:
            shapes["kv"] = (self.kv, h)
        if self.q != h:
            shapes["q"] = (self.q, h)
        return tuple(Layer(self.model, name, n, k) for name, (n, k) in shapes.items())

    @property
    def parameters(self) -> int:
        """Of all linear layers of one block, without biases."""
        mlp = (3 if self.gated else 2) * self.hidden * self.mlp
        return 2 * self.hidden * (self.q + self.kv) + self.experts * mlp


#: From the models' published configurations, the most telling first, small models last.
DECODERS = (
    Decoder("LLaMA-7B", 4096, 11008, 4096),
    Decoder("LLaMA-70B", 8192, 28672, 1024),  # Llama 2
    Decoder("OPT-13B", 5120, 20480, 5120, gated=False),
    Decoder("OPT-30B", 7168, 28672, 7168, gated=False),
    Decoder("OPT-66B", 9216, 36864, 9216, gated=False),
    Decoder("Llama 3 8B", 4096, 14336, 1024),
    Decoder("Qwen2.5-7B", 3584, 18944, 512),
    Decoder("LLaMA-13B", 5120, 13824, 5120),
    Decoder("Mistral 7B", 4096, 14336, 1024),
    Decoder("Llama 3 70B", 8192, 28672, 1024),
    Decoder("OPT-175B", 12288, 49152, 12288, gated=False),
    Decoder("Llama 3 405B", 16384, 53248, 1024),
    Decoder("BLOOM-176B", 14336, 57344, 14336, gated=False),
    Decoder("Qwen3-32B", 5120, 25600, 1024, query=8192),
    Decoder("Qwen3-8B", 4096, 12288, 1024),
    Decoder("Qwen2.5-72B", 8192, 29568, 1024),
    Decoder("Qwen2.5-32B", 5120, 27648, 1024),
    Decoder("LLaMA-65B", 8192, 22016, 8192),
    Decoder("LLaMA-30B", 6656, 17920, 6656),
    Decoder("Mixtral 8x22B", 6144, 16384, 1024, experts=8),
    Decoder("Mixtral 8x7B", 4096, 14336, 1024, experts=8),
    Decoder("Qwen2.5-14B", 5120, 13824, 1024),
    Decoder("Qwen3-14B", 5120, 17408, 1024),
    Decoder("OPT-6.7B", 4096, 16384, 4096, gated=False),
    Decoder("OPT-2.7B", 2560, 10240, 2560, gated=False),
    Decoder("Qwen2.5-3B", 2048, 11008, 256),
    Decoder("OPT-1.3B", 2048, 8192, 2048, gated=False),
    Decoder("Qwen2.5-1.5B", 1536, 8960, 256),
    Decoder("Qwen2.5-0.5B", 896, 4864, 128),
    Decoder("OPT-350M", 1024, 4096, 1024, gated=False),
    Decoder("OPT-125M", 768, 3072, 768, gated=False),
)


def by_place(*axes: Sequence[object]) -> list[tuple[int, ...]]:
    """All places in the axes, each given most important first: by their sum, of equal ones by the first axis.

    So the most telling combination comes first, then those that differ from it in one step of one axis, and a
    benchmark that is cut short has seen something of everything that matters.
    """
    places: list[tuple[int, ...]] = [()]
    for axis in axes:
        places = [(*place, i) for place in places for i in range(len(axis))]
    return sorted(places, key=lambda place: (sum(place), place))


def llm_layers() -> dict[str, Layer]:
    """Every layer of every model by "model layer", the most telling first."""
    blocks = [decoder.layers() for decoder in DECODERS]
    places = by_place(blocks, max(blocks, key=len))
    found = [blocks[i][j] for i, j in places if j < len(blocks[i])]
    return {str(layer): layer for layer in found}


def distinct(layers: Sequence[Layer]) -> dict[Layer, list[str]]:
    """One layer for each (N, K), the first; and the names of the others that share its shape."""
    first: dict[tuple[int, int], Layer] = {}
    found: dict[Layer, list[str]] = {}
    for layer in layers:
        kept = first.setdefault((layer.n, layer.k), layer)
        names = found.setdefault(kept, [])
        if kept is not layer:
            names.append(str(layer))
    return found


LLM_LAYERS = llm_layers()
#: What a GEMM meets: a prompt, decoding alone and in batches, long prompts, then what lies between.
GEMM_TOKENS = (2048, 1, 16, 64, 8192, 8, 256, 32, 4096, 128, 1024, 512, 4, 2, 16384)
#: Classes of M: (the last M, its name).
M_CLASSES = ((8, "M <= 8"), (64, "M 9-64"), (512, "M 65-512"), (2**62, "M > 512"))

#: A rehearsal on a CPU: shapes that tiles divide, and one that they do not.
TOY_LAYERS = (Layer("toy", "up", 96, 64), Layer("toy", "down", 64, 96), Layer("toy", "odd", 40, 23))
TOY_TOKENS = (32, 1)


def m_class(m: int) -> str:
    return next(name for last, name in M_CLASSES if m <= last)
