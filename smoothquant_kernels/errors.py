"""Errors that users can cause and correct."""

from __future__ import annotations


class SmoothQuantError(ValueError):
    """A request that cannot be served. One sentence says what was passed, what is allowed and what to do.

    The command line prints the sentence and exits with 2. Any other exception is a defect of this package.
    """
