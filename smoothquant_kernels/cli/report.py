"""`smoothquant-kernels report`: what smoothing does to each layer, as an HTML page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from smoothquant_kernels.checkpoint.manifest import is_checkpoint, read_manifest
from smoothquant_kernels.cli.console import show_progress
from smoothquant_kernels.cli.inputs import calibration_inputs, text_windows
from smoothquant_kernels.cli.loading import (
    changed_settings,
    choose_device,
    config_of,
    load_any,
    read_config,
)
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.architecture import Kind, is_causal
from smoothquant_kernels.evaluation.text import load_text
from smoothquant_kernels.modeling.record import ModelRecord
from smoothquant_kernels.report.report import check_report_folder, make_report
from smoothquant_kernels.storage.document import Document
from smoothquant_kernels.storage.folder import check_writable

_HELD_IMAGES = 8


def work(
    source: str,
    output: Path,
    *,
    reference: str | None,
    config_file: Path | None,
    calibration: str,
    text: str | None,
    tokens: int,
    dtype: str,
    device: str,
    force: bool,
    **options: Any,
) -> Document:
    """Writes the page; `options` are the options that change settings."""
    begin = time.perf_counter()
    check_report_folder(output, overwrite=force)
    check_writable(output)
    settings = _report_config(source, reference, config_file, changed_settings(**options))
    where, held_source = choose_device(device), text or "topics:evaluation"
    original = source if reference is None else reference
    if is_checkpoint(Path(original)):
        raise SmoothQuantError(f"{original} is quantized; a report needs the original model.")
    fallback = None if reference is None else source
    inputs = calibration_inputs(original, calibration, settings, fallback)
    if text is not None and not is_causal(config_of(original)):
        raise SmoothQuantError(
            f"--text measures perplexity, which {original} has none of: leave it out, or give a causal language model."
        )
    if inputs.facts["images"]:  # all images are used for calibration, so some serve twice
        held_source, held_texts, held = calibration, [], inputs.batches[-_HELD_IMAGES:]
    else:
        held_texts = load_text(held_source)
        window = max(ids.shape[1] for ids in inputs.batches)
        kind: Kind = "causal" if is_causal(config_of(original)) else "text"
        held = text_windows(held_texts, inputs.processor, window=window, tokens=tokens, kind=kind)
    model, _ = load_any(original, dtype=dtype, device=device)
    if reference is not None and type(model).__name__ != (
        made := read_manifest(Path(source)).model["name"]
    ):
        raise SmoothQuantError(
            f"{source} is a {made} and {reference} a {type(model).__name__}: give --reference the model that it was "
            "made from."
        )
    document = make_report(
        model.to(where),
        inputs.batches,
        output,
        settings,
        held=held,
        tokenizer=inputs.processor,
        tokens=tokens,
        text=None if text is None else held_texts,
        name=_display_name(original),
        sources=(calibration, held_source),
        overwrite=force,
        progress=show_progress(),
    )
    return {**document, "output": str(output), "seconds": time.perf_counter() - begin}


def _report_config(
    source: str, reference: str | None, config: Path | None, changes: Document
) -> SmoothQuantConfig:
    if not is_checkpoint(Path(source)):
        if reference is not None:
            raise SmoothQuantError(
                f"--reference goes with a checkpoint, and {source} is none; leave it out."
            )
        return read_config(config, changes)
    if reference is None:
        raise SmoothQuantError(
            f"{source} is quantized; name the original model with --reference as well."
        )
    if config is not None or changes.keys() - {"calibration_tokens"}:
        raise SmoothQuantError(
            f"the settings are those of {source}; to try others, report on {reference} itself."
        )
    made_with = ModelRecord.from_dict(read_manifest(Path(source)).info).config
    if not made_with:
        raise SmoothQuantError(f"{source} does not say how it was made; report on the original.")
    return SmoothQuantConfig.from_dict(made_with).replace(**changes)


def _display_name(source: str) -> str:
    """A hub name as it is; for a file or folder, its own name without its location on this machine."""
    path = Path(source)
    return (path.stem if path.is_file() else path.resolve().name) if path.exists() else source


def render(document: Document) -> Group:
    summary = document["summary"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "layers",
        f"{summary['quantized']} in int8: {summary['folded']} smoothed by folding, "
        f"{summary['runtime']} at run time, {summary['none']} not; {summary['skipped']} in float",
    )
    for key, what in (("sqnr_naive", "without smoothing"), ("sqnr", "as configured")):
        if numbers := summary[key]:
            facts.add_row(
                what, f"{numbers['median']:.1f} dB median, {numbers['worst']:.1f} dB worst layer"
            )
    if (result := document["evaluation"]) is not None:
        facts.add_row(
            "perplexity",
            f"{result['smoothed']['perplexity']:.3f}, float {result['float']['perplexity']:.3f}; "
            f"KL divergence {result['smoothed']['mean_kl']:.4f}",
        )
    for entry in document["advice"]:
        if entry["settings"]:
            then = f"{entry['sqnr']:.1f} -> {entry['sqnr_then']:.1f} dB"
            facts.add_row("advice", f"{entry['layer']}: {entry['text']} {then}")
    facts.add_row("seconds", f"{document['seconds']:.1f}")
    return Group(facts, Text(f"see {Path(document['output']) / 'report.html'}", style="bold"))
