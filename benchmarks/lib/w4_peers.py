"""Weights of 4 bits by other tools, for `benchmarks.w4a8`: each gets the model and the calibration windows of ours.

Every tool leaves the output head in float, and runs in a process of its own (`benchmarks.peers`). `group` is the number
of input channels that share a scale, `a_bit` the bits of the activations (16: they stay in float).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.lib.llm_compressor import one_shot, spin_quant
from benchmarks.lib.smollm2 import WINDOW
from smoothquant_kernels.evaluation.models import load_tokenizer
from smoothquant_kernels.nn import kinds

Work = Callable[[], nn.Module]
#: Tokens of a prompt, tokens of a turn, and turns of `decode_ratio`.
PROMPT, STEPS, TURNS = 32, 2, 5


def llm_compressor(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    """Weights by GPTQ or to the nearest values; before that, AWQ's scales or SpinQuant's rotations if asked for."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    weights = QuantizationArgs(
        num_bits=4,
        type="int",
        strategy="group",
        group_size=options["group"],
        symmetric=options.get("symmetric", True),
    )
    inputs = QuantizationArgs(
        num_bits=8, type="int", strategy="token", dynamic=True, symmetric=True
    )
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=inputs if options["a_bit"] == 8 else None,
    )
    modifier = GPTQModifier if options.get("gptq") else QuantizationModifier
    recipe: list[Any] = [modifier(ignore=["lm_head"], config_groups={"group_0": scheme})]
    if options.get("awq"):
        # It pins activations in memory, which torch refuses without an accelerator.
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, value: None)
        recipe.insert(0, AWQModifier())
    if options.get("rotate") == "spin":
        recipe.insert(0, spin_quant())
    return one_shot(model, windows, recipe)


def torchao(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    """Nearest values in a symmetric range, its default, or any; int8 activations with a zero point per token."""
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )
    from torchao.quantization.quant_primitives import MappingType

    group = PerGroup(options["group"])
    mapping = MappingType.SYMMETRIC if options.get("symmetric", True) else MappingType.ASYMMETRIC
    if options["a_bit"] == 8:
        config: Any = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=group, weight_mapping_type=mapping
        )
    else:
        config = IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=group, mapping_type=mapping
        )

    def work() -> nn.Module:
        quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
        return model

    return work


def auto_round(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    """Signed gradient descent on the rounding and the ranges, `iters` steps for each block."""
    from auto_round import AutoRound

    tokenizer = load_tokenizer(Path(options["model"]))
    inputs: dict[str, Any] = {}
    if options["a_bit"] == 8:
        inputs = {"act_bits": 8, "act_group_size": -1, "act_sym": True, "act_dynamic": True}

    def work() -> nn.Module:
        rounding = AutoRound(
            model, tokenizer, bits=4, group_size=options["group"], sym=True, iters=options["iters"],
            nsamples=len(windows), seqlen=WINDOW, batch_size=1, dataset=windows,
            device_map="cpu", amp=False, **inputs,
        )  # fmt: skip
        found = rounding.quantize()
        made: nn.Module = found[0] if isinstance(found, tuple) else found
        made.saving = rounding  # type: ignore[assignment]
        return made

    return work


TOOLS: dict[str, Callable[[nn.Module, list[Tensor], dict[str, Any]], Work]] = {
    "llm-compressor W4": llm_compressor,
    "torchao W4": torchao,
    "auto-round": auto_round,
}
DISTRIBUTIONS = {
    "llm-compressor W4": ("llmcompressor", "compressed-tensors"),
    "torchao W4": ("torchao",),
    "auto-round": ("auto-round",),
}


#: The tool whose layers are in memory what they are in a checkpoint; the others compute with unpacked weights.
PACKED = "torchao W4"

# --- bytes ------------------------------------------------------------------------------------------------------------


def linear_bytes(model: nn.Module) -> int:
    """Of the weights, scales and whatever else the quantized layers hold, as they are in memory."""
    return sum(
        _bytes(tensor)
        for name, module in model.named_modules()
        if kinds.is_quantized(module) or is_projection(name)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )


def is_projection(name: str) -> bool:
    return name.rpartition(".")[2].endswith("_proj")


def _bytes(tensor: Tensor) -> int:
    """A tensor subclass says which tensors it consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def saved_bytes(tool: str, model: Any) -> int | None:
    """The same in the checkpoint that the tool writes: it computes with unpacked weights."""
    with tempfile.TemporaryDirectory() as folder:
        if tool == "auto-round":
            model.saving.save_quantized(folder, format="auto_round")
        else:
            model.save_pretrained(folder, save_compressed=True)
        total = 0
        for file in Path(folder).rglob("*.safetensors"):
            with safe_open(file, "pt") as data:
                for name in data.keys():
                    if is_projection(name.rpartition(".")[0]):
                        total += data.get_tensor(name).nbytes
    return total or None


# --- time -------------------------------------------------------------------------------------------------------------


class _Decoding:
    """A model after a prompt: every call decodes some tokens, one at a time."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.next = model, prompt[:, -1:]
        with torch.no_grad():
            self.cache = model(input_ids=prompt[:, :-1], use_cache=True).past_key_values

    def __call__(self, steps: int) -> float:
        """CPU seconds."""
        begin = time.process_time()
        with torch.no_grad():
            for _ in range(steps):
                self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True)
        return time.process_time() - begin


def decode_ratio(model: nn.Module, original: nn.Module, prompt: Tensor) -> dict[str, float]:
    """CPU time of a decode step over that of the float32 model: in turns, on one thread, the median."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        both = [_Decoding(m, prompt[:, :PROMPT]) for m in (model, original)]
        for decoding in both:
            decoding(1)  # packing, the choice of kernels
        turns = [tuple(decoding(STEPS) for decoding in both) for _ in range(TURNS)]
    finally:
        torch.set_num_threads(threads)
    ratios = sorted(mine / its for mine, its in turns)
    steps = sorted(mine / STEPS for mine, _ in turns)
    spread = {"decode_ratio_least": ratios[0], "decode_ratio_most": ratios[-1]}
    return {"decode_ratio": ratios[TURNS // 2], "decode_cpu_s": steps[TURNS // 2], **spread}
