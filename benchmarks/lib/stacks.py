"""Whole models for model.py: transformers' own, and stacks of blocks.py between an embedding and a head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib import blocks, smollm2
from benchmarks.lib.blocks import EPS, SMOLLM2, Block, Shape, Situation
from smoothquant_kernels import SmoothQuantConfig, quantize_model, smooth_and_quantize
from smoothquant_kernels.fusion.optimize import optimize_for_inference

CALIBRATION = 4096  # tokens for the real model
Models = dict[str, nn.Module]
#: The quantized models: as `quantize_model` leaves one, and as `optimize_for_inference` makes it.
INT8, FUSED = "w8a8", "w8a8_fused"


def vocabulary(model: Any) -> int:
    return int(model.head.out_features if isinstance(model, Stack) else model.config.vocab_size)


def logits(model: Any, ids: Tensor) -> Tensor:
    """[B, T, vocabulary] for a prompt."""
    if not isinstance(model, Stack):
        return model(input_ids=ids, use_cache=False).logits
    generator = torch.Generator(ids.device).manual_seed(0)
    return model(ids, model.situations(*ids.shape, 0, generator))


def random_llama(
    shape: Shape, layers: int, dtype: torch.dtype, device: torch.device, words: int
) -> nn.Module:
    """A `LlamaForCausalLM` of these widths, random."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=words, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, rms_norm_eps=EPS,
        initializer_range=shape.hidden**-0.5,  # so that every layer contributes to the output
        max_position_embeddings=16_384, tie_word_embeddings=False,
    )  # fmt: skip
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def stock_models(
    shape: Shape,
    layers: int,
    names: Sequence[str],
    device: torch.device,
    words: int,
    head: str = "float",
) -> Models:
    """transformers' model in each type, and what this package makes of it; the real one is smoothed first.

    A random model is not smoothed: a LLaMA's factors go into its weights, so that the kernels are the same.
    """
    main = getattr(torch, names[0])
    config = SmoothQuantConfig(calibration_tokens=CALIBRATION, quantize_head=head == "int8")
    if shape is SMOLLM2:
        model, tokenizer = smollm2.load(main)
        model = model.to(device)
        ids = [window.to(device) for window in smollm2.calibration(tokenizer, CALIBRATION)]
        int8 = smooth_and_quantize(copy.deepcopy(model), ids, config, progress=False)
    else:
        torch.manual_seed(0)
        model = random_llama(shape, layers, main, device, words)
        int8 = quantize_model(copy.deepcopy(model), config=config)
    sample = torch.arange(16, device=device)[None]
    found: Models = {INT8: int8, FUSED: optimize_for_inference(copy.deepcopy(int8), sample)}
    found[names[0]] = model
    return found | {name: copy.deepcopy(model).to(getattr(torch, name)) for name in names[1:]}


class Stack(nn.Module):
    """Embedding, blocks (float or W8A8), norm and head."""

    def __init__(self, shape: Shape, parts: Sequence[nn.Module], ends: Sequence[nn.Module]) -> None:
        super().__init__()
        self.shape = shape
        self.embedding, self.norm, self.head = ends
        self.parts = nn.ModuleList(parts)

    def situations(
        self, batch: int, tokens: int, start: int, generator: torch.Generator
    ) -> list[Situation]:
        """Keys and values of their own for each block."""
        size = (self.shape, batch, tokens, start, self.head.weight, generator)
        return [Situation.make(*size) for _ in self.parts]

    def forward(self, ids: Tensor, situations: Sequence[Situation], last: bool = False) -> Tensor:
        x = self.embedding(ids)
        for part, at in zip(self.parts, situations, strict=True):
            x = part(x, at)
        return self.head(self.norm(x[:, -1:] if last else x))


def stack_models(
    shape: Shape, layers: int, names: Sequence[str], device: torch.device, words: int
) -> Models:
    """The same random model in each type and in W8A8, unfused and fused.

    Embedding, norm and head of the W8A8 models are in the first float type.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtypes = {name: getattr(torch, name) for name in names}
    main = dtypes[names[0]]
    x = torch.randn(1, 128, shape.hidden, generator=generator, device=device)
    parts: dict[str, list[nn.Module]] = {name: [] for name in (INT8, FUSED, *names)}
    for _ in range(layers):  # one float32 block at a time
        exact = Block(shape, device).randomize(generator)
        at = Situation.make(shape, 1, 128, 0, x, generator)
        int8 = blocks.quantized(exact, x, at, dtype=main)
        parts[INT8].append(int8)
        parts[FUSED].append(blocks.fused(int8, x.to(main), at.to(main)))
        x = exact(x, at)
        for name, dtype in dtypes.items():
            parts[name].append(copy.deepcopy(exact).to(dtype))
    embedding = nn.Embedding(words, shape.hidden, device=device)
    embedding.weight.normal_(generator=generator)
    head = nn.Linear(shape.hidden, words, bias=False, device=device)
    head.weight.normal_(0, shape.hidden**-0.5, generator=generator)
    ends = (embedding, nn.RMSNorm(shape.hidden, eps=EPS, device=device), head)
    return {
        name: Stack(shape, modules, [copy.deepcopy(end).to(dtypes.get(name, main)) for end in ends])
        for name, modules in parts.items()
    }


def stack_call(
    model: Any, ids: Tensor, start: int, generator: torch.Generator
) -> Callable[[], Tensor]:
    """A prompt, or after `start` tokens one greedy step: ids [B, start + T] -> the next [B, 1]."""
    new = ids[:, start:].contiguous()
    at = model.situations(*new.shape, start, generator)
    return lambda: model(new, at, last=True).argmax(-1)
