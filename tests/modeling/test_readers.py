"""`overridden` gives modules temporary attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

from smoothquant_kernels.modeling.readers import overridden


def test_attributes_are_restored_however_the_block_ends() -> None:
    layer = nn.Linear(2, 2)
    layer.__dict__["own"] = "before"
    before = dict(vars(layer))

    def attributes(*, fails: bool) -> Iterator[tuple[nn.Module, str, Any]]:
        yield layer, "own", "first"
        yield layer, "own", "second"
        yield layer, "other", "new"
        if fails:
            raise RuntimeError("halfway")

    with overridden(attributes(fails=False)):
        assert (vars(layer)["own"], vars(layer)["other"]) == ("second", "new")
    assert vars(layer) == before
    with pytest.raises(RuntimeError, match="halfway"), overridden(attributes(fails=True)):
        pass
    assert vars(layer) == before
    with pytest.raises(ValueError, match="within"), overridden(attributes(fails=False)):
        raise ValueError("within")
    assert vars(layer) == before
