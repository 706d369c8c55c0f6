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
    """A file of the folder."""

    size: int
    sha256: str


def digest(body: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON: sorted keys, no spaces, ASCII."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def tensors_digest(labeled: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    """SHA-256 of a text and of tensors, each after its label."""
    sha256 = hashlib.sha256(start.encode())
    for label, tensor in labeled:
        sha256.update(label.encode())
        sha256.update(tensor_bytes(tensor))
    return sha256.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements, row by row; a copy unless the tensor has them so on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Writes a file piece by piece; its size and digest."""
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            sha256.update(piece)
        return {"size": file.tell(), "sha256": sha256.hexdigest()}


def file_entry(path: Path) -> FileEntry:
    """Size and digest of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return {"size": path.stat().st_size, "sha256": sha256.hexdigest()}
