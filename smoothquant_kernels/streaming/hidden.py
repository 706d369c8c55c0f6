"""A batch and the hidden states that a block reads, joined into one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smoothquant_kernels.modeling.run import Batch

HIDDEN = "hidden_states"


def joined(batch: Batch, hidden: Tensor | None) -> Batch:
    """Adds the hidden states that a block reads to a batch as one more entry, so that padding is cut off both."""
    return batch if hidden is None else {**batch, HIDDEN: hidden}


def split(batch: Batch) -> tuple[Batch, Tensor | None]:
    return {n: v for n, v in batch.items() if n != HIDDEN}, batch.get(HIDDEN)


def known(hidden: Tensor | None) -> Tensor:
    assert hidden is not None  # None only before the first block
    return hidden


def hidden_size(model: Any) -> int:
    """The approximate bytes of one token's hidden states."""
    size = getattr(model.config.get_text_config(), "hidden_size", 0)
    return (size if isinstance(size, int) else 0) * int(model.dtype.itemsize)
