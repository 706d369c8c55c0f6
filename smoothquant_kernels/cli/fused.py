"""The section of `inspect --fusion`: what `optimize_for_inference` does to each linear of a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from smoothquant_kernels.checkpoint.load import load_quantized
from smoothquant_kernels.cli.console import general_name, quiet_stderr
from smoothquant_kernels.fusion.record import FusedLayer, fusion_info
from smoothquant_kernels.storage.document import Document


def work(directory: Path, *, verify: bool) -> Document:
    """Loads a checkpoint, optimizes it, and returns what was done to each layer; `verify` as in `load_quantized`."""
    with quiet_stderr():
        model = load_quantized(directory, verify=verify, optimize=True)
    layers = fusion_info(model)
    return {"groups": _groups(layers), "layers": [layer.to_dict() for layer in layers]}


def _groups(layers: Sequence[FusedLayer]) -> list[Document]:
    """Layers that differ only in their number are one group."""
    counted = Counter(_general(layer) for layer in layers)
    groups = []
    for layer, count in counted.items():
        values = layer.to_dict()
        groups.append({"layers": values.pop("name"), "count": count, **values})
    return groups


def _general(layer: FusedLayer) -> FusedLayer:
    return replace(
        layer,
        name=general_name(layer.name),
        producer=general_name(layer.producer),
        merged=tuple(general_name(name) for name in layer.merged),
        reason=general_name(layer.reason),
    )


def render(fusion: Document) -> Group:
    """A table, and one line of totals."""
    table = Table(title="What --optimize fuses", title_justify="left")
    table.add_column("layers", overflow="fold")
    table.add_column("no.", justify="right")
    table.add_column("computes before it quantizes, or why nothing", overflow="fold")
    table.add_column("one GEMM with", overflow="fold")
    table.add_column("adds the residual")
    for group in fusion["groups"]:
        name = group["layers"]
        table.add_row(
            name,
            f"{group['count']}",
            _computed(group),
            ", ".join(_beside(name, other) for other in group["merged"] if other != name),
            "yes" if group["residual"] else "",
        )
    layers = fusion["layers"]
    merged = {tuple(layer["merged"]) for layer in layers if layer["merged"]}
    return Group(
        table,
        Text(
            f"{sum(bool(layer['producer']) for layer in layers)} of {len(layers)} layers compute their norm or "
            f"activation, {sum(map(len, merged))} share {len(merged)} GEMMs, "
            f"{sum(layer['residual'] for layer in layers)} add the residual"
        ),
    )


def _computed(group: Document) -> str:
    """What the layers compute before they quantize, or why nothing."""
    if not group["producer"]:
        return str(group["reason"])
    where = ", in the GEMM before, which writes int8" if group["int8"] else ""
    return f"{group['kind']} ({group['producer']}){where}"


def _beside(name: str, other: str) -> str:
    """The name `other` without the parents that it shares with `name`."""
    own, parts = name.split("."), other.split(".")
    while len(parts) > 1 and own and own[0] == parts[0]:
        own, parts = own[1:], parts[1:]
    return ".".join(parts)
