"""Attributes that a module has for a while only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from smoothquant_kernels.modeling.readers import overridden


def test_attributes_come_back_however_the_block_ends() -> None:
    layer = nn.Linear(2, 2)
    layer.__dict__["own"] = "before"
    had = dict(vars(layer))

    def attributes(*, fails: bool) -> Iterator[tuple[nn.Module, str, Any]]:
        yield layer, "own", "first"
        yield layer, "own", "second"
        yield layer, "other", "new"
        if fails:
            raise RuntimeError("half-way")

    with overridden(attributes(fails=False)):
        assert (vars(layer)["own"], vars(layer)["other"]) == ("second", "new")
    assert vars(layer) == had
    with pytest.raises(RuntimeError, match="half-way"), overridden(attributes(fails=True)):
        pass
    assert vars(layer) == had
    with pytest.raises(ValueError, match="within"), overridden(attributes(fails=False)):
        raise ValueError("within")
    assert vars(layer) == had
