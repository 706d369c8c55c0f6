"""Which part of the calibration data a search measures on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.batches import PositionCounter, rows_of
from smoothquant_kernels.modeling.run import Batch


def hold_back(
    model: nn.Module, batches: Sequence[Batch], *tokens: int
) -> tuple[list[Batch], list[list[Batch]]]:
    """Splits the batches: those for the ranges, and from the end a part for each number of tokens, the last at the end.

    A part has at most a quarter of the batches. Few batches are divided into their rows.

    Raises:
        SmoothQuantError: there are too few sequences for one in each part.
    """
    left = list(batches)
    if len(left) < 4 * len(tokens):
        left = [row for batch in batches for row in rows_of(batch, model)]
    quarter, size = max(1, len(left) // 4), PositionCounter(model)
    needed = 1 + sum(wanted > 0 for wanted in tokens)
    if len(left) < needed:
        third = ", some to check the outcome" if needed > 2 else ""
        raise SmoothQuantError(
            f"a search needs at least {'three' if needed > 2 else 'two'} sequences of calibration data, got "
            f"{len(left)}: some for the ranges, some to try candidates on{third}; give more data, or shorter windows "
            "(calibration_window)."
        )
    parts: list[list[Batch]] = []
    for wanted in reversed(tokens):
        held: list[Batch] = []
        while len(held) < quarter and sum(map(size, held)) < wanted:
            held.append(left.pop())
        parts.insert(0, held[::-1])
    return left, parts
