"""What smoothing does to each family of `families.py`, linear by linear.

`python -m tests.support.family_table --write` rewrites docs/reference/families.md (`family_matrix.py`) and the table of
all linears; tests/smoothing/test_families.py compares both with what happens.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from smoothquant_kernels import SmoothQuantConfig, smooth_lm
from tests.support.families import FAMILIES

TABLE = Path(__file__).resolve().parents[1] / "smoothing" / "data" / "families.md"


@dataclass(frozen=True)
class Outcome:
    """A float model, the same model smoothed, and the account that `smooth_lm` gave."""

    model: nn.Module
    smoothed: nn.Module
    info: dict[str, Any]


@functools.cache
def smoothed(family: str) -> Outcome:
    """Every group, by powers of two: the outputs can be compared bit for bit. Not to be changed: it is made once."""
    data = [FAMILIES[family].inputs(seed) for seed in (3, 4)]
    model = FAMILIES[family].make()
    config = SmoothQuantConfig(smooth_rounding="power_of_two", only_where_better=False)
    result = smooth_lm(copy.deepcopy(model), data, config=config, progress=False)
    return Outcome(model, result, result.smoothquant_info)


def role(name: str) -> str:
    """A module's name without the numbers of layers."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


@dataclass(frozen=True)
class Row:
    """One thing that happens to some linears: ``folded``, ``runtime``, ``none`` or ``float``, and into what or why."""

    linears: tuple[str, ...]
    how: str
    why: str


def _outcomes(info: dict[str, Any], short: Callable[[str], str]) -> list[Row]:
    layers = {layer["name"]: layer for layer in info["layers"]}
    rows = []
    for name, layer in layers.items():
        # what was folded together is told together
        together = layer["group"] if layer["smoothing"] == "folded" else [name]
        why = " ".join(short(word) for word in layer["reason"].split(" "))
        rows.append(Row(tuple(dict.fromkeys(map(short, together))), layer["smoothing"], why))
    rows += [Row((short(e["name"]),), e["smoothing"], e["reason"]) for e in info.get("experts", ())]
    rows += [Row((short(s["name"]),), "float", s["reason"]) for s in info["skipped"]]
    return list(dict.fromkeys(rows))


def rows(family: str) -> list[Row]:
    """What happens to a family's linears, layers taken together, under names as short as is not ambiguous."""
    outcome = smoothed(family)
    names = {n for n, _ in outcome.model.named_modules() if n}
    info = outcome.info
    every = (*info["layers"], *info.get("experts", ()), *info["skipped"])
    listed = [entry["name"] for entry in every]
    for length in range(1, 9):

        def short(word: str, length: int = length) -> str:
            bare = word.strip("(),")
            return (
                word.replace(bare, ".".join(role(bare).split(".")[-length:]))
                if bare in names
                else word
            )

        result = _outcomes(info, short)
        told: dict[str, dict[str, set[Row]]] = {}
        for entry in listed:
            mine = {row for row in result if short(entry) in row.linears}
            own = {
                row
                for row in _outcomes(_only(info, role(entry)), short)
                if short(entry) in row.linears
            }
            told.setdefault(short(entry), {})[role(entry)] = own or mine
        if all(len({frozenset(r) for r in by_role.values()}) == 1 for by_role in told.values()):
            break
    return result


def _only(info: dict[str, Any], wanted: str) -> dict[str, Any]:
    return {
        key: [entry for entry in info.get(key, ()) if role(entry["name"]) == wanted]
        for key in ("layers", "experts", "skipped")
    }


_TITLES = {
    "folded": "folded into",
    "runtime": "divided at run time, because",
    "none": "quantized, not smoothed",
    "float": "left in float",
}


def _cell(found: list[Row], how: str) -> str:
    """`q k v: reason`, one reason a line."""
    merged: dict[tuple[str, ...], dict[str, None]] = {}
    for row in found:
        if row.how == how:
            # what is folded together stays together
            key = (row.why, *row.linears) if how == "folded" else (row.why,)
            merged.setdefault(key, {}).update(dict.fromkeys(row.linears))
    lines = []
    for (why, *_), linears in merged.items():
        named = ", ".join(f"`{n}`" for n in linears)
        folded = how == "folded"
        lines.append(f"{named} -> `{why.removeprefix('into ')}`" if folded else f"{named}: {why}")
    return "<br>".join(lines)


def table() -> str:
    """Each linear of each family by name, with its producer or reason: more than the page says."""
    lines = ["| family | " + " | ".join(_TITLES.values()) + " |"]
    lines.append("|---" * (len(_TITLES) + 1) + "|")
    for family in FAMILIES:
        found = rows(family)
        model = type(smoothed(family).model).__name__
        cells = [_cell(found, how) for how in _TITLES]
        lines.append(f"| {family} (`{model}`) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from tests.support import family_matrix

    if sys.argv[1:] == ["--write"]:
        family_matrix.write()
    else:
        print(family_matrix.page())
