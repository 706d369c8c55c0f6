"""A report of a run: what was measured, as text, as one page of tables and pictures, and as CSV.

    python -m benchmarks.pages.report RESULTS_FOLDER [--out DIR]

Reads whatever the folder has of info, first_light, probe, gemm, quantize, linear, block, model, attention and tune
.json (a CPU's results are named linear_cpu.json and so on). Writes report.txt, report.md, a CSV for each file with
rows, and at most four pictures (matplotlib). A file that cannot be read is named, and the exit status is 1; without any
it is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib.runner import write_csv, write_text
from benchmarks.on_gpu import first_light
from benchmarks.pages import plots, result_tables
from benchmarks.pages.result_tables import Table, failures, time_of
from benchmarks.prediction import probe
from benchmarks.tuner.choices import timed

TITLES = {
    "gemm": "GEMM",
    "quantize": "Quantizers",
    "linear": "Layers with their quantization",
    "block": "Blocks",
    "model": "Models",
    "attention": "The int8 cache of keys and values",
}
NAMES = (*TITLES, "tune")
Data = dict[str, Any]


@dataclass
class Section:
    """A title, then sentences, then tables."""

    title: str
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def read(folder: Path) -> tuple[dict[str, Data], dict[str, str]]:
    """The files of the folder, by name, and why others could not be read."""
    files, broken = {}, {}
    for name in NAMES:
        for path in (folder / f"{name}.json", folder / f"{name}_cpu.json"):
            if not path.exists() or name in files:
                continue
            try:
                data = json.loads(path.read_text())
                rows = data["results" if name == "tune" else "rows"]
                if not isinstance(data["machine"], dict) or not isinstance(rows, list):
                    raise TypeError
                files[name] = data
            except (ValueError, KeyError, TypeError):
                broken[path.name] = "is no results file of a benchmark: it is left out"
    return files, broken


def head_of(folder: Path, files: Mapping[str, Data]) -> str:
    """The machine, of info.json or of the first file: under every picture's title too."""
    try:
        machine: Data = json.loads((folder / "info.json").read_text())
    except (OSError, ValueError):
        machine = dict(next((data["machine"] for data in files.values()), {}))
    if machine.get("cuda"):
        where = f"{machine['device']}, driver {machine.get('driver') or 'unknown'}, CUDA {machine['cuda']}"
    else:
        threads = f", {machine['threads']} thread" if machine.get("threads") else ""
        where = f"CPU, no GPU: {machine.get('cpu', 'unknown')}{threads}"
    return f"{where}, torch {machine.get('torch', 'unknown')}"


def sections(files: Mapping[str, Data]) -> list[Section]:
    """What the files say, the most telling first."""
    found = []
    if "gemm" in files and files["gemm"]["machine"].get("cuda"):
        lines = ["Met is what every case meets; measured is the geometric mean."]
        found.append(Section("Against the targets", lines, [result_tables.targets(files)]))
    found += [section(name, files[name]) for name in TITLES if name in files]
    if "tune" in files:
        usable = [r for r in files["tune"]["results"] if timed(r)]
        lines = [f"{len(usable)} problems; `python -m benchmarks.tuner --report` prints the rules."]
        tables = [result_tables.tuned(files["tune"])] if usable else []
        found.append(Section("Tuning", lines, tables))
    return found


def kernels(folder: Path) -> list[Section]:
    """What was found before anything was timed: which kernels work, and what the GPU is like."""
    found = []
    rows = first_light.read(folder / "first_light.json").get("rows", [])
    if rows:
        bad = [row for row in rows if row["status"] != "ok"]
        lines = [f"{len(rows) - len(bad)} of {len(rows)} kernels passed every check."]
        if left := first_light.broken_tiles(rows):
            lines.append(f"The stages after that left out: {', '.join(left)}.")
        header = ["kernel", "status", *first_light.PHASES, "why"]
        phases = [[row["phases"].get(name, "") for name in first_light.PHASES] for row in bad]
        cells = [[r["name"], r["status"], *p, r["why"]] for r, p in zip(bad, phases, strict=True)]
        found.append(Section("Every kernel alone", lines, [Table(header, cells, len(header))]))
    try:
        data = json.loads((folder / "probe.json").read_text())
        lines = [f"* {line}" for line in probe.findings_of(data)]
        found.append(Section("What the predictions assume", lines))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return found


def section(name: str, data: Data) -> Section:
    rows = data["rows"]
    made = Section(TITLES[name])
    made.lines.append(f"{len(rows)} rows; `{data['machine'].get('command', 'command unknown')}`.")
    if clocks := [row["sm_mhz"] for row in rows if row.get("sm_mhz")]:
        made.lines.append(f"SM clock under load: {min(clocks):,.0f} to {max(clocks):,.0f} MHz.")
    if bad := failures(rows):
        made.lines += [f"{len(bad)} wrong or failed:", *(f"* {line}" for line in bad)]
    if name in ("gemm", "linear"):
        if plots.by_shape(rows):
            steps = plots.steps(rows)
            said = "No larger M is faster than the one before it."
            if steps:
                said = f"{len(steps)} steps where a larger M is faster:"
            made.lines += [said, *(f"* {step}" for step in steps)]
            made.tables.append(result_tables.means(data))
        table = result_tables.gemm if name == "gemm" else result_tables.linear
        if any(map(time_of, rows)):
            made.tables.append(table(data, every=True))
    elif name == "quantize":
        made.tables.append(result_tables.quantize(data, every=True))
    elif name == "attention":
        made.tables.append(result_tables.attention(data))
    else:
        made.tables.append(result_tables.anything(data))
    return made


def text(head: str, notes: list[str], parts: list[Section]) -> str:
    blocks = [head, *notes]
    for part in parts:
        blocks.append("\n".join([part.title, "=" * len(part.title), *part.lines]))
        blocks += [table.text().rstrip() for table in part.tables if table.rows]
    return "\n\n".join(blocks) + "\n"


def page(head: str, notes: list[str], parts: list[Section], pictures: list[plots.Picture]) -> str:
    blocks = ["# Benchmark report", head, *notes]
    blocks += [f"![{picture.alt}]({picture.file})" for picture in pictures]
    for part in parts:
        listed = [line for line in part.lines if line.startswith("* ")]
        blocks.append(f"## {part.title}")
        blocks += [line for line in part.lines if line not in listed]
        blocks += ["\n".join(listed)] if listed else []
        blocks += [table.markdown().rstrip() for table in part.tables if table.rows]
    return "\n\n".join(blocks) + "\n"


def make(folder: Path, out: Path) -> int:
    files, broken = read(folder)
    notes = [f"{name} {why}." for name, why in broken.items()]
    found = kernels(folder)
    if not files and not found:
        wanted = ", ".join(f"{name}.json" for name in NAMES)
        notes.append(f"{folder} has no results: one of {wanted} (or _cpu.json) is needed.")
        print("\n".join(notes))
        return 2
    out.mkdir(parents=True, exist_ok=True)
    head = head_of(folder, files)
    pictures: list[plots.Picture] = []
    try:
        pictures = plots.draw(files, head, out)
    except ImportError:
        notes.append("No pictures: matplotlib is not installed.")
    parts = found + sections(files)
    for name in TITLES:
        if name in files:
            write_csv(out / f"{name}.csv", files[name]["rows"])
    write_text(out / "report.md", page(head, notes, parts, pictures))
    write_text(out / "report.txt", text(head, notes, parts))
    print(head)
    print(f"written: {', '.join(sorted(file.name for file in out.iterdir()))} in {out}")
    return int(bool(broken))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="build/gpu_run, or a folder of benchmarks/results"
    )
    parser.add_argument("--out", type=Path, help="default: FOLDER/report")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder; name one with results of benchmarks (*.json)")
    return make(args.folder, args.out or args.folder / "report")


if __name__ == "__main__":
    sys.exit(main())
