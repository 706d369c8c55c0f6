"""SHA-256 digests of files, tensors and JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict


class FileEntry(TypedDict):
    """A file of the folder."""

    size: int
    sha256: str


def digest(body: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def file_entry(path: Path) -> FileEntry:
    """Size and digest of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}
