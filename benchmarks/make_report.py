"""A report of a run: what was measured, as text, as one page of tables and pictures, and as CSV.

    python benchmarks/make_report.py RESULTS_FOLDER [--out DIR]

Reads whatever the folder has of info, first_light, probe, gemm, quantize, linear, block, model and tune .json (a CPU's
results are named linear_cpu.json and so on). Writes report.txt, report.md, a CSV for each file with rows, and at most
four pictures (matplotlib). A file that cannot be read is named, and the exit status is 1; where there is none it is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import first_light
import plots
import result_tables
from prediction import probe
from report import write_csv, write_text
from result_tables import Table, failures, time_of

NAMES = ("gemm", "quantize", "linear", "block", "model")
TITLES = {
    "gemm": "GEMM", "quantize": "Quantisers", "linear": "Layers with their quantisation", "block": "Blocks",
    "model": "Models",
}  # fmt: skip
Data = dict[str, Any]


@dataclass
class Section:
    """A title, then sentences, then tables."""

    title: str
    lines: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def read(folder: Path) -> tuple[dict[str, Data], dict[str, str]]:
    """The files that are there, by name, and why others could not be read."""
    files, broken = {}, {}
    for name in (*NAMES, "tune"):
        for path in (folder / f"{name}.json", folder / f"{name}_cpu.json"):
            if not path.exists() or name in files:
                continue
            try:
                data = json.loads(path.read_text())
                if not isinstance(data["machine"], dict) or not isinstance(
                    data["results" if name == "tune" else "rows"], list
                ):
                    raise TypeError
                files[name] = data
            except (ValueError, KeyError, TypeError):
                broken[path.name] = "is no results file of a benchmark: it is left out"
    return files, broken


def facts(folder: Path, files: Mapping[str, Data]) -> Data:
    """The machine: of info.json, else of the first file."""
    info = folder / "info.json"
    if info.exists():
        try:
            found: Data = json.loads(info.read_text())
            return found
        except ValueError:
            pass
    return dict(next((data["machine"] for data in files.values()), {}))


def head_of(machine: Mapping[str, Any]) -> str:
    """Under every picture's title, so that a picture alone says where it comes from."""
    if machine.get("cuda"):
        where = f"{machine['device']}, driver {machine.get('driver') or 'unknown'}, CUDA {machine['cuda']}"
    else:
        threads = f", {machine['threads']} thread" if machine.get("threads") else ""
        where = f"CPU, no GPU: {machine.get('cpu', 'unknown')}{threads}"
    return f"{where}, torch {machine.get('torch', 'unknown')}"


def clocks_line(rows: list[Data]) -> list[str]:
    clocks = [row["sm_mhz"] for row in rows if row.get("sm_mhz")]
    return [f"SM clock under load: {min(clocks):,.0f} to {max(clocks):,.0f} MHz."] if clocks else []


def sections(files: Mapping[str, Data]) -> list[Section]:
    """What the files say, the most telling first."""
    found = []
    on_gpu = "gemm" in files and bool(files["gemm"]["machine"].get("cuda"))
    if on_gpu:
        lines = ["Met is what every case meets; measured is the geometric mean."]
        found.append(Section("Against the targets", lines, [result_tables.targets(files)]))
    for name in NAMES:
        if name in files:
            found.append(section(name, files[name]))
    if "tune" in files:
        usable = [r for r in files["tune"]["results"] if r.get("times")]
        lines = [f"{len(usable)} problems; `tune.py --report` prints the rules."]
        found.append(
            Section("Tuning", lines, [result_tables.tuned(files["tune"])] if usable else [])
        )
    return found


def kernels(folder: Path) -> list[Section]:
    """What was found before anything was timed: which kernels work, and what the GPU is like."""
    found = []
    rows = first_light.read(folder / "first_light.json").get("rows", [])
    if rows:
        bad = [row for row in rows if row["status"] != "ok"]
        lines = [f"{len(rows) - len(bad)} of {len(rows)} kernels passed every check."]
        if left := first_light.broken_tiles(rows):
            lines.append(f"Left out by what was measured after that: {', '.join(left)}.")
        header = ["kernel", "status", *first_light.PHASES, "why"]
        cells = [
            [row["name"], row["status"], *(row["phases"].get(n, "") for n in first_light.PHASES), row["why"]]
            for row in bad
        ]  # fmt: skip
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
    bad = failures(rows)
    made = Section(TITLES[name])
    made.lines.append(f"{len(rows)} rows; `{data['machine'].get('command', 'command unknown')}`.")
    made.lines += clocks_line(rows)
    if bad:
        made.lines.append(f"{len(bad)} wrong or failed:")
        made.lines += [f"* {line}" for line in bad]
    if name in ("gemm", "linear"):
        if plots.by_shape(rows):
            made.lines += steps_lines(rows)
            made.tables.append(result_tables.means(data))
        table = result_tables.gemm if name == "gemm" else result_tables.linear
        if any(map(time_of, rows)):
            made.tables.append(table(data, every=True))
    elif name == "quantize":
        made.tables.append(result_tables.quantize(data, every=True))
    else:
        made.tables.append(result_tables.anything(data))
    return made


def steps_lines(rows: list[Data]) -> list[str]:
    steps = plots.steps(rows)
    if not steps:
        return ["No larger M is faster than the one before it."]
    return [f"{len(steps)} steps where a larger M is faster:", *(f"* {step}" for step in steps)]


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
    if not files and not kernels(folder):
        wanted = ", ".join(f"{name}.json" for name in (*NAMES, "tune"))
        print(
            "\n".join(
                [*notes, f"{folder} has no results: one of {wanted} (or _cpu.json) is needed."]
            )
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    head = head_of(facts(folder, files))
    pictures: list[plots.Picture] = []
    try:
        pictures = plots.draw(files, head, out)
    except ImportError:
        notes.append("No pictures: matplotlib is not installed.")
    parts = kernels(folder) + sections(files)
    for name in NAMES:
        if name in files:
            write_csv(out / f"{name}.csv", files[name]["rows"])
    write_text(out / "report.md", page(head, notes, parts, pictures))
    write_text(out / "report.txt", text(head, notes, parts))
    print((out / "report.txt").read_text().split("\n\n")[0])
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
