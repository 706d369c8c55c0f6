"""`smoothquant-kernels inspect`: what a checkpoint holds.

It reads the manifest and the headers of the safetensors files, but no weight, unless it shows what can be fused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from smoothquant_kernels.checkpoint.compressed_tensors.scheme import QUANT_METHOD
from smoothquant_kernels.checkpoint.foreign_folder import is_compressed_tensors
from smoothquant_kernels.checkpoint.kv_calibration import KV_FILE
from smoothquant_kernels.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    check_files,
    read_config,
    read_manifest,
)
from smoothquant_kernels.cli import fused
from smoothquant_kernels.cli.console import general_name
from smoothquant_kernels.cli.loading import verify_checkpoint
from smoothquant_kernels.config import PLAIN_ALPHA, ROTATED_ALPHA
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.architecture import is_causal
from smoothquant_kernels.kv_cache.size import cache_costs
from smoothquant_kernels.modeling.record import (
    HOWS,
    How,
    LayerRecord,
    ModelRecord,
    Reason,
    SkippedLayer,
)
from smoothquant_kernels.storage.document import Document, readable_size

if TYPE_CHECKING:
    from smoothquant_kernels.search.costs import LayerCost

# Bytes per element, by the type names in safetensors headers.
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

_PERCENT = re.compile(r"\d+\.\d+(?=%)")


def work(directory: Path, *, verify: bool = False, fusion: bool = False) -> Document:
    """Everything known about a checkpoint without its weights.

    Args:
        directory: the folder.
        verify: read all files first.
        fusion: load the model too, and add what `optimize_for_inference` does to it.

    Raises:
        MismatchError: with `verify`, a file differs from what was saved.
        SmoothQuantError: it is not a checkpoint, a file is missing or damaged, or with `fusion`, the model cannot be
            loaded or run.
    """
    if verify:
        if is_compressed_tensors(directory):
            raise SmoothQuantError(
                f"--verify compares digests, and the format of {directory}, {QUANT_METHOD}, has none; leave it out."
            )
        verify_checkpoint(directory)
    foreign = is_compressed_tensors(directory)
    if foreign:
        manifest = _manifest_of(directory)
    else:
        manifest = read_manifest(directory)
        check_files(directory, manifest, verify=False)
    sizes = _tensor_bytes(directory, manifest)
    record = ModelRecord.from_dict(manifest.info)
    described = record.described
    records = [
        dataclasses.replace(
            described.get(name, LayerRecord(name)),
            activation_scheme=module["activation_scheme"],
            in_features=module["in_features"],
            out_features=module["out_features"],
        )
        for name, module in manifest.modules.items()
    ]
    layers = [
        {
            "name": layer.name,
            **manifest.modules[layer.name],
            "smoothing": layer.smoothing,
            "reason": layer.reason,
            "bytes": sum(size for key, size in sizes.items() if key.startswith(f"{layer.name}.")),
        }
        for layer in records
    ]
    in_layers = sum(layer["bytes"] for layer in layers)
    return {
        "directory": str(directory),
        "files_verified": verify,
        **({"format": QUANT_METHOD} if foreign else {}),
        "format_version": None if foreign else _format_version(directory),
        "package_version": manifest.package_version,
        "model": manifest.model["name"],
        "config": record.config,
        "calibration_tokens": record.calibration_tokens,
        "verification": record.verification and record.verification.to_dict(),
        "kv_cache": _cache_costs(directory),
        **summarize_layers(records, record.skipped),
        "layers": layers,
        "bytes": {
            "quantized_layers": in_layers,
            "float_tensors": sum(sizes.values()) - in_layers,
            "files": {name: entry["size"] for name, entry in manifest.files.items()},
        },
        **({"fusion": fused.work(directory, verify=not verify)} if fusion else {}),
    }


def _cache_costs(directory: Path) -> Document | None:
    """What a cache of keys and values costs, and whether it was calibrated; None if config.json does not say it."""
    try:
        config = read_config(directory)[1]
    except SmoothQuantError:
        return None
    costs = cache_costs(config) if is_causal(SimpleNamespace(**config)) else None
    return costs and {"calibrated": (directory / KV_FILE).is_file(), **costs}


def _format_version(directory: Path) -> Any:
    return json.loads((directory / MANIFEST).read_text("utf-8"))["format_version"]


def _manifest_of(directory: Path) -> Manifest:
    """A checkpoint of compressed-tensors as a manifest."""
    from smoothquant_kernels.checkpoint.compressed_tensors.load import plan_of

    plan, model = plan_of(directory)
    return plan.manifest(type(model).__name__)


def _tensor_bytes(directory: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes of each tensor, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    sizes = {}
    for file in sorted({entry["file"] for entry in manifest.tensors.values()}):
        try:
            with safe_open(directory / file, framework="pt") as opened:
                for name in opened.keys():
                    header = opened.get_slice(name)
                    shape = header.get_shape()
                    if shape != manifest.tensors[name]["shape"]:
                        raise SmoothQuantError(
                            f"{directory / file} does not belong to this checkpoint: {name} has "
                            f"shape {shape} there."
                        )
                    sizes[name] = math.prod(shape) * _BYTES[header.get_dtype()]
        except (SafetensorError, KeyError, OSError) as error:
            raise SmoothQuantError(
                f"{directory / file} is damaged or of another checkpoint ({error}): copy it again."
            ) from error
    return sizes


def summarize_layers(
    layers: Sequence[LayerRecord],
    skipped: Sequence[SkippedLayer],
    costs: Mapping[str, LayerCost] | None = None,
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
        "skipped": [
            {"layers": name, "count": count, "reason": reason}
            for (name, reason), count in left_out.items()
        ],
    }


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
            + (f"; a KL divergence of about {total:.4f} in all" if costs else "")
        ),
    )


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


def describe_verification(document: Document) -> str:
    """What is known about the float model after smoothing."""
    check, smoothing = document["verification"], document["smoothing"]
    if check is None or not smoothing["folded"] + smoothing["runtime"]:
        return "nothing was smoothed"
    if check.get("bit_exact"):
        return "the smoothed float model's output equals the original's bit for bit"
    return f"smoothing moved the float model's output by {check['relative_change']:.1e}, relative"


def _is_imported(document: Document) -> bool:
    """Whether another tool quantized the model, which does not say whether and how it smoothed."""
    return any(Reason.of(group["reason"]) is Reason.IMPORTED for group in document["groups"])


def _has_w4a8(document: Document) -> bool:
    return any(group.get("format") == "w4a8" for group in document["groups"])


def describe_config(document: Document) -> str:
    """The settings that decide accuracy, in words."""
    config, smoothing = document["config"], document["smoothing"]
    scheme = config.get("activation_scheme")
    text = f"activations {scheme}, weights per {config.get('weight_granularity')}"
    if config.get("weight_rounding") == "gptq":
        text += " by GPTQ"
    elif config.get("weight_rounding") == "auto" and _has_w4a8(document):
        text += ", those of 4 bits by GPTQ"
    if config.get("quantize_head"):
        text += ", output head too"
    sizes = sorted({g["rotation"] for g in document["groups"] if g["rotation"]})
    if sizes:
        text += f", rotated by {' and '.join(map(str, sizes))}"
    if _is_imported(document):
        return text
    if not smoothing["folded"] + smoothing["runtime"]:
        return f"{text}, not smoothed"
    if own := config.get("alphas"):
        low, high = min(own.values()), max(own.values())
        return f"{text}, alpha {low} to {high} in {len(own)} layers or patterns"
    if (alpha := config.get("alpha")) is not None:
        return f"{text}, alpha {alpha}"
    # Layers with massive activations may have another scheme, and with it another alpha.
    defaults = {
        (ROTATED_ALPHA if g["rotation"] else PLAIN_ALPHA).get(g["activation_scheme"])
        for g in document["groups"]
        if g["smoothing"] != "none"
    }
    return f"{text}, alpha {', '.join(map(str, sorted(d for d in defaults if d is not None)))}"


def render(document: Document) -> Group:
    size = document["bytes"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", document["model"])
    own = document["format_version"] is not None
    written = f"version {document['format_version']}, written by smoothquant-kernels"
    facts.add_row("format", f"{written if own else QUANT_METHOD} {document['package_version']}")
    if document["config"]:
        facts.add_row("settings", describe_config(document))
    if document["calibration_tokens"]:
        facts.add_row("calibrated on", f"{document['calibration_tokens']} tokens")
    if not _is_imported(document):
        facts.add_row("verified", describe_verification(document))
    facts.add_row(
        "size",
        f"{readable_size(size['quantized_layers'])} in the int8 layers, "
        f"{readable_size(size['float_tensors'])} in float tensors",
    )
    if (cache := document["kv_cache"]) is not None:
        for tokens, by_kind in cache["bytes"].items():
            kinds = ", ".join(f"{kind} {readable_size(n)}" for kind, n in by_kind.items())
            facts.add_row(f"cache of {int(tokens):,} tokens", kinds)
        if cache["calibrated"]:
            facts.add_row("", "calibrated for int8-static")
    if document["files_verified"]:
        facts.add_row("digests", "every file is what was saved")
    files = ", ".join(f"{name} {readable_size(bytes_)}" for name, bytes_ in size["files"].items())
    facts.add_row("files", files)
    shown = [fused.render(document["fusion"])] if "fusion" in document else []
    return Group(render_layers(document), facts, *shown)
