"""The table of what `benchmarks.w4a8` measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.lib import w4_peers
from benchmarks.pages.result_tables import markdown

Row = Mapping[str, Any]
HEADER = ["model", "perplexity", "change", "KL", "MB of the linears", "decode step"]


def formats(data: Row) -> str:
    """All rows; a peer that failed has the sentence of its error."""
    facts, rows = data["facts"], data["rows"]
    done = [row for row in rows if "failed" not in row]
    versions: dict[str, str] = dict(facts.get("libraries", {}))
    for row in done:
        versions |= row.get("versions", {})
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    caption = (
        f"{facts['model']}, {done[0]['tokens']} tokens, the same for every row; calibrated on "
        f"{facts['calibration_tokens']} tokens of other topics; {facts['cpu']}; {said}; ± is one standard error; "
        "`python -m benchmarks.w4a8`.\n\n"
    )
    table = markdown(HEADER, [_cells(row) for row in done])
    failed = [
        f"* {row['model']} does not run: `{row['failed']}`\n" for row in rows if "failed" in row
    ]
    return caption + table + ("\n" + "".join(failed) if failed else "")


def _cells(row: Row) -> list[str]:
    packed = row.get("tool") in (None, w4_peers.PACKED)  # no tool: a row of this package
    nbytes = row.get("linear_bytes") if packed else row.get("saved_bytes")
    ratio = row.get("decode_ratio")
    return [
        row["model"],
        f"{row['perplexity']:.3f}",
        f"{row['change_percent']:+.2f} ± {row['change_stderr']:.2f} %",
        f"{row['mean_kl']:.4f} ± {row['kl_stderr']:.4f}",
        "" if nbytes is None else f"{nbytes / 1e6:.1f}",
        "" if ratio is None else f"{ratio:.2f}",
    ]
