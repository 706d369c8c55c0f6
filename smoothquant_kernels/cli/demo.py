"""`smoothquant-kernels demo`: a real model on this machine, naive W8A8 against SmoothQuant."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from smoothquant_kernels.checkpoint.load import load_quantized
from smoothquant_kernels.checkpoint.save import save_quantized
from smoothquant_kernels.cli.console import quiet_stderr
from smoothquant_kernels.cli.generate import complete
from smoothquant_kernels.cli.inputs import text_windows
from smoothquant_kernels.cli.loading import linear_bytes
from smoothquant_kernels.cli.tables.layers import summarize_layers
from smoothquant_kernels.config import SmoothQuantConfig
from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer
from smoothquant_kernels.evaluation.perplexity import Reference, evaluate
from smoothquant_kernels.evaluation.text import load_text, token_windows
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.record import ModelRecord, skipped_layers
from smoothquant_kernels.modeling.run import Batch, evaluating, run
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import pending_smooth
from smoothquant_kernels.report.maxima import (
    LayerMaxima,
    has_matplotlib,
    peak_to_median,
    plot_maxima,
    spread_maxima,
)
from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from smoothquant_kernels.smoothing.calibrate import calibrate_model
from smoothquant_kernels.smoothing.convert import quantize_model
from smoothquant_kernels.smoothing.smooth import smooth_lm
from smoothquant_kernels.smoothing.statistics import ActivationStatistics
from smoothquant_kernels.storage.document import Document, json_text, note, readable_size
from smoothquant_kernels.storage.folder import check_writable, occupant, replace_folder

PROMPT = "What is gravity?"
RESULT, PLOT, CHECKPOINT = "demo.json", "activations.png", "checkpoint"
_WINDOW = 512
_SAVED_SCHEME = "per_token"  # the most accurate one
_PLOTTED_SCHEME = "static"  # the one that outliers hurt most


@dataclass(frozen=True)
class Size:
    """The number of tokens for each part of a run."""

    calibration_tokens: int
    evaluation_tokens: int
    new_tokens: int


# Two slow cores reach about 300 tokens a second in float32, and each row of the table reads all tokens.
FULL, QUICK = Size(4096, 3072, 40), Size(512, 512, 16)


# --- the run --------------------------------------------------------------------------------------


def work(output: Path, *, quick: bool, calibration: str, text: str) -> Document:
    """Measures, saves and plots; returns all numbers.

    Raises:
        SmoothQuantError: the model's package is not installed, a text is missing, or the folder cannot be written.
    """
    begin = time.perf_counter()
    source, size = builtin_demo_model(), QUICK if quick else FULL
    _check_folder(output)
    leave_busy_cores()
    calibration_text, evaluation_text = load_text(calibration), load_text(text)
    note(f"loading {source.name}")
    with quiet_stderr():
        tokenizer, model = load_tokenizer(source), load_model(source)
    config = SmoothQuantConfig(calibration_tokens=size.calibration_tokens)
    windows = text_windows(
        calibration_text, tokenizer, window=_WINDOW, tokens=size.calibration_tokens
    )
    count = sum(ids.shape[1] for ids in windows)
    note(f"calibrating once, for all schemes, on {count} tokens of {calibration}")
    statistics = calibrate_model(model, windows, config, progress=False)

    reference = Reference(model)
    note(f"reading {size.evaluation_tokens} tokens of {text} with the original, to compare with")
    for window in token_windows(
        evaluation_text, tokenizer, window=_WINDOW, max_tokens=size.evaluation_tokens
    ):
        reference.log_probs(window)
    rows: list[Document] = []

    def measure(variant: str, scheme: str | None, candidate: nn.Module) -> None:
        note(f"evaluating {variant}{f' {scheme}' if scheme else ''}")
        result = evaluate(
            candidate,
            evaluation_text,
            tokenizer,
            reference=reference,
            window=_WINDOW,
            max_tokens=size.evaluation_tokens,
        )
        linears = linear_bytes(candidate, [s["name"] for s in _left_out(model)])
        found = result.to_dict()
        # The reference has stored the original's answers, so the original's row would look faster than it is.
        del found["seconds"]
        rows.append({"variant": variant, "scheme": scheme, "linear_bytes": linears, **found})

    measure("float32", None, model)
    for scheme in ACTIVATION_SCHEMES:
        measure("naive W8A8", scheme, _naive(model, statistics, scheme))
    plots: list[LayerMaxima] = []
    with replace_folder(output.resolve(), overwrite=True) as folder:
        folder.chmod(0o755)  # readable by everybody, whatever the umask
        saved: Document = {}
        for scheme in ACTIVATION_SCHEMES:
            chosen = config.replace(activation_scheme=scheme)
            smoothed = smooth_lm(copy.deepcopy(model), statistics, config=chosen)
            if scheme == _PLOTTED_SCHEME:
                plots = _maxima(model, smoothed, statistics, chosen)
            candidate = quantize_model(smoothed, config=chosen)
            measure("SmoothQuant W8A8", scheme, candidate)
            if scheme == _SAVED_SCHEME:
                saved = _save_and_reload(candidate, tokenizer, folder, windows[0], size)
        note(f"asking the float32 model: {PROMPT}")
        original = complete(model, tokenizer, PROMPT, max_new_tokens=size.new_tokens, chat=True)
        plotted = has_matplotlib()
        if plotted:
            title = f"{source.stem}: largest activation per channel on {statistics.tokens:,} tokens"
            plot_maxima(plots, folder / PLOT, title=title)
        else:
            note("no figure, because matplotlib is not installed: pip install matplotlib")
        document = {
            "model": str(source),
            "quick": quick,
            "calibration": {"source": calibration, "tokens": statistics.tokens},
            "evaluation": {"source": text, "tokens": rows[0]["tokens"]},
            "rows": [_with_change(row) for row in rows],
            "activations": [
                {
                    "layer": layer.name,
                    "peak_to_median_before": peak_to_median(layer.before),
                    "peak_to_median_after": peak_to_median(layer.after),
                }
                for layer in plots
            ],
            "checkpoint": saved["checkpoint"],
            "generation": {"prompt": PROMPT, "float32": original, "int8": saved["generation"]},
            "files": {
                "folder": str(output),
                "checkpoint": str(output / CHECKPOINT),
                "plot": str(output / PLOT) if plotted else None,
                "result": str(output / RESULT),
            },
            "seconds": time.perf_counter() - begin,
        }
        (folder / RESULT).write_text(json_text(document), encoding="utf-8")
    return document


def _left_out(model: nn.Module) -> list[dict[str, str]]:
    return [layer.to_dict() for layer in skipped_layers(ModelView(model).skipped)]


def leave_busy_cores() -> None:
    """Uses no more threads than there are free cores.

    Threads spin while they wait for a thread whose core is busy with another program. On two cores, one of them busy,
    two threads took six times as long as one.
    """
    if not hasattr(os, "getloadavg"):  # Windows
        return
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    free = max(1, cores - round(os.getloadavg()[0]))
    if free < threads:
        note(f"other programs keep the cores busy: using {free} of {threads} threads")
        torch.set_num_threads(free)


def _with_change(row: Document) -> Document:
    """Adds the change of perplexity, with the standard error of the paired differences."""
    ratio = math.exp(row["delta_nll"])
    return {
        **row,
        "perplexity_change_percent": 100 * (ratio - 1),
        "perplexity_change_stderr": 100 * ratio * row["delta_nll_stderr"],
    }


def _naive(model: nn.Module, statistics: ActivationStatistics, scheme: str) -> nn.Module:
    """A copy quantized without smoothing, from the same calibrated ranges."""
    candidate = copy.deepcopy(model)
    config = SmoothQuantConfig(activation_scheme=scheme, smooth=False)
    return quantize_model(smooth_lm(candidate, statistics, config=config))


def _save_and_reload(model: Any, tokenizer: Any, folder: Path, ids: Tensor, size: Size) -> Document:
    """Saves the checkpoint, loads it again, compares the logits and generates text with the loaded model."""
    note("saving the checkpoint and loading it again")
    save_quantized(model, folder / CHECKPOINT, tokenizer=tokenizer)
    with quiet_stderr():
        again: Any = load_quantized(folder / CHECKPOINT)
        tokenizer = load_tokenizer(folder / CHECKPOINT)
    batch = {"input_ids": ids[:, :128]}
    with evaluating(model), evaluating(again):
        same = torch.equal(run(model, batch).logits, run(again, batch).logits)
    note(f"asking the int8 model: {PROMPT}")
    record = ModelRecord.of(model)
    files = [file for file in (folder / CHECKPOINT).rglob("*") if file.is_file()]
    return {
        "checkpoint": {
            "scheme": _SAVED_SCHEME,
            "bytes": sum(file.stat().st_size for file in files),
            "reloaded_logits_bit_identical": same,
            "verification": record.verification and record.verification.to_dict(),
            "smoothing": summarize_layers(record.layers, record.skipped)["smoothing"],
        },
        "generation": complete(again, tokenizer, PROMPT, max_new_tokens=size.new_tokens, chat=True),
    }


# --- the figure -----------------------------------------------------------------------------------


def _maxima(
    before: nn.Module,
    after: nn.Module,
    statistics: ActivationStatistics,
    config: SmoothQuantConfig,
) -> list[LayerMaxima]:
    """The two down_proj layers with the greatest outliers, and the worst layer of two other kinds."""
    absmax = statistics.absmax
    worst = sorted(absmax, key=lambda name: -peak_to_median(absmax[name]))

    def first(kind: str, count: int = 1) -> list[str]:
        return [name for name in worst if name.endswith(kind)][:count]

    names = [*first("down_proj", 2), *first("q_proj"), *first("o_proj")]
    factors = _factors(before, after, statistics.sample, names)
    layers = []
    for name in names:
        layer = ModelRecord.of(after).described[name]
        note = f"alpha = {layer.alpha}, int8 scales {config.scheme_of(layer.x_peak)}"
        smoothed, rotated = absmax[name] / factors[name], None
        if layer.rotation:
            note += f", rotated by {layer.rotation}"
            kept = statistics.rows[name].both().float() / factors[name]
            rotated = spread_maxima(kept, layer.rotation)
        layers.append(LayerMaxima(name, absmax[name], smoothed, note, rotated))
    return layers


def _factors(
    before: nn.Module, after: nn.Module, batch: Batch, names: Sequence[str]
) -> dict[str, Tensor]:
    """The divisor of each channel of the layers' inputs, wherever smoothing applies the division.

    The inputs of both models give it, at the token where the channel is largest.
    """
    x, y = _inputs(before, batch, names), _inputs(after, batch, names)
    factors = {}
    for name in names:
        token = x[name].abs().argmax(0, keepdim=True)
        old, new = x[name].gather(0, token)[0], y[name].gather(0, token)[0]
        factors[name] = torch.where((old == 0) | (new == 0), torch.ones_like(old), old / new)
    return factors


def _inputs(model: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """The inputs [tokens, K] of layers, after any division at run time."""
    found: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        smooth = pending_smooth(model.get_submodule(name))
        found[name] = x if smooth is None else x / smooth

    with Hooks(model) as hooks, evaluating(model):
        for name in names:
            hooks.on_input(name, partial(record, name))
        run(model, batch, logits=False)
    return found


# --- the folder -----------------------------------------------------------------------------------


def _check_folder(output: Path) -> None:
    """Raises SmoothQuantError unless `output` is writable, and is new or the result of an earlier demo."""
    if output.exists() and occupant(output, (RESULT,)) != "own":
        raise SmoothQuantError(
            f"{output} exists and is not the result of a demo; give another name with --output."
        )
    check_writable(output)


# --- for people -----------------------------------------------------------------------------------


def render(document: Document) -> Group:
    table = Table(title=_title(document), title_justify="left")
    table.add_column("model")
    for name in (
        "scheme", "perplexity", "change %", "mean KL", "same top-1", "linears MB",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "scheme" else "right")
    previous = None
    for row in document["rows"]:
        if previous not in (None, row["variant"]):
            table.add_section()
        previous = row["variant"]
        change = f"{row['perplexity_change_percent']:+.2f} ± {row['perplexity_change_stderr']:.2f}"
        original = row["scheme"] is None
        table.add_row(
            row["variant"],
            row["scheme"] or "",
            f"{row['perplexity']:.3f}",
            "" if original else change,
            "" if original else f"{row['mean_kl']:.4f}",
            "" if original else f"{row['top1_agreement']:.1%}",
            f"{row['linear_bytes'] / 1e6:.1f}",
        )
    checkpoint, said, files = document["checkpoint"], document["generation"], document["files"]
    smoothing = checkpoint["smoothing"]
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column()
    facts.add_row(
        "smoothed",
        f"{smoothing['folded']} layers by folding, {smoothing['runtime']} at run time, "
        f"{smoothing['none']} not",
    )
    same = "bit-identical" if checkpoint["reloaded_logits_bit_identical"] else "DIFFERENT"
    facts.add_row(
        "checkpoint",
        f"{files['checkpoint']} ({checkpoint['scheme']}, {readable_size(checkpoint['bytes'])}); "
        f"reloaded, its logits are {same}",
    )
    facts.add_row("figure", files["plot"] or "none: matplotlib is not installed")
    facts.add_row("numbers", files["result"])
    facts.add_row("asked", said["prompt"])
    facts.add_row("float32 says", _one_line(said["float32"]["text"]))
    facts.add_row("int8 says", _one_line(said["int8"]["text"]))
    facts.add_row("seconds", f"{document['seconds']:.0f} in all")
    return Group(table, facts, Text(_advice(document), style="dim"))


def _title(document: Document) -> str:
    tokens = document["evaluation"]["tokens"]
    return (
        f"{Path(document['model']).stem}, {tokens} tokens of {document['evaluation']['source']}; "
        f"calibrated on {document['calibration']['tokens']} of {document['calibration']['source']}"
    )


def _advice(document: Document) -> str:
    text = "± is one standard error of the paired difference per token."
    if document["quick"]:
        text += " Few tokens were read: leave out --quick for numbers to compare."
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())
