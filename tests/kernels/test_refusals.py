"""Wrong arguments: the public functions raise the same exception on every backend."""

from __future__ import annotations

import re

import pytest
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.support.backends import Backend
from tests.support.op_calls import Call
from tests.support.op_refusals import REFUSED


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    REFUSED,
    ids=[f"{c.name}-{i}" for i, (c, *_) in enumerate(REFUSED)],
)
def test_a_wrong_argument_raises_the_same_exception(
    call: Call, error: type[Exception], sentence: str, backend: Backend
) -> None:
    """C++ can throw only RuntimeError. The op's own check then raises the same exception as in Python."""
    args, kwargs = tree_map(
        lambda t: backend.put(t) if isinstance(t, Tensor) else t, (call.args, call.kwargs)
    )
    with pytest.raises(error, match=re.escape(sentence)) as caught:
        call.function(*args, **kwargs)
    assert type(caught.value) is error and str(caught.value).startswith(f"{call.name}: ")
    if backend.library is not None:
        with pytest.raises(RuntimeError):
            call.overload(*args, **kwargs)
