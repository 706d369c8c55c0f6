"""`smoothquant-kernels evaluate`: perplexity, and the distance from the original."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from smoothquant_kernels.cli.console import show_progress
from smoothquant_kernels.cli.loading import (
    check_kv_cache,
    kv_cache_maker,
    load_any,
    load_tokenizer,
)
from smoothquant_kernels.evaluation import perplexity
from smoothquant_kernels.evaluation.kv_cache import evaluate_cache
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
    kv_cache: str | None,
) -> Document:
    """Measures a model or checkpoint; `max_tokens=0` uses the whole text."""
    check_kv_cache(kv_cache, source)
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
    cached = None
    if kv_cache is not None:  # after the model itself, whose attention this changes
        make = kv_cache_maker(model, kv_cache)
        note(f"evaluating the {kv_cache} cache, token by token")
        cached = evaluate_cache(
            model, texts, tokenizer, make, window=window, max_tokens=max_tokens or None,
            progress=show_progress(),
        ).to_dict()  # fmt: skip
    return {
        "model": source,
        "quantized": quantized,
        "optimized": optimize,
        "reference": reference,
        "text": text,
        "window": window,
        "result": result.to_dict(),
        "kv_cache": None if cached is None else {"name": kv_cache, **cached},
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
    seconds = result["seconds"]
    if (cache := document["kv_cache"]) is not None:
        table.add_section()
        table.add_row(f"perplexity, {cache['name']} cache", f"{cache['perplexity']:.4f}", "")
        table.add_row(
            "more nats than with the float cache",
            f"{cache['delta_nll']:+.5f}",
            f"{cache['delta_nll_stderr']:.5f}",
        )
        table.add_row(
            "KL divergence from it", f"{cache['mean_kl']:.6f}", f"{cache['kl_stderr']:.6f}"
        )
        table.add_row("same most probable token", f"{cache['top1_agreement']:.2%}", "")
        table.add_row(
            f"bytes of {cache['cache_tokens']} tokens",
            f"{cache['cache_bytes']:,}, in float16 {cache['float16_cache_bytes']:,}",
            "",
        )
        seconds += cache["seconds"]
    table.add_row("seconds", f"{seconds:.1f}", "")
    return table
