"""What the package asks of a compiled library before it loads it. A library that does not fit never raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

#: The build puts the libraries beside the package's `__init__.py`.
FOLDER = Path(__file__).resolve().parents[1]


def facts_of(file: Path) -> dict[str, Any]:
    """The recorded facts about a build. Empty without a build."""
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def too_old(what: str, torch_target: str) -> str | None:
    """Why a library does not fit this torch. Known before loading, because a throwing initializer ends a process."""
    if _release(torch.__version__) < _release(torch_target):
        return f"the {what} needs torch {torch_target} or newer, but this is {torch.__version__}"
    return None


def load(library: Path) -> str | None:
    """Loads a library, which registers its kernels. Returns why that failed, or None."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__}: {error}"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
