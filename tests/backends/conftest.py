"""Makes the CPU kernels in Python serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.backends import kernels_in_python


@pytest.fixture(scope="module")
def in_python() -> Iterator[None]:
    """The kernels on oneDNN and of the reference serve, even if compiled ones are loaded."""
    with kernels_in_python():
        yield
