"""Writes the measured tables into README.md and docs/ from the files in benchmarks/results/.

    python -m benchmarks.pages.tables [--check]

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

from benchmarks.pages import cache_tables, cpu_tables, result_tables, w4_tables
from benchmarks.pages.result_tables import Table, markdown
from benchmarks.prediction import compare, expected, gpus, layers, planner, yardstick
from tools.build.plan import ROOT

RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\w+)[^>]*-->\n).*?(<!-- end table -->)", re.DOTALL)

Data = dict[str, Any]
NOT_MEASURED = "Not measured yet.\n"
ACCURACY = ["perplexity", "change", "mean KL", "same top-1"]


def pages() -> list[Path]:
    """The pages with a table."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if MARKED.search(page.read_text())]


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
    """A table of the newest such file, which `write` gets, its "path" added; one line if there is none."""

    def table() -> str | None:
        path = newest(pattern, gpu)
        return write(json.loads(path.read_text()) | {"path": path}) if path else NOT_MEASURED

    return table


# --- accuracy ---------------------------------------------------------------------------------------------------------


def quality(row: Data, change: bool = True, kl_error: bool = False) -> list[str]:
    """The columns of ACCURACY; a float model has no change."""
    cells = [f"{row['perplexity']:.3f}"]
    if not change:
        return [*cells, "", "", ""]
    error = f" ± {row['kl_stderr']:.4f}" if kl_error else ""
    return [
        *cells,
        f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %",
        f"{row['mean_kl']:.4f}{error}",
        f"{100 * row['top1_agreement']:.1f} %",
    ]


def accuracy_caption(facts: Data, software: str, command: str, other: str | None = None) -> str:
    also = f", and {other}, as many tokens of another kind" if other else ""
    return (
        f"{facts['model']}, {facts['evaluation_tokens']} tokens of Python's documentation topics that calibration "
        f"({facts['calibration_tokens']} tokens of other topics) never saw{also}; {software}; "
        f"± is one standard error of the paired difference; `python -m benchmarks.{command}`.\n\n"
    )


def accuracy(data: Data, part: str, key: str | None = None) -> str:
    """`key`: a setting with a column of its own. Rows may have been evaluated on a second kind of text."""
    if part not in data:
        return NOT_MEASURED
    facts, rows = data["facts"], data[part]
    other = facts.get("other")
    if other is not None and not all(other in row for row in rows):
        other = None
    header = ["model", "scheme", *([key] if key else []), *ACCURACY]
    header += [f"perplexity on {other}", *ACCURACY[1:]] if other else []
    body = []
    for row in rows:
        int8 = "scheme" in row
        cells = [row["model"], row.get("scheme", ""), *([str(row[key])] if key else [])]
        cells += quality(row, int8)
        body.append(cells + (quality(row[other], int8) if other else []))
    caption = accuracy_caption(facts, f"torch {facts['torch']}, CPU", "accuracy", other)
    return caption + markdown(header, body, left=3 if key else 2)


def accuracy_schemes(data: Data) -> str:
    """The schemes and, if it was measured, the int8 output head."""
    return accuracy(data | {"schemes": [*data["schemes"], *data.get("head", [])]}, "schemes")


SHORT = ("naive W8A8", "SmoothQuant W8A8", "smoothed and rotated W8A8")


def accuracy_short(data: Data) -> str:
    """Rows for the README: a scale per token and static scales, naive, smoothed, and rotated as well."""
    rows = [row for row in data["schemes"] if row.get("scheme") in ("per_token", "static")]
    rows = [row for row in rows if row["model"] in SHORT]
    return accuracy(data | {"schemes": rows}, "schemes")


def search(data: Data) -> str:
    header = ["settings", "scheme", *ACCURACY, "cost"]
    rows = []
    for row in data["rows"]:
        cost = f"{row['cost']:.4f}" if "cost" in row else ""
        words = [row["model"], row.get("scheme", "")]
        rows.append([*words, *quality(row, kl_error=True), cost])
    searches = ", ".join(f"{s['name']} {s['cpu_seconds']:.0f} s" for s in data["searches"])
    note = f"\n*cost*: what the search expected, in nats. CPU time of the searches, one thread: {searches}.\n"
    caption = accuracy_caption(data["facts"], f"torch {data['facts']['torch']}, CPU", "search")
    return caption + markdown(header, rows, left=2) + note


def sentence(data: Data) -> str:
    facts = data["facts"]
    caption = (
        f"{facts['model']}, {facts['sentences']} sentences of Python's documentation topics that calibration "
        f"({facts['calibration_tokens']} tokens of other topics) never saw; torch {facts['torch']}, CPU; cosine of the "
        "embeddings by the quantized and by the float32 model; `python -m benchmarks.sentence`.\n\n"
    )
    header = ["model", "scheme", "per token", "mean", "median", "5 %", "1 %", "worst"]
    rows = [
        [row["model"], row["scheme"], f"{row['per_token_layers']} of {row['layers']}"]
        + [f"{row[key]:.5f}" for key in ("mean", "p50", "p5", "p1", "min")]
        for row in data["rows"]
    ]
    return caption + markdown(header, rows, left=2)


def peers(data: Data) -> str:
    gib = 2**30
    versions = {k: v for row in data["rows"] for k, v in row["versions"].items()}
    names = [name for name in ("llmcompressor", "torchao", "torch") if name in versions]
    used = ", ".join(f"{name} {versions[name]}" for name in names)
    header = ["tool", "settings", *ACCURACY, "CPU s", "wall s", "peak GiB", "of it added"]
    rows = []
    for row in data["rows"]:
        cells = [row["tool"], row["label"], *quality(row), f"{row['cpu_s']:.0f}"]
        peak, added = row["rss_peak"] / gib, (row["rss_peak"] - row["rss_before"]) / gib
        rows.append([*cells, f"{row['wall_s']:.0f}", f"{peak:.2f}", f"{added:.2f}"])
    caption = accuracy_caption(data["facts"], f"{used}; CPU, one thread", "peers")
    return caption + markdown(header, rows, left=2)


# --- speed ------------------------------------------------------------------------------------------------------------


def cpu_linear(data: Data) -> str:
    return cpu_tables.caption(data, command(data["machine"])) + cpu_tables.linear(data).markdown()


def cpu_linear_means(data: Data) -> str:
    if not data.get("geomeans"):  # a file of an earlier version
        return NOT_MEASURED
    return cpu_tables.caption(data, command(data["machine"])) + cpu_tables.means(data).markdown()


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


def layer_prediction() -> str | None:
    """Decoder layers: what is assumed, then the times. None without the compiler."""
    if not planner.available():
        return None
    assumed = markdown(
        ["what", "is assumed"], [list(pair) for pair in layers.ASSUMPTIONS.items()], 2
    )
    header, rows = layers.table()
    return f"{assumed}\n{markdown(header, rows, left=header.index('sequences'))}"


def command(machine: Data) -> str:
    """What repeats a run, without its folders. Older results name the scripts that are modules of `benchmarks` now."""
    recorded = re.sub(r" --python \S+", "", machine.get("command", "command unknown"))
    return re.sub(r"\bbenchmarks/bench_(\w+)\.py\b", r"-m benchmarks.\1", recorded)


def caption(data: Data) -> str:
    """The machine, a GPU's clocks, the software, the date and the command."""
    machine = data["machine"]
    date = machine.get("date") or data["path"].parent.name.rpartition("_")[2]
    if of_gpu(data):
        clocks = [row["sm_mhz"] for row in data.get("rows", ()) if row.get("sm_mhz")]
        span = "clocks unknown"
        if clocks:
            span = f"{min(clocks):,.0f} to {max(clocks):,.0f} MHz under load"
        most = f" (at most {machine['max_sm_mhz']:,.0f})" if machine.get("max_sm_mhz") else ""
        driver = f"driver {machine.get('driver') or 'unknown'}"
        facts = [machine["device"], span + most, driver, f"CUDA {machine['cuda']}"]
    else:
        threads = machine.get("threads")
        facts = [machine["cpu"], *([f"{threads} thread"] if threads else [])]
        facts += (
            [cpu_tables.LEVELS[isa]] if (isa := machine.get("isa")) in cpu_tables.LEVELS else []
        )
    facts += [f"torch {machine['torch']}", date]
    return f"{', '.join(facts)}; `{command(machine)}`.\n\n"


def captioned(*tables: Callable[[Data], Table]) -> Callable[[Data], str]:
    return lambda data: caption(data) + "\n".join(table(data).markdown() for table in tables)


def gpu_targets(data: Data) -> str:
    """What the folder of the newest GEMM results has of the files that targets need."""
    files = {"gemm": data}
    for name in ("linear", "quantize", "attention"):
        path = data["path"].with_name(f"{name}.json")
        if path.exists():
            files[name] = json.loads(path.read_text())
    return caption(data) + result_tables.targets(files).markdown()


def gpu_predicted(data: Data) -> str | None:
    """None without the C++ compiler: the table stays."""
    if not planner.available():
        return None
    table = result_tables.predicted(data)
    if table is None:
        return f"There is no prediction for {data['machine']['device']}.\n"
    return caption(data) + table.markdown()


ANYTHING = captioned(result_tables.anything)
TABLES: dict[str, Callable[[], str | None]] = {
    "accuracy": measured("accuracy.json", accuracy_schemes),
    "rotation": measured("accuracy.json", lambda data: accuracy(data, "rotation", "rotation")),
    "accuracy_short": measured("accuracy.json", accuracy_short),
    "alpha": measured("accuracy.json", lambda data: accuracy(data, "alpha", "alpha")),
    "rounding": measured(
        "accuracy.json", lambda data: accuracy(data, "rounding", "smooth_rounding")
    ),
    "planted": measured("accuracy.json", lambda data: accuracy(data, "planted")),
    "search": measured("search.json", search),
    "sentence": measured("sentence.json", sentence),
    "peers": measured("peers.json", peers),
    "w4a8": measured("w4a8.json", w4_tables.formats),
    **{name: measured("kv_cache.json", write) for name, write in cache_tables.TABLES.items()},
    "cpu_linear": measured("linear_cpu.json", cpu_linear),
    "cpu_linear_means": measured("linear_cpu.json", cpu_linear_means),
    "cpu_linear_avx512_vnni": measured("linear_cpu_avx512_vnni.json", cpu_linear),
    "cpu_linear_avx512_vnni_means": measured("linear_cpu_avx512_vnni.json", cpu_linear_means),
    "cpu_linear_avx2_means": measured("linear_cpu_avx2.json", cpu_linear_means),
    "cpu_quantize": measured("quantize_cpu.json", captioned(cpu_tables.quantize)),
    "cpu_attention": measured("attention_cpu.json", captioned(cpu_tables.attention)),
    "cpu_attention_avx2": measured("attention_cpu_avx2.json", captioned(cpu_tables.attention)),
    "cpu_block": measured("block_cpu.json", ANYTHING),
    "cpu_model": measured("model_cpu.json", ANYTHING),
    "cpu_model_avx512_vnni": measured("model_cpu_avx512_vnni.json", ANYTHING),
    "cpu_model_avx2": measured("model_cpu_avx2.json", ANYTHING),
    "gemm_h100": lambda: gemm_prediction("H100"),
    "gemm_a100": lambda: gemm_prediction("A100"),
    "gemm_l40s": lambda: gemm_prediction("L40S"),
    "gemm_yardstick": gemm_yardstick,
    "layers": layer_prediction,
    "gpu_targets": measured("gemm.json", gpu_targets, gpu=True),
    "gpu_gemm": measured("gemm.json", captioned(result_tables.means, result_tables.gemm), gpu=True),
    "gpu_predicted": measured("gemm.json", gpu_predicted, gpu=True),
    "gpu_quantize": measured("quantize.json", captioned(result_tables.quantize), gpu=True),
    "gpu_linear": measured("linear.json", captioned(result_tables.linear), gpu=True),
    "gpu_block": measured("block.json", ANYTHING, gpu=True),
    "gpu_model": measured("model.json", ANYTHING, gpu=True),
    "gpu_attention": measured("attention.json", captioned(result_tables.attention), gpu=True),
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
    for page in pages():
        old = page.read_text()
        new = MARKED.sub(renewed, old)
        if new != old:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new)
    print(("out of date: " if check else "written: ") + (", ".join(stale) or "none"))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
