"""Versions of installed packages, and of a source tree without any."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from smoothquant_kernels.cli import doctor
from smoothquant_kernels.report import page
from smoothquant_kernels.storage import versions


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every package look uninstalled."""

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", missing)


def test_an_installed_package() -> None:
    assert versions.installed_version("torch") == version("torch")
    assert torch.__version__.startswith(version("torch").split("+")[0])
    assert versions.installed_version("no-such-package-at-all") is None


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (versions.package_version, "unknown"),
        (page._footer, "smoothquant-kernels (source tree). Method"),
        (lambda: str([doctor.work()[key] for key in ("package", "packages")]), "[None, {"),
    ],
)
def test_a_source_tree_has_no_version(without: None, says: Callable[[], str], words: str) -> None:
    assert words in says()
