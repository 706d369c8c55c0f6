"""JSON documents: the results of commands and reports, in a form that every parser reads."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]


def note(text: str) -> None:
    """Prints a progress note to stderr."""
    print(text, file=sys.stderr, flush=True)


def json_text(document: Mapping[str, Any]) -> str:
    """Returns JSON that every parser reads. NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def readable_size(size: float) -> str:
    """Returns a number of bytes as text with a unit, for example "1.5 GB"."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_:
            return f"{size / bytes_:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"
