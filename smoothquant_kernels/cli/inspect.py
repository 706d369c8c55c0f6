"""`smoothquant-kernels inspect`: what a checkpoint holds.

It reads the manifest and the headers of the safetensors files, but no weight, unless it shows what can be fused.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Group
from rich.table import Table

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
from smoothquant_kernels.cli.loading import verify_checkpoint
from smoothquant_kernels.cli.tables.layers import render_layers, summarize_layers
from smoothquant_kernels.config import PLAIN_ALPHA, ROTATED_ALPHA
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.architecture import is_causal
from smoothquant_kernels.kv_cache.size import cache_costs
from smoothquant_kernels.modeling.record import (
    LayerRecord,
    ModelRecord,
    Reason,
)
from smoothquant_kernels.storage.document import Document, readable_size

# Bytes per element, by the type names in safetensors headers.
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


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
    experts = {e.name: e for e in record.experts if e.name in manifest.modules}
    records = [
        dataclasses.replace(
            described.get(name, LayerRecord(name)),
            activation_scheme=module["activation_scheme"],
            in_features=module["in_features"],
            out_features=module["out_features"],
        )
        for name, module in manifest.modules.items()
        if name not in experts
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
    inside = tuple(f"{name}." for name in experts)
    of_experts = sum(size for key, size in sizes.items() if inside and key.startswith(inside))
    in_layers = sum(layer["bytes"] for layer in layers) + of_experts
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
        **summarize_layers(records, record.skipped, experts=list(experts.values())),
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
