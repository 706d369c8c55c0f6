"""Tables of what `benchmarks.kv_cache` measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.pages.result_tables import markdown

Row = Mapping[str, Any]
NOT_MEASURED = "Not measured yet.\n"
_MIB = 2**20


def caption(facts: Row, rows: Sequence[Row], what: str) -> str:
    tokens = f"{rows[0]['tokens']} tokens " if "mean_kl" in rows[0] else ""
    if (step := rows[0].get("step")) is not None:
        what += ", one token at a time" if step == 1 else f", {step} tokens at a time"
    return (
        f"{facts['model']}, {tokens}{what}; calibrated on {facts['calibration_tokens']} tokens of other topics; torch "
        f"{facts['torch']}, CPU; ± is one standard error; `python -m benchmarks.kv_cache`.\n\n"
    )


def part(name: str, what: str, table: Callable[[Sequence[Row]], str]) -> Callable[[Row], str]:
    """A table of one part of a results file; one line if the file has none."""

    def write(data: Row) -> str:
        rows = data.get(name)
        return caption(data["facts"], rows, what) + table(rows) if rows else NOT_MEASURED

    return write


def change(row: Row) -> str:
    return f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %"


def kl(row: Row) -> str:
    return f"{row['mean_kl']:.5f} ± {row['kl_stderr']:.5f}"


def top1(row: Row) -> str:
    return f"{100 * row['top1_agreement']:.1f} %"


def schemes(rows: Sequence[Row]) -> str:
    """One line for a cache with float and with int8 queries."""
    quantized = {(r["cache"], r["alpha"], r["rotation"]): r for r in rows if r["query"]}
    body = []
    for row in rows:
        if row["query"]:
            continue
        other = quantized.get((row["cache"], row["alpha"], row["rotation"]))
        smoothing = "" if row["alpha"] is None else f"alpha {row['alpha']}"
        cells = [
            row["cache"],
            smoothing,
            str(row["rotation"] or ""),
            change(row),
            kl(row),
            top1(row),
        ]
        body.append(
            [*cells, "" if other is None else change(other), "" if other is None else kl(other)]
        )
    header = ["cache", "keys smoothed", "rotation", "perplexity", "KL", "same top-1"]
    return markdown([*header, "int8 queries: perplexity", "KL"], body, left=3)


def prefill(rows: Sequence[Row]) -> str:
    body = [
        [
            row["cache"],
            "int8" if row["query"] else "float",
            str(row["rotation"] or ""),
            f"int8, {row['steps']} steps" if row["steps"] else "float",
            change(row),
            kl(row),
            top1(row),
        ]
        for row in rows
    ]
    header = ["keys and values", "queries", "rotation", "P", "perplexity", "KL", "same top-1"]
    return markdown(header, body, left=4)


def compared(rows: Sequence[Row]) -> str:
    body = [
        [
            row["cache"],
            change(row),
            kl(row),
            top1(row),
            f"{100 * row['cache_bytes'] / row['float16_cache_bytes']:.1f} %",
        ]
        for row in rows
    ]
    return markdown(["cache", "perplexity", "KL", "same top-1", "bytes of float16's"], body)


def greedy(rows: Sequence[Row]) -> str:
    body = [
        [
            row["cache"],
            f"{100 * row['all_agree']:.1f} %",
            f"{100 * row['tokens_agree']:.1f} %",
            f"{row['agree_until']:.1f} of {row['new_tokens']}",
        ]
        for row in rows
    ]
    header = [
        "cache",
        "prompts that agree in all tokens",
        "tokens that agree",
        "tokens until they differ",
    ]
    return markdown(header, body)


def memory(rows: Sequence[Row]) -> str:
    body = [
        [
            row["cache"],
            f"{row['bytes'] / _MIB:.1f} MiB",
            f"{100 * row['share']:.2f} %",
            f"{row['bytes'] / row['tokens']:,.0f}",
        ]
        for row in rows
    ]
    return markdown(["cache", "memory", "of float16's", "bytes a token"], body)


_TEXT = "of Python's documentation topics"
TABLES: dict[str, Callable[[Row], str]] = {
    "kv_schemes": part(
        "schemes", f"{_TEXT} in whole windows, every query reads the cache", schemes
    ),
    "kv_prefill": part("prefill", f"{_TEXT} in whole windows", prefill),
    "kv_decode": part("decode", _TEXT, compared),
    "kv_greedy": part("greedy", "64 prompts of 48 tokens, greedy", greedy),
    "kv_memory": part("memory", "one sequence of 4,096 tokens", memory),
}
