"""A prediction of model.py held against what a run on a GPU measured (gemm.py's results)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.shapes import M_CLASSES, m_class
from benchmarks.prediction.model import Model, print_table
from benchmarks.prediction.model_costs import MACHINES

#: What compare_table says of each class of M.
HEADER = ["M", "cases", "measured / predicted", "least", "most", "within low .. high", "worst case"]


def gpu_of(machine: Mapping[str, Any]) -> str:
    """A key of predict.GPUS by the name that the driver gives, "NVIDIA H100 80GB HBM3"."""
    name = str(machine.get("device", ""))
    found = [gpu for gpu in MACHINES if re.search(rf"\b{gpu}\b", name)]
    if len(found) != 1:
        raise ValueError(
            f"the machine of the results is '{name}', none of {', '.join(MACHINES)}; name one with --gpu."
        )
    return found[0]


def split_name(tile: str) -> tuple[str, int]:
    """ "128x128x64 /4" -> ("128x128x64", 4), as gemm_cases.tile_name writes it."""
    found = re.fullmatch(r"(.*?)(?: /(\d+))?", tile)
    assert found is not None
    return found[1], int(found[2] or 1)


def compare(
    results: Mapping[str, Any], gpu: str | None = None, model: Model | None = None
) -> list[dict[str, Any]]:
    """Each measured row with its prediction for the same tile, at the clock that was measured.

    Rows without a time, and those of real data (fewer bits change: other clocks), are left out.
    A tile that the table no longer has is predicted by what the dispatch takes now.
    """
    model = model or Model(gpu or gpu_of(results["machine"]))
    found = []
    for row in results["rows"]:
        if not row.get("us") or row.get("data", "random") != "random":
            continue
        m, n, k = row["M"], row["N"], row["K"]
        ghz = row["sm_mhz"] / 1000 if row.get("sm_mhz") else None
        tile, splits = split_name(row.get("tile") or "-")
        known = tile in model.by_name
        one = model.predict(m, n, k, tile, splits, ghz) if known else model.chosen(m, n, k, ghz)
        found.append(
            {
                "layer": f"{row.get('model', '')} {row.get('layer', '')}".strip(),
                "M": m,
                "N": n,
                "K": k,
                "tile": row.get("tile"),
                "same_tile": known,
                "sm_mhz": row.get("sm_mhz"),
                "us": row["us"],
                "predicted_us": one.us,
                "low_us": one.low,
                "high_us": one.high,
                "ratio": row["us"] / one.us,
                "within": one.low <= row["us"] <= one.high,
                "binds": one.likely.binds,
            }
        )
    return found


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def by_class(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each class of M that has rows, and of all."""
    groups = {name: [row for row in rows if m_class(row["M"]) == name] for _, name in M_CLASSES}
    groups["all"] = list(rows)
    return [
        {
            "class": name,
            "cases": len(group),
            "geomean": _geomean([row["ratio"] for row in group]),
            "least": min(row["ratio"] for row in group),
            "most": max(row["ratio"] for row in group),
            "within": sum(row["within"] for row in group),
            # Too slow or too fast by the largest factor.
            "worst": max(group, key=lambda row: max(row["ratio"], 1 / row["ratio"])),
        }
        for name, group in groups.items()
        if group
    ]


def comparison_table(
    path: Path, gpu: str | None = None, model: Model | None = None
) -> tuple[list[str], list[list[str]]]:
    """For the documentation: measured over predicted, by class of M."""
    rows = compare(json.loads(path.read_text()), gpu, model)
    body = []
    for one in by_class(rows):
        worst = one["worst"]
        body.append(
            [
                one["class"],
                str(one["cases"]),
                f"{one['geomean']:.2f}",
                f"{one['least']:.2f}",
                f"{one['most']:.2f}",
                f"{one['within']} of {one['cases']}",
                f"{worst['layer']} M {worst['M']}, {worst['tile']}: "
                f"{worst['us']:.1f} us, not {worst['predicted_us']:.1f}",
            ]
        )
    return list(HEADER), body


def show(path: Path, gpu: str | None, measured: Mapping[str, Any] | None = None) -> None:
    """Every row, then the classes. measured: of probe.py."""
    results = json.loads(path.read_text())
    model = Model(gpu or gpu_of(results["machine"]), measured=measured)
    header = ["layer", "M", "N", "K", "tile", "MHz", "us", "predicted", "ratio", "", "bound by"]
    lines = [header]
    for row in compare(results, model=model):
        lines.append(
            [
                row["layer"],
                *(str(row[side]) for side in "MNK"),
                str(row["tile"]) + ("" if row["same_tile"] else " (gone: the dispatch's)"),
                f"{row['sm_mhz']:.0f}" if row["sm_mhz"] else "?",
                f"{row['us']:.1f}",
                f"{row['predicted_us']:.1f} ({row['low_us']:.1f} .. {row['high_us']:.1f})",
                f"{row['ratio']:.2f}",
                "in" if row["within"] else "out",
                row["binds"],
            ]
        )
    print_table(lines)
    print()
    table, body = comparison_table(path, model=model)
    print_table([table, *body])
