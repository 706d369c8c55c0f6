"""A batch and the hidden states in front of a block, carried as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from smoothquant_kernels.modeling.run import Batch

HIDDEN = "hidden_states"


def joined(batch: Batch, hidden: Tensor | None) -> Batch:
    """A batch with the hidden states in front of a block as one more entry, so that padding is cut off both."""
    return batch if hidden is None else {**batch, HIDDEN: hidden}


def split(batch: Batch) -> tuple[Batch, Tensor | None]:
    return {n: v for n, v in batch.items() if n != HIDDEN}, batch.get(HIDDEN)


def known(hidden: Tensor | None) -> Tensor:
    assert hidden is not None  # behind the first block it is
    return hidden


def hidden_size(model: Any) -> int:
    """Bytes of one token's hidden states, about."""
    size = getattr(model.config.get_text_config(), "hidden_size", 0)
    return (size if isinstance(size, int) else 0) * int(model.dtype.itemsize)
