"""Decoder blocks of the published shapes, in a float type and in W8A8, with the same attention: what serving runs.

Projections that read the same input are one matrix (qkv; gate and up), as serving engines merge them, for every
variant. Weights are random; one input channel in a hundred is 20 times larger, as in large models, and is smoothed.

Equivalent to (tests/benchmarks/test_block.py compares them): `LlamaDecoderLayer` (RMSNorm, rotary positions,
SwiGLU) or `OPTDecoderLayer` (LayerNorm before, ReLU, biases) of transformers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.runner import WrongResult
from benchmarks.lib.shapes import DECODERS, Decoder
from smoothquant_kernels import W8A8Linear, ops
from smoothquant_kernels.fusion.optimize import optimize_for_inference
from smoothquant_kernels.fusion.record import fusion_info

EPS = 1e-5
LINEARS = ("qkv", "o", "up", "down")
#: Linears whose smoothing factors go into the norm before them; the others' are divided by at run time.
FOLDED = {"qkv": "norm1", "up": "norm2"}
OUTLIERS, OUTLIER = 100, 20.0  # one channel in OUTLIERS is OUTLIER times larger


@dataclass(frozen=True)
class Shape:
    """A decoder block: `heads` of `head_dim` for the queries, `kv_heads` for keys and values."""

    model: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    gated: bool = True
    qkv_bias: bool = False

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every matrix."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "up": ((2 if self.gated else 1) * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }

    @property
    def parameters(self) -> int:
        """Of the matrices."""
        return sum(n * k for n, k in self.sizes.values())


def shape_of(decoder: Decoder) -> Shape:
    """All of the published models here have heads of 128."""
    return Shape(
        decoder.model, decoder.hidden, decoder.mlp, decoder.q // 128, decoder.kv // 128,
        gated=decoder.gated, qkv_bias=decoder.model.startswith("Qwen2.5"),
    )  # fmt: skip


_NAMED = {decoder.model: shape_of(decoder) for decoder in DECODERS if decoder.experts == 1}
#: The most telling first.
GPU_SHAPES = tuple(
    _NAMED[name] for name in ("LLaMA-7B", "LLaMA-70B", "OPT-13B", "Llama 3 8B", "Qwen2.5-7B")
)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 9, 3, head_dim=64)
CPU_SHAPES = (SMOLLM2, _NAMED["LLaMA-7B"])
TOY_SHAPES = (
    Shape("toy llama", 64, 160, 4, 2, head_dim=16),
    Shape("toy opt", 48, 96, 3, 3, head_dim=16, gated=False),
)


@dataclass
class Situation:
    """What a block finds beside x [B, T, hidden]: keys and values of all positions, and the angles of the T new ones.

    `k`, `v` [B, kv heads, start + T, head_dim] of the block's dtype; `cos`, `sin` [T, head_dim].
    """

    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    start: int

    @staticmethod
    def make(
        shape: Shape, batch: int, tokens: int, start: int, like: Tensor, generator: torch.Generator
    ) -> Situation:
        size = (batch, shape.kv_heads, start + tokens, shape.head_dim)
        k, v = (torch.randn(size, generator=generator, device=like.device) for _ in range(2))
        half = torch.arange(0, shape.head_dim, 2, device=like.device) / shape.head_dim
        places = torch.arange(start, start + tokens, device=like.device, dtype=torch.float32)
        angles = torch.outer(places, 10_000.0**-half).repeat(1, 2)
        made = Situation(k, v, angles.cos(), angles.sin(), start)
        return made.to(like.dtype)

    def to(self, place: torch.dtype | torch.device) -> Situation:
        """A copy, also where type and device are the same: a block writes keys and values."""
        parts = (t.to(place, copy=True) for t in (self.k, self.v, self.cos, self.sin))
        return Situation(*parts, start=self.start)


def rotate(x: Tensor, at: Situation) -> Tensor:
    """Rotary positions of x [B, heads, T, head_dim], the two halves of a head as pairs (LLaMA)."""
    low, high = x.chunk(2, dim=-1)
    return x * at.cos + torch.cat((-high, low), dim=-1) * at.sin


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [B, heads, T, d] over k, v [B, kv heads, S, d] -> [B, heads, T, d]"""
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and q.is_cuda and q.dtype == torch.float32:
        # No fused kernel shares float32 keys: PyTorch would make all T x S weights, of a long prompt some 50 GB.
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared > 1)


def attend(shape: Shape, qkv: Tensor, at: Situation) -> Tensor:
    """qkv [B, T, (heads + 2 kv heads) head_dim] -> [B, T, heads x head_dim]; new keys and values are kept."""
    batch, tokens, _ = qkv.shape
    split = qkv.view(batch, tokens, -1, shape.head_dim).transpose(1, 2)
    q, k, v = split.split((shape.heads, shape.kv_heads, shape.kv_heads), dim=1)
    if shape.gated:
        q, k = rotate(q, at), rotate(k, at)
    at.k[:, :, at.start :] = k
    at.v[:, :, at.start :] = v
    y = attention(q, at.k, at.v, causal=tokens > 1)
    return y.transpose(1, 2).reshape(batch, tokens, -1)


class Block(nn.Module):
    """A pre-norm decoder block whose matrices are `nn.Linear`, or `W8A8Linear` each with its own quantization."""

    def __init__(self, shape: Shape, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.shape = shape
        norm = nn.RMSNorm if shape.gated else nn.LayerNorm
        self.norm1 = norm(shape.hidden, eps=EPS, device=device)
        self.norm2 = norm(shape.hidden, eps=EPS, device=device)
        for name, (n, k) in shape.sizes.items():
            bias = not shape.gated or (shape.qkv_bias and name == "qkv")
            self.add_module(name, nn.Linear(k, n, bias=bias, device=device))
        self.activation = nn.SiLU() if shape.gated else nn.ReLU()
        self.eval()

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> Block:
        """Outputs as large as inputs, so that every branch counts in what comes out."""
        for name, (_, k) in self.shape.sizes.items():
            linear = self.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.normal_(0, k**-0.5, generator=generator)
            if linear.bias is not None:
                linear.bias.normal_(0, 0.1, generator=generator)
        for norm in (self.norm1, self.norm2):
            norm.weight.normal_(1, 0.1, generator=generator)
            chosen = torch.randperm(self.shape.hidden, generator=generator, device=generator.device)
            large = chosen[: max(1, self.shape.hidden // OUTLIERS)]
            norm.weight[large] *= OUTLIER
            # As in trained models: what is large is multiplied by small weights, or nothing else would be heard.
            reader = self.get_submodule("qkv" if norm is self.norm1 else "up")
            assert isinstance(reader, nn.Linear)
            reader.weight[:, large] /= OUTLIER**0.5
        return self

    def activate(self, y: Tensor) -> Tensor:
        """[..., 2 mlp] (gate, then up) or [..., mlp] -> [..., mlp]"""
        if not self.shape.gated:
            return self.activation(y)
        gate, up = y.chunk(2, dim=-1)
        return self.activation(gate) * up

    def forward(self, x: Tensor, at: Situation) -> Tensor:
        x = x + self.o(attend(self.shape, self.qkv(self.norm1(x)), at))
        return x + self.down(self.activate(self.up(self.norm2(x))))

    def inputs(self, x: Tensor, at: Situation) -> dict[str, Tensor]:
        """What each matrix reads."""
        found: dict[str, Tensor] = {}
        hooks = [
            self.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: found.update({name: args[0]})
            )
            for name in LINEARS
        ]
        try:
            self(x, at)
        finally:
            for hook in hooks:
                hook.remove()
        return found


@torch.no_grad()
def quantized(
    block: Block, x: Tensor, at: Situation, alpha: float = 0.5, dtype: torch.dtype = torch.float32
) -> Block:
    """The block in W8A8, per token and per channel, every matrix smoothed by what it reads for x; a copy.

    Its norms are of `dtype`, as a checkpoint of that type has them.
    """
    made = copy.deepcopy(block)
    read = made.inputs(x, at)
    for name in LINEARS:
        linear = made.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        x_max, w_max = read.pop(name).flatten(0, -2).abs().amax(0), linear.weight.abs().amax(0)
        s = x_max.float().clamp(min=1e-5) ** alpha / w_max.float().clamp(min=1e-5) ** (1 - alpha)
        norm = FOLDED.get(name)
        if norm:
            before = made.get_submodule(norm)
            for part in before.parameters():
                part.div_(s)
            linear.weight.mul_(s)
        layer = W8A8Linear.from_linear(linear, smooth=None if norm else s)
        setattr(made, name, layer)
    for norm in FOLDED.values():
        made.get_submodule(norm).to(dtype)
    return made


def fused(block: Block, x: Tensor, at: Situation) -> Block:
    """A quantized block as users get it from `optimize_for_inference`; a copy.

    Raises:
        WrongResult: a norm, the activation or a residual was not fused.
    """
    made = copy.deepcopy(block).eval()
    sample: dict[str, Any] = {"x": x, "at": at}
    optimize_for_inference(made, sample)
    norm, activation = ("rms_norm", "silu") if block.shape.gated else ("layer_norm", "relu")
    wanted = {
        "qkv": (norm, False), "o": ("quantize", True), "up": (norm, False), "down": (activation, True)
    }  # fmt: skip
    found = {layer.name: (layer.kind, layer.residual) for layer in fusion_info(made)}
    if found != wanted:
        raise WrongResult(f"fused are {found}, not {wanted}")
    return made


class Parts:
    """The work of a fused block, part by part, in the ops that its calls are: a quantizer and a GEMM each."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.kind = "silu_mul" if block.shape.gated else "relu"

    def quantize(self, name: str, x: Tensor) -> tuple[Tensor, ...]:
        """The int8 input of a matrix, from x: the residual stream (norms), attention's output, or that of `up`."""
        if name == "o":
            return ops.quantize(x, inv_smooth=self.block.o.inv_smooth)
        if name == "down":
            return ops.act_quantize(x, self.kind, inv_smooth=self.block.down.inv_smooth)
        norm = self.block.get_submodule(FOLDED[name])
        if isinstance(norm, nn.LayerNorm):
            return ops.layer_norm_quantize(x, norm.weight, norm.bias, EPS)
        assert isinstance(norm, nn.RMSNorm)
        return ops.rms_norm_quantize(x, norm.weight, EPS)

    def multiply(
        self, name: str, int8: tuple[Tensor, ...], dtype: torch.dtype, residual: Tensor | None
    ) -> Tensor:
        """A matrix times the int8 input and its scale."""
        x_q, x_scale = int8
        layer: Any = self.block.get_submodule(name)
        more = {"bias": layer.bias, "residual": residual, "out_dtype": dtype}
        return ops.gemm_s8(x_q, layer.w_q, x_scale, layer.w_scale, **more)

    def calls(self, x: Tensor, at: Situation) -> dict[str, Any]:
        """Three calls, each on what it reads in the whole: "gemm", "quantise", "attention"."""
        int8: dict[str, tuple[Tensor, ...]] = {}

        def step(name: str, t: Tensor, residual: Tensor | None = None) -> Tensor:
            int8[name] = self.quantize(name, t)
            return self.multiply(name, int8[name], x.dtype, residual)

        qkv = step("qkv", x)
        attended = attend(self.block.shape, qkv, at)
        x2 = step("o", attended, x)
        up = step("up", x2)
        read = dict(zip(LINEARS, (x, attended, x2, up), strict=True))
        int8["down"] = self.quantize("down", up)
        added = {"o": x, "down": x2}
        return {
            "gemm": lambda: [
                self.multiply(name, int8[name], x.dtype, added.get(name)) for name in LINEARS
            ],
            "quantise": lambda: [self.quantize(name, t) for name, t in read.items()],
            "attention": lambda: attend(self.block.shape, qkv, at),
        }


def float_linears(block: Block, x: Tensor, at: Situation) -> Any:
    """A call of the four matrices of a float block, each on what it reads in the whole."""
    read = block.inputs(x, at)
    return lambda: [block.get_submodule(name)(read[name]) for name in LINEARS]


def relative_error(y: Tensor, exact: Tensor, x: Tensor) -> float:
    """Of what a block adds to x: what the residual carries through unchanged would hide any error."""
    change = exact.double() - x.double()
    return float((y.double() - exact.double()).norm() / change.norm())
