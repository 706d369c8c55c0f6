"""A pytest plugin: `--share K/N` runs one of N shares of the tests, chosen by their names.

Continuous integration runs the tests that take longest in turn, a share on each change. A test stays in its share when
others are added. `--share-of MARKER` runs the other tests whole.
"""

from __future__ import annotations

import re
import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=_share, metavar="K/N", help="run share K of N, 0 <= K < N")
    parser.addoption("--share-of", metavar="MARKER", help="what is shared out (default: all tests)")


def _share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise pytest.UsageError(f"--share {text}: expected K/N with 0 <= K < N, such as 1/4")
    return int(found[1]), int(found[2])


def chosen(name: str, share: tuple[int, int]) -> bool:
    """Whether the test of this name belongs to the share."""
    part, parts = share
    return zlib.crc32(name.encode()) % parts == part


@pytest.hookimpl(tryfirst=True)  # pytest-xdist appends the names of groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = config.getoption("share")
    if share is None:
        return
    marker = config.getoption("share_of")
    left = [
        item
        for item in items
        if (marker is None or item.get_closest_marker(marker)) and not chosen(item.nodeid, share)
    ]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def parts(config: pytest.Config) -> int:
    """The number of shares, of which this run has one."""
    share = config.getoption("share")
    return 1 if share is None else int(share[1])


def arguments(config: pytest.Config) -> list[str]:
    """The options with which a pytest that a test starts runs the same share of its tests."""
    share = config.getoption("share")
    return [] if share is None else ["--share", f"{share[0]}/{share[1]}"]
