"""One tool of the comparison in one process: calibrate, smooth and quantise (measured), then evaluate.

    PYTHON peers_tools.py TOOL '{"alpha": 0.8}' --model FOLDER --out FILE.json

`peers.py` starts it with the interpreter in which the tool is installed and with this tree on PYTHONPATH; TOOL is a
key of `TOOLS`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smoothquant_kernels import SmoothQuantConfig, ops
from smoothquant_kernels.evaluation.models import load_model, load_tokenizer
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.evaluation.text import Window, token_windows, topics

WINDOW = 512
Work = Callable[[], nn.Module]
Tool = Callable[[nn.Module, list[Tensor], dict[str, Any]], Work]


# --- the tools --------------------------------------------------------------------------------------------------------
# Each imports what it needs and returns the work that is measured.


def ours(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    from smoothquant_kernels import smooth_and_quantize

    config = SmoothQuantConfig.from_dict(options)
    return lambda: smooth_and_quantize(model, windows, config, progress=False)


def llm_compressor(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    """Its W8A8 recipe: a scale per token (its default), or the same with one calibrated scale per tensor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    modifier = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[options["weights"]]
    if options["scheme"] == "static":
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True),
            input_activations=QuantizationArgs(
                num_bits=8, type="int", strategy="tensor", symmetric=True, dynamic=False
            ),
        )
        chosen: dict[str, Any] = {"config_groups": {"group_0": scheme}}
    else:
        chosen = {"targets": "Linear", "scheme": "W8A8"}
    recipe = [
        SmoothQuantModifier(smoothing_strength=options["alpha"]),
        modifier(ignore=["lm_head"], **chosen),
    ]
    rows = {
        "input_ids": [w[0].tolist() for w in windows],
        "attention_mask": [[1] * w.shape[1] for w in windows],
    }
    data = Dataset.from_dict(rows)

    def work() -> nn.Module:
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(windows),
            max_seq_length=WINDOW,
        )
        return model

    return work


def torchao(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    """Its SmoothQuant prototype; int8 weights per channel, activations per token or with a calibrated scale."""
    from torchao.prototype.smoothquant import SmoothQuantConfig as Config
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        PerTensor,
        quantize_,
    )
    from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

    if options["scheme"] == "static":
        from torchao.quantization import Int8StaticActivationInt8WeightConfig

        base: Any = Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])
    else:
        base = Int8DynamicActivationInt8WeightConfig()

    def chosen(module: nn.Module, name: str) -> bool:  # as everywhere here, the head stays float
        return isinstance(module, nn.Linear) and name != "lm_head"

    def work() -> nn.Module:
        config = Config(base_config=base, step=QuantizationStep.PREPARE, alpha=options["alpha"])
        quantize_(model, config, chosen)
        with torch.no_grad():
            for window in windows:
                model(window, use_cache=False)
        config.step = QuantizationStep.CONVERT
        quantize_(model, config, chosen)
        return model

    return work


def exact_int8_products() -> None:
    """Evaluation only: torchao's int8 product on this package's exact one, whose float32 sums are the same.

    Where the CPU has no VNNI, `torch._int_mm` is a plain loop, twenty times slower.
    """
    from torchao.kernel import intmm

    one = torch.ones(1)

    def product(a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
        return ops.gemm_s8(a, b.t(), one, one, out_dtype=torch.float32).to(scales.dtype) * scales

    intmm._int_scaled_matmul_cpu = product


def float32(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    return lambda: model


TOOLS: dict[str, Tool] = {
    "float32": float32,
    "smoothquant_kernels": ours,
    "llm-compressor": llm_compressor,
    "torchao": torchao,
}
DISTRIBUTIONS = {
    "llm-compressor": ("llmcompressor", "compressed-tensors"),
    "torchao": ("torchao",),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def _memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


@contextmanager
def measured(facts: dict[str, Any]) -> Iterator[None]:
    """Wall time, CPU time (user + system, all threads) and resident memory of the block."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
    facts["rss_before"] = _memory("VmRSS")
    facts["load_average"] = os.getloadavg()[0]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    yield
    after = resource.getrusage(resource.RUSAGE_SELF)
    facts["wall_s"] = time.perf_counter() - begin
    facts["cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts["rss_peak"] = _memory("VmHWM")


class StoredReference(Reference):
    """Answers of the float32 model that another process wrote: mapped, so that they cost no second run."""

    def __init__(self, file: Path) -> None:
        super().__init__(nn.Identity())
        self._stored = safe_open(file, "pt")

    def log_probs(self, window: Window) -> Tensor:
        values: Tensor = self._stored.get_tensor(_key(window))
        return values


def _key(window: Window) -> str:
    return f"{hashlib.sha256(window.input_ids.numpy().tobytes()).hexdigest()}:{window.scored}"


def store_reference(reference: Reference, windows: list[Window], file: Path) -> None:
    save_file({_key(w): reference.log_probs(w) for w in windows}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--model", type=Path, required=True, help="folder with the float32 model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1, help="of the measured phase")
    parser.add_argument("--evaluation-threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model)
    # Weights are mapped and read at their first use: now, so that it is in nobody's measured phase.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    pieces = token_windows(
        topics("calibration"), tokenizer, window=WINDOW, max_tokens=args.calibration
    )
    work = TOOLS[args.tool](model, [p.input_ids for p in pieces], args.options)
    facts: dict[str, Any] = {}
    with measured(facts):
        model = work()
    torch.set_num_threads(args.evaluation_threads)
    if args.tool == "torchao":
        exact_int8_products()
    texts = topics("evaluation")
    stored = args.model.parent / "reference.safetensors"
    first = args.tool == "float32"
    reference = Reference(model, max_bytes=1 << 40) if first else StoredReference(stored)
    result = evaluate(
        model, texts, tokenizer, reference=reference, window=WINDOW, max_tokens=args.tokens
    )
    if first:
        windows = token_windows(texts, tokenizer, window=WINDOW, max_tokens=args.tokens)
        store_reference(reference, windows, stored)
    versions = {
        name: metadata.version(name)
        for name in ("torch", "transformers", *DISTRIBUTIONS.get(args.tool, ()))
    }
    args.out.write_text(json.dumps({**facts, **result.to_dict(), "versions": versions}))


if __name__ == "__main__":
    main()
