"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    try:
        return version("smoothquant-kernels")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
