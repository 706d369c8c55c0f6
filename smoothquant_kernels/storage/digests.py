"""SHA-256 digests of files, tensors and JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor


class FileEntry(TypedDict):
    """The manifest's entry for a file."""

    size: int
    sha256: str


def digest(body: dict[str, Any]) -> str:
    """Returns the SHA-256 of the canonical JSON, which has sorted keys, no spaces and only ASCII."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def tensors_digest(labeled: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    """Returns the SHA-256 of `start`, followed by each label and its tensor's bytes."""
    sha256 = hashlib.sha256(start.encode())
    for label, tensor in labeled:
        sha256.update(label.encode())
        sha256.update(tensor_bytes(tensor))
    return sha256.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of the elements, row by row. Copies them unless the tensor is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Writes a file piece by piece and returns its size and digest."""
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            sha256.update(piece)
        return {"size": file.tell(), "sha256": sha256.hexdigest()}


def file_entry(path: Path) -> FileEntry:
    """Returns the size and digest of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}
