"""Checks that a disk has enough room before the work starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.storage.folder import existing_parent


def check_space(target: Path, need: int) -> None:
    """Raises SmoothQuantError unless the disk that will hold `target` has `need` bytes free."""
    parent = existing_parent(target)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise SmoothQuantError(
            f"{target} will take about {_gigabytes(need)} and the disk of {parent} has {_gigabytes(free)} free: free "
            "some space, or give another place."
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
