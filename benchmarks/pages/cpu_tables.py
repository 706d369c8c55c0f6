"""Tables of what was measured on a CPU, from the results files of `linear` and `quantize`.

Files of earlier versions have fewer columns: a column that no row has is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.lib.runner import Row, baselines_of
from benchmarks.pages.result_tables import Column, Table, failed, good, number, shape, times

#: What a restriction of instructions leaves of the processor, by the level's name in the file.
LEVELS = {"avx512_vnni": "kept to AVX512-VNNI, AMX refused", "avx2": "kept to AVX2"}
#: Stands in its own column.
BEST = "best_peer"


def threads(machine: Mapping[str, Any]) -> str:
    return f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"


def caption(data: Mapping[str, Any], command: str) -> str:
    """The processor, what of it was used, the versions of all that was timed, who is missing and why."""
    machine = data["machine"]
    facts = [machine["cpu"], machine["capability"], f"int8 mode `{machine['int8_mode']}`"]
    facts += [LEVELS[machine["isa"]]] if machine.get("isa") in LEVELS else []
    set_by_hand = machine.get("environment") or {}
    facts += [f"`{name}={value}`" for name, value in set_by_hand.items()]
    clocks = [row["ghz"] for row in data["rows"] if row.get("ghz")]
    if clocks:
        facts.append(f"{min(clocks):.1f} to {max(clocks):.1f} GHz in the run")
    facts += [threads(machine), f"torch {machine['torch']}"]
    text = f"{', '.join(facts)}; medians of interleaved calls; `{command}`."
    names = {
        name: version for name, version in machine.get("peers", {}).items() if name not in OURS
    }
    if names:
        text += f" {'; '.join(f'{name}: {version}' for name, version in names.items())}."
    if missing := machine.get("missing"):
        text += f" Not timed: {'; '.join(f'{name} ({why})' for name, why in missing.items())}."
    return text + "\n\n"


#: Of these the caption's first sentence says the version.
OURS = ("int8", "before", "float32", "bfloat16")


def _present(rows: Sequence[Row], columns: Mapping[str, tuple[str, Column]]) -> dict[str, Column]:
    return {
        title: cell for title, (key, cell) in columns.items() if any(row.get(key) for row in rows)
    }


def _share(row: Row) -> str:
    share = row.get("peak_share")
    return number(share and 100 * share, 0, " %")


def _ratio(row: Row, name: str) -> str:
    return times(row.get(f"vs_{name}"))


def linear(data: Mapping[str, Any]) -> Table:
    """A line for each shape: time, rate, and how many times as fast as each other."""
    rows = [row for row in data["rows"] if not failed(row)]
    numbers = {
        "M": ("M", lambda row: str(row["M"])),
        "W8A8Linear us": ("int8_us", lambda row: number(row["int8_us"], 0)),
        "GOPS": ("gops", lambda row: number(row["gops"], 0)),
        "of the peak": ("peak_share", _share),
    }
    columns: dict[str, Column] = {"layer": lambda row: row["layer"], "N x K": shape}
    columns |= _present(rows, numbers)
    for name in baselines_of(rows):
        if name != BEST:
            columns[f"vs {name.replace('_', ' ')}"] = partial(_ratio, name=name)
    if any(row.get(f"vs_{BEST}") for row in rows):
        columns["vs the best peer"] = partial(_ratio, name=BEST)
    return Table(list(columns), [[cell(row) for cell in columns.values()] for row in rows], left=2)


def means(data: Mapping[str, Any]) -> Table:
    """Geometric means by size of the layer and class of M."""
    found = data["geomeans"]
    names = [name for name in baselines_of(data["rows"]) if name != BEST]
    names += [BEST] if any(BEST in group for group in found.values()) else []
    header = ["layers", "cases", *(f"vs {name.replace('_', ' ')}" for name in names)]
    body = [
        [group, f"{values['cases']:.0f}", *(times(values.get(name)) for name in names)]
        for group, values in found.items()
    ]
    return Table(header, body)


def quantize(data: Mapping[str, Any]) -> Table:
    """Producers that rotate, per token and without the division by s: against a copy and without the rotation."""
    rows = [row for row in good(data["rows"]) if row.get("rotation") and not row["smooth"]]
    rows = [row for row in rows if row["scheme"] == "per_token"]
    order = list(dict.fromkeys(row["producer"] for row in rows))
    rows.sort(key=lambda row: (order.index(row["producer"]), row["K"], row["rotation"], row["M"]))
    columns: dict[str, Column] = {
        "producer": lambda row: f"{row['producer']} {row['dtype']}",
        "K": lambda row: str(row["K"]),
        "rotation": lambda row: str(row["rotation"]),
        "M": lambda row: str(row["M"]),
        "us": lambda row: number(row["us"]),
        "GB/s": lambda row: number(row["gb_per_s"]),
        "vs copy": lambda row: times(row.get("vs_copy")),
        "vs eager": lambda row: times(row.get("vs_eager")),
        "vs without rotation": lambda row: times(row.get("vs_unrotated")),
    }
    return Table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def attention(data: Mapping[str, Any]) -> Table:
    """One token's attention to an int8 cache, against PyTorch's on float keys and values."""
    columns: dict[str, Column] = {
        "heads of": lambda row: row["model"],
        "tokens": lambda row: f"{row['context']:,}",
        "us": lambda row: number(row["us"], 0),
        "vs float32": lambda row: times(row.get("vs_float32")),
        "vs bfloat16": lambda row: times(row.get("vs_bfloat16")),
        "vs folded float32": lambda row: times(row.get("vs_folded")),
        "vs without compiled kernels": lambda row: times(row.get("vs_plain")),
    }
    rows = sorted(good(data["rows"]), key=lambda row: row["context"])
    return Table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])
