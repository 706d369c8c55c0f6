"""Writes the measured tables into README.md and docs/ from the files in benchmarks/results/.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME ... -->` and `<!-- end table -->`. `--check` changes nothing and fails if a
table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model
import predict

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/accuracy.md", "docs/cpu.md", "docs/performance.md")
MARKED = re.compile(r"(<!-- table: (\w+)[^>]*-->\n).*?(<!-- end table -->)", re.DOTALL)


def newest(pattern: str) -> dict[str, Any] | None:
    """The results file of the newest folder (`<machine>_<date>/`) that has one."""
    files = sorted(RESULTS.glob(f"*/{pattern}"), key=lambda f: f.parent.name.rsplit("_", 1)[-1])
    return json.loads(files[-1].read_text()) if files else None


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text and the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows)) + "\n"


def _change(row: dict[str, Any]) -> list[str]:
    if "scheme" in row:
        return [
            f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %",
            f"{row['mean_kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
        ]
    return ["", "", ""]


def _accuracy_rows(rows: list[dict[str, Any]], key: str | None = None) -> str:
    header = [
        "model",
        "scheme",
        *([key] if key else []),
        "perplexity",
        "change",
        "mean KL",
        "same top-1",
    ]
    body = [
        [
            row["model"],
            row.get("scheme", ""),
            *([str(row[key])] if key else []),
            f"{row['perplexity']:.3f}",
            *_change(row),
        ]
        for row in rows
    ]
    return markdown(header, body, left=3 if key else 2)


def _caption(facts: dict[str, Any]) -> str:
    return (
        f"{facts['model']}, {facts['evaluation_tokens']} tokens of Python's documentation topics that calibration "
        f"({facts['calibration_tokens']} tokens of other topics) never saw; torch {facts['torch']}, CPU; "
        "± is one standard error of the paired difference; `python benchmarks/bench_accuracy.py`.\n\n"
    )


def accuracy(part: str, key: str | None = None) -> str:
    data = newest("accuracy.json")
    if data is None or part not in data:
        return "Not measured yet.\n"
    return _caption(data["facts"]) + _accuracy_rows(data[part], key)


def cpu_linear() -> str:
    data = newest("linear_cpu.json")
    if data is None:
        return "Not measured yet.\n"
    machine = data["machine"]
    caption = (
        f"{machine['cpu']}, {machine['capability']}, int8 mode `{machine['int8_mode']}`, {machine['threads']} thread, "
        f"torch {machine['torch']}; medians of interleaved calls; `{machine['command']}`.\n\n"
    )
    rows = [
        [
            row["layer"],
            f"{row['N']} x {row['K']}",
            str(row["M"]),
            f"{row['int8_us']:.0f}",
            f"{row['gops']:.0f}",
            f"{row['vs_float32']:.2f}x",
            f"{row['vs_bfloat16']:.2f}x",
        ]
        for row in data["rows"]
    ]
    header = ["layer", "N x K", "M", "W8A8Linear us", "GOPS", "vs float32", "vs bfloat16"]
    return caption + markdown(header, rows, left=2)


def search() -> str:
    data = newest("search.json")
    if data is None:
        return "Not measured yet.\n"
    caption = _caption(data["facts"]).replace("bench_accuracy", "bench_search")
    header = ["settings", "scheme", "perplexity", "change", "mean KL", "same top-1", "cost"]
    rows = [
        [
            row["model"],
            row.get("scheme", ""),
            f"{row['perplexity']:.3f}",
            f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %",
            f"{row['mean_kl']:.4f} ± {row['kl_stderr']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['cost']:.4f}" if "cost" in row else "",
        ]
        for row in data["rows"]
    ]
    searches = ", ".join(f"{s['name']} {s['cpu_seconds']:.0f} s" for s in data["searches"])
    note = f"\n*cost*: what the search expected, in nats. CPU time of the searches, one thread: {searches}.\n"
    return caption + markdown(header, rows, left=2) + note


def sentence() -> str:
    data = newest("sentence.json")
    if data is None:
        return "Not measured yet.\n"
    facts = data["facts"]
    caption = (
        f"{facts['model']}, {facts['sentences']} sentences of Python's documentation topics that calibration "
        f"({facts['calibration_tokens']} tokens of other topics) never saw; torch {facts['torch']}, CPU; cosine of the "
        "embeddings by the quantised and by the float32 model; `python benchmarks/bench_sentence.py`.\n\n"
    )
    header = ["model", "scheme", "per token", "mean", "median", "5 %", "1 %", "worst"]
    rows = [
        [row["model"], row["scheme"], f"{row['per_token_layers']} of {row['layers']}"]
        + [f"{row[key]:.5f}" for key in ("mean", "p50", "p5", "p1", "min")]
        for row in data["rows"]
    ]
    return caption + markdown(header, rows, left=2)


def peers() -> str:
    data = newest("peers.json")
    if data is None:
        return "Not measured yet.\n"
    facts, gib = data["facts"], 2**30
    versions = {k: v for row in data["rows"] for k, v in row["versions"].items()}
    used = ", ".join(
        f"{k} {versions[k]}" for k in ("llmcompressor", "torchao", "torch") if k in versions
    )
    caption = (
        f"{facts['model']}, {facts['evaluation_tokens']} tokens of Python's documentation topics that calibration "
        f"({facts['calibration_tokens']} tokens of other topics) never saw; {used}; CPU, one thread; "
        "± is one standard error of the paired difference; `python benchmarks/peers.py`.\n\n"
    )
    header = [
        "tool",
        "settings",
        "perplexity",
        "change",
        "mean KL",
        "same top-1",
        "CPU s",
        "wall s",
    ]
    rows = [
        [
            row["tool"],
            row["label"],
            f"{row['perplexity']:.3f}",
            f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %",
            f"{row['mean_kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['cpu_s']:.0f}",
            f"{row['wall_s']:.0f}",
            f"{row['rss_peak'] / gib:.2f}",
            f"{(row['rss_peak'] - row['rss_before']) / gib:.2f}",
        ]
        for row in data["rows"]
    ]
    return caption + markdown([*header, "peak GiB", "of it added"], rows, left=2)


def gemm_prediction(gpu: str) -> str | None:
    """Arithmetic, not results: it needs the C++ compiler and no GPU. None without the compiler: the table stays."""
    if shutil.which(predict.COMPILER) is None:
        return None
    described = predict.GPUS[gpu]
    caption = (
        f"{described.name}: {described.sms} SMs at {described.ghz} GHz, {described.tops:.0f} TOPS, "
        f"{described.gb_per_s:.0f} GB/s by its data sheet; likely (low .. high) by "
        f"`python benchmarks/model.py --gpu {gpu}`.\n\n"
    )
    header, rows = model.prediction_table(gpu)
    return caption + markdown(header, rows, left=header.index("M"))


TABLES: dict[str, Callable[[], str | None]] = {
    "accuracy": lambda: accuracy("schemes"),
    "alpha": lambda: accuracy("alpha", "alpha"),
    "rounding": lambda: accuracy("rounding", "smooth_rounding"),
    "planted": lambda: accuracy("planted"),
    "search": search,
    "sentence": sentence,
    "peers": peers,
    "cpu_linear": cpu_linear,
    "gemm_h100": lambda: gemm_prediction("H100"),
    "gemm_a100": lambda: gemm_prediction("A100"),
    "gemm_l40s": lambda: gemm_prediction("L40S"),
}


def renewed(table: re.Match[str]) -> str:
    text = TABLES[table[2]]()
    return table[0] if text is None else table[1] + text + table[3]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        path = ROOT / page
        old = path.read_text()
        new = MARKED.sub(renewed, old)
        if new != old:
            stale.append(page)
            if not check:
                path.write_text(new)
    print(("out of date: " if check else "written: ") + (", ".join(stale) or "none"))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
