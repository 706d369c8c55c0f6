"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGE = "smoothquant-kernels"


def installed_version(package: str) -> str | None:
    """The version of a package, or None if it is not installed, as this package in a plain source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_version() -> str:
    """This package's version, or "unknown"."""
    return installed_version(PACKAGE) or "unknown"
