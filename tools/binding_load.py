"""Links objects of the binding with stand-in kernels for the CPU, loads them into a torch and calls the ops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class LoadError(Exception):
    """A build does not load, or an op of it answers wrongly; the message says which."""


def link(objects: Sequence[Path], folder: Path, python: str) -> Path:
    raise LoadError("not yet")


def call_ops(library: Path, python: str) -> str:
    raise LoadError("not yet")
