"""Errors that a user can cause and can mend."""

from __future__ import annotations


class SmoothQuantError(ValueError):
    """A request that cannot be served: what was passed, what is allowed, what to do, in one sentence.

    The command line prints the sentence and exits with 2; any other exception is a defect of this package.
    """
