"""`smoothquant-kernels evaluate`: perplexity, and the distance from the original."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from smoothquant_kernels.cli.console import show_progress
from smoothquant_kernels.cli.loading import (
    load_any,
    load_tokenizer,
)
from smoothquant_kernels.evaluation import perplexity
from smoothquant_kernels.evaluation.text import load_text
from smoothquant_kernels.storage.document import Document, note


def work(
    source: str,
    *,
    reference: str | None,
    text: str,
    window: int,
    max_tokens: int,
    last_word: bool,
    dtype: str,
    device: str,
    optimize: bool,
) -> Document:
    """Measures a model or checkpoint; `max_tokens=0` uses the whole text."""
    texts = load_text(text)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "causal": "evaluate"}
    model, quantized = load_any(source, optimize=optimize, **options)
    original = None if reference is None else load_any(reference, **options)[0]
    tokenizer = load_tokenizer(source, reference)
    note(f"evaluating on {text}")
    result = perplexity.evaluate(
        model,
        texts,
        tokenizer,
        reference=original,
        window=window,
        max_tokens=max_tokens or None,
        last_word=last_word,
        progress=show_progress(),
    )
    return {
        "model": source,
        "quantized": quantized,
        "optimized": optimize,
        "reference": reference,
        "text": text,
        "window": window,
        "result": result.to_dict(),
    }


def render(document: Document) -> Table:
    result = document["result"]
    table = Table(title=f"{document['model']} on {document['text']}", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    table.add_row("tokens scored", f"{result['tokens']}", "")
    table.add_row("perplexity", f"{result['perplexity']:.4f}", "")
    table.add_row("nats per token", f"{result['nll']:.4f}", f"{result['nll_stderr']:.4f}")
    if document["reference"] is not None:
        table.add_row(
            "more nats than the reference",
            f"{result['delta_nll']:+.4f}",
            f"{result['delta_nll_stderr']:.4f}",
        )
        table.add_row(
            "KL divergence from it", f"{result['mean_kl']:.5f}", f"{result['kl_stderr']:.5f}"
        )
        table.add_row("same most probable token", f"{result['top1_agreement']:.2%}", "")
    if result["last_word_accuracy"] is not None:
        table.add_row("last words right", f"{result['last_word_accuracy']:.2%}", "")
    table.add_row("seconds", f"{result['seconds']:.1f}", "")
    return table
