"""The table of a model's quantized layers, which several commands show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from smoothquant_kernels.cli.console import general_name
from smoothquant_kernels.modeling.record import (
    HOWS,
    ExpertsRecord,
    How,
    LayerRecord,
    SkippedLayer,
)
from smoothquant_kernels.storage.document import Document

if TYPE_CHECKING:
    from smoothquant_kernels.search.costs import LayerCost

_PERCENT = re.compile(r"\d+\.\d+(?=%)")


def summarize_layers(
    layers: Sequence[LayerRecord],
    skipped: Sequence[SkippedLayer],
    costs: Mapping[str, LayerCost] | None = None,
    experts: Sequence[ExpertsRecord] = (),
) -> Document:
    """Counts of layers; those that differ only in their number form one group, whose costs are added up."""
    groups: dict[
        tuple[str, How, str, str | None, str | None, int, int, int], list[LayerRecord]
    ] = {}
    for layer in layers:
        key = (
            general_name(layer.name),
            layer.smoothing,
            _PERCENT.sub("", general_name(layer.reason)),
            layer.activation_scheme,
            layer.format,
            layer.rotation,
            layer.out_features,
            layer.in_features,
        )
        groups.setdefault(key, []).append(layer)
    costs = costs or {}
    left_out = Counter((general_name(layer.name), layer.reason) for layer in skipped)
    return {
        "quantized": len(layers),
        "smoothing": {how: sum(layer.smoothing == how for layer in layers) for how in HOWS},
        "groups": [
            {
                "layers": name,
                "count": len(members),
                "out_features": n,
                "in_features": k,
                "activation_scheme": scheme,
                **({} if form is None else {"format": form}),
                **_columns(members),
                "rotation": rotation,
                "smoothing": smoothing,
                "reason": _with_ranges([general_name(layer.reason) for layer in members]),
                **_group_cost([costs[m.name] for m in members if m.name in costs]),
            }
            for (name, smoothing, _, scheme, form, rotation, n, k), members in groups.items()
        ],
        **({"experts": _summarize_experts(experts)} if experts else {}),
        "skipped": [
            {"layers": name, "count": count, "reason": reason}
            for (name, reason), count in left_out.items()
        ],
    }


def _summarize_experts(experts: Sequence[ExpertsRecord]) -> list[Document]:
    """Groups of modules of experts that differ only in their number, and in how many of them calibration missed."""
    groups: dict[tuple[object, ...], list[ExpertsRecord]] = {}
    for e in experts:
        key = (general_name(e.name), e.num_experts, e.hidden, e.inner, e.schemes, e.rotations)
        groups.setdefault((*key, e.smoothing, e.reason), []).append(e)
    return [
        {
            "layers": general_name(first.name),
            "count": len(others) + 1,
            "num_experts": first.num_experts,
            "hidden": first.hidden,
            "inner": first.inner,
            "activation_schemes": list(first.schemes),
            "rotations": list(first.rotations),
            "smoothing": first.smoothing,
            "reason": first.reason,
            "unseen": first.unseen + sum(other.unseen for other in others),
        }
        for first, *others in groups.values()
    ]


def _unseen(group: Document) -> str:
    """How many experts the calibration did not reach, for a table."""
    if not group["unseen"]:
        return ""
    return f" ({group['unseen']} of {group['count'] * group['num_experts']} experts unseen in calibration)"


def _columns(layers: Sequence[LayerRecord]) -> Document:
    """The outlier columns of a group's layers, added up; empty if they have none."""
    found = [layer.outlier_columns for layer in layers if layer.outlier_columns is not None]
    return {"outlier_columns": sum(found)} if found else {}


def _group_cost(costs: Sequence[LayerCost]) -> Document:
    """The costs of a group's layers, added up; empty if they were not measured."""
    if not costs:
        return {}
    divided = [c.divided for c in costs if c.divided is not None]
    return {"kl": sum(c.kl for c in costs), "kl_divided": sum(divided) if divided else None}


def _with_ranges(reasons: Sequence[str]) -> str:
    """One reason for several that differ only in percentages, with the smallest and the largest of each."""
    rows = [_PERCENT.findall(reason) for reason in reasons]
    ranges = iter([sorted(column, key=float) for column in zip(*rows, strict=True)])

    def put(_: re.Match[str]) -> str:
        column = next(ranges)
        return f"{column[0]}" if column[0] == column[-1] else f"{column[0]} to {column[-1]}"

    return _PERCENT.sub(put, reasons[0])


def render_layers(document: Document) -> Group:
    """The table of `summarize_layers`, and one line of totals."""
    table = Table()
    table.add_column("layers", overflow="fold")
    table.add_column("no.", justify="right")
    table.add_column("out x in", justify="right")
    table.add_column("scales")
    table.add_column("rotation", justify="right")
    table.add_column("smoothing")
    table.add_column("how, why", overflow="fold")
    costs = any("kl" in group for group in document["groups"])
    if costs:
        table.add_column("KL", justify="right")
    for group in document["groups"]:
        table.add_row(
            group["layers"],
            f"{group['count']}",
            f"{group['out_features']} x {group['in_features']}",
            _scales(group),
            str(group["rotation"] or "none"),
            group["smoothing"],
            group["reason"] + _compared(group),
            *([f"{group['kl']:.4f}" if "kl" in group else ""] if costs else []),
        )
    for group in document.get("experts", ()):
        table.add_row(
            group["layers"],
            f"{group['count']}",
            f"{group['num_experts']} of {group['hidden']} x {group['inner']}",
            " then ".join(dict.fromkeys(group["activation_schemes"])),
            " then ".join(str(r or "none") for r in dict.fromkeys(group["rotations"])),
            group["smoothing"],
            group["reason"] + _unseen(group),
        )
    for skipped in document["skipped"]:
        table.add_row(
            skipped["layers"], f"{skipped['count']}", "", "", "", "left out", skipped["reason"]
        )
    smoothing = document["smoothing"]
    skips = sum(skipped["count"] for skipped in document["skipped"])
    total = sum(group.get("kl", 0.0) for group in document["groups"])
    return Group(
        table,
        Text(
            f"{document['quantized']} layers in int8: {smoothing['folded']} smoothed by folding, "
            f"{smoothing['runtime']} at run time, {smoothing['none']} not; {skips} left in float"
            + _count_experts(document)
            + (f"; a KL divergence of about {total:.4f} in all" if costs else "")
        ),
    )


def _count_experts(document: Document) -> str:
    """How many experts are in int8 beside the layers, after a semicolon; or empty."""
    count = sum(g["count"] * g["num_experts"] for g in document.get("experts", ()))
    return f"; {count} experts in int8" if count else ""


def _scales(group: Document) -> str:
    """The scheme, and the format if it is another one than W8A8."""
    words = [group["format"]] if "format" in group else []
    if group.get("outlier_columns"):
        words.append(f"({group['outlier_columns']})")
    return " ".join([*words, group["activation_scheme"]])


def _compared(group: Document) -> str:
    """What the layers would cost if they divided at run time."""
    divided = group.get("kl_divided")
    return "" if divided is None else f" (KL if they divided: {divided:.4f})"
