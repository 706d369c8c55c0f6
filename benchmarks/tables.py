"""Writes the measured tables into README.md and docs/ from the files in benchmarks/results/.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME ... -->` and `<!-- end table -->`. `--check` changes nothing and fails if a
table is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import result_tables
from prediction import compare, expected, gpus, planner, yardstick
from result_tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/accuracy.md", "docs/cpu.md", "docs/gpu.md", "docs/performance.md")
MARKED = re.compile(r"(<!-- table: (\w+)[^>]*-->\n).*?(<!-- end table -->)", re.DOTALL)


Data = dict[str, Any]
NOT_MEASURED = "Not measured yet.\n"


def newest(pattern: str, gpu: bool = False) -> Path | None:
    """The results file of the newest folder (`<machine>_<date>/`) that has one; on request only a GPU's."""

    def by_date(file: Path) -> tuple[str, str]:
        machine, _, date = file.parent.name.rpartition("_")
        return date, machine

    files = sorted(RESULTS.glob(f"*/{pattern}"), key=by_date, reverse=True)
    return next((file for file in files if not gpu or of_gpu(json.loads(file.read_text()))), None)


def of_gpu(data: Data) -> bool:
    """A rehearsal's machine says "cpu" for its device and has no CUDA."""
    return bool(data.get("machine", {}).get("cuda"))


def measured(
    pattern: str, write: Callable[[Data], str | None], gpu: bool = False
) -> Callable[[], str | None]:
    """A table of the newest such file, which `write` gets, its "path" added; one line where there is none."""

    def table() -> str | None:
        path = newest(pattern, gpu)
        return write(json.loads(path.read_text()) | {"path": path}) if path else NOT_MEASURED

    return table


def _change(row: dict[str, Any]) -> list[str]:
    if "scheme" in row:
        return [
            f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %",
            f"{row['mean_kl']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
        ]
    return ["", "", ""]


def _accuracy_rows(
    rows: list[dict[str, Any]], key: str | None = None, other: str | None = None
) -> str:
    """`other`: a kind of text that the rows were evaluated on as well."""
    header = [
        "model",
        "scheme",
        *([key] if key else []),
        "perplexity",
        "change",
        "mean KL",
        "same top-1",
        *([f"perplexity on {other}", "change", "mean KL", "same top-1"] if other else []),
    ]
    body = [
        [
            row["model"],
            row.get("scheme", ""),
            *([str(row[key])] if key else []),
            f"{row['perplexity']:.3f}",
            *_change(row),
            *(
                [
                    f"{row[other]['perplexity']:.3f}",
                    *_change({k: row[k] for k in ("scheme",) if k in row} | row[other]),
                ]
                if other
                else []
            ),
        ]
        for row in rows
    ]
    return markdown(header, body, left=3 if key else 2)


def _caption(facts: dict[str, Any], other: str | None = None) -> str:
    also = f", and {other}, as many tokens, which no choice of settings saw" if other else ""
    return (
        f"{facts['model']}, {facts['evaluation_tokens']} tokens of Python's documentation topics that calibration "
        f"({facts['calibration_tokens']} tokens of other topics) never saw{also}; torch {facts['torch']}, CPU; "
        "± is one standard error of the paired difference; `python benchmarks/bench_accuracy.py`.\n\n"
    )


def accuracy(data: Data, part: str, key: str | None = None) -> str:
    if part not in data:
        return NOT_MEASURED
    other = data["facts"].get("other")
    if other is not None and not all(other in row for row in data[part]):
        other = None
    return _caption(data["facts"], other) + _accuracy_rows(data[part], key, other)


def cpu_linear(data: Data) -> str:
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


def search(data: Data) -> str:
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


def sentence(data: Data) -> str:
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


def peers(data: Data) -> str:
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
    if not planner.available():
        return None
    described = gpus.GPUS[gpu]
    caption = (
        f"{described.name}: {described.sms} SMs at {described.ghz} GHz, {described.tops:.0f} TOPS, "
        f"{described.gb_per_s:.0f} GB/s by its data sheet; `python -m benchmarks.prediction --gpu {gpu}`.\n\n"
    )
    header, rows = expected.table(gpu)
    return caption + markdown(header, rows, left=header.index("M"))


def gemm_yardstick() -> str | None:
    """Other people's times beside the expected ones: a summary by class of M, then each. None without the compiler."""
    if not planner.available():
        return None
    pairs = yardstick.rows()
    summary = markdown(*compare.by_class([ours for _, ours in pairs]))
    header, rows = yardstick.table(pairs)
    return f"{summary}\n{markdown(header, rows, left=header.index('M'))}"


def gpu_caption(data: Data) -> str:
    """The machine, its clocks, the software, the date and the command: what every number needs beside it."""
    machine = data["machine"]
    clocks = [row["sm_mhz"] for row in data.get("rows", ()) if row.get("sm_mhz")]
    under = (
        f"{min(clocks):,.0f} to {max(clocks):,.0f} MHz under load" if clocks else "clocks unknown"
    )
    most = f" (at most {machine['max_sm_mhz']:,.0f})" if machine.get("max_sm_mhz") else ""
    date = machine.get("date") or data["path"].parent.name.rpartition("_")[2]
    return (
        f"{machine['device']}, {under}{most}, driver {machine.get('driver') or 'unknown'}, CUDA {machine['cuda']}, "
        f"torch {machine['torch']}, {date}; `{machine.get('command', 'command unknown')}`.\n\n"
    )


def cpu_caption(data: Data) -> str:
    machine = data["machine"]
    facts = [f"{machine.get('threads')} thread"] if machine.get("threads") else []
    date = machine.get("date") or data["path"].parent.name.rpartition("_")[2]
    facts += [f"torch {machine['torch']}", date]
    return (
        f"{machine['cpu']}, {', '.join(facts)}; `{machine.get('command', 'command unknown')}`.\n\n"
    )


def gpu_gemm(data: Data) -> str:
    return (
        gpu_caption(data)
        + result_tables.means(data).markdown()
        + "\n"
        + result_tables.gemm(data).markdown()
    )


def gpu_targets(data: Data) -> str:
    """What the folder of the newest GEMM results has of the files that targets need."""
    files = {"gemm": data}
    for name in ("linear", "quantize"):
        path = data["path"].with_name(f"{name}.json")
        if path.exists():
            files[name] = json.loads(path.read_text())
    return gpu_caption(data) + result_tables.targets(files).markdown()


def gpu_predicted(data: Data) -> str | None:
    """None without the C++ compiler: the table stays."""
    if not planner.available():
        return None
    table = result_tables.predicted(data)
    if table is None:
        return f"There is no prediction for {data['machine']['device']}.\n"
    return gpu_caption(data) + table.markdown()


def captioned(table: Callable[[Data], result_tables.Table]) -> Callable[[Data], str]:
    return lambda data: (
        (gpu_caption if of_gpu(data) else cpu_caption)(data) + table(data).markdown()
    )


TABLES: dict[str, Callable[[], str | None]] = {
    "accuracy": measured("accuracy.json", lambda data: accuracy(data, "schemes")),
    "alpha": measured("accuracy.json", lambda data: accuracy(data, "alpha", "alpha")),
    "rounding": measured(
        "accuracy.json", lambda data: accuracy(data, "rounding", "smooth_rounding")
    ),
    "planted": measured("accuracy.json", lambda data: accuracy(data, "planted")),
    "search": measured("search.json", search),
    "sentence": measured("sentence.json", sentence),
    "peers": measured("peers.json", peers),
    "cpu_linear": measured("linear_cpu.json", cpu_linear),
    "cpu_block": measured("block_cpu.json", captioned(result_tables.anything)),
    "cpu_model": measured("model_cpu.json", captioned(result_tables.anything)),
    "gemm_h100": lambda: gemm_prediction("H100"),
    "gemm_a100": lambda: gemm_prediction("A100"),
    "gemm_l40s": lambda: gemm_prediction("L40S"),
    "gemm_yardstick": gemm_yardstick,
    "gpu_targets": measured("gemm.json", gpu_targets, gpu=True),
    "gpu_gemm": measured("gemm.json", gpu_gemm, gpu=True),
    "gpu_predicted": measured("gemm.json", gpu_predicted, gpu=True),
    "gpu_quantize": measured("quantize.json", captioned(result_tables.quantize), gpu=True),
    "gpu_linear": measured("linear.json", captioned(result_tables.linear), gpu=True),
    "gpu_block": measured("block.json", captioned(result_tables.anything), gpu=True),
    "gpu_model": measured("model.json", captioned(result_tables.anything), gpu=True),
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
