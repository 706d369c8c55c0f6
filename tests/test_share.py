"""`--share K/N`: the shares are disjoint, together they are all tests, and a test's share depends on its name alone."""

from __future__ import annotations

import re

import pytest

from tests.support import share

INNER = """
import pytest

@pytest.mark.in_turn
@pytest.mark.parametrize("i", range(40))
def test_long(i): ...

@pytest.mark.parametrize("i", range({}))
def test_other(i): ...
"""
INI = "[pytest]\nmarkers =\n    in_turn\n"


def ran(pytester: pytest.Pytester, *arguments: str, others: int = 3) -> set[str]:
    """The tests that ran."""
    pytester.makefile(".ini", pytest=INI)
    pytester.makepyfile(INNER.format(others))
    done = pytester.runpytest_inprocess("-v", "-p", "no:cacheprovider", *arguments, plugins=[share])
    return set(re.findall(r"::(\S+) PASSED", done.stdout.str()))


def test_each_test_is_in_one_share(pytester: pytest.Pytester) -> None:
    everything = ran(pytester)
    shares = [ran(pytester, "--share", f"{k}/4") for k in range(4)]
    assert len(everything) == 43 and set.union(*shares) == everything
    assert sum(map(len, shares)) == 43
    assert all(len(one) >= 4 for one in shares)


def test_a_marker_says_what_is_shared_out(pytester: pytest.Pytester) -> None:
    shares = [ran(pytester, "--share", f"{k}/4", "--share-of", "in_turn") for k in range(4)]
    others = {f"test_other[{i}]" for i in range(3)}
    assert set.intersection(*shares) == others
    assert sum(len(one - others) for one in shares) == 40


def test_more_tests_move_no_test(pytester: pytest.Pytester) -> None:
    before = ran(pytester, "--share", "1/4")
    after = ran(pytester, "--share", "1/4", others=30)
    assert before < after


def test_the_marker_alone_shares_nothing_out(pytester: pytest.Pytester) -> None:
    assert len(ran(pytester, "--share-of", "in_turn")) == 43


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "1/0", "a/b", ""])
def test_a_share_that_does_not_exist_is_refused(pytester: pytest.Pytester, text: str) -> None:
    done = pytester.runpytest_inprocess(f"--share={text}", plugins=[share])
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*--share {text}: expected K/N with 0 <= K < N, such as 1/4*"])
