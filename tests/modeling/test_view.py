"""`ModelView` finds the parts of a model once, at their first use."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch import nn

from smoothquant_kernels import SmoothQuantConfig, SmoothQuantError, smooth_and_quantize
from smoothquant_kernels.modeling import view as view_module
from smoothquant_kernels.modeling.view import ModelView
from tests.support.models import make_model, token_batches


def test_the_linears_are_found_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[int] = Counter()
    original = view_module._partition

    def counted(view: ModelView) -> Any:
        calls[id(view.model)] += 1
        return original(view)

    monkeypatch.setattr(view_module, "_partition", counted)
    model = make_model("llama")
    smooth_and_quantize(model, token_batches(), SmoothQuantConfig(), progress=False)
    assert calls == {id(model): 1}


def test_a_view_without_linears_raises_only_on_access() -> None:
    view = ModelView(nn.Sequential(nn.ReLU()))
    assert view.shared == {} and view.heads == set()
    for _ in range(2):
        with pytest.raises(SmoothQuantError, match="no linear layer to quantize in Sequential"):
            _ = view.linears


def test_the_parts_of_a_model() -> None:
    model: Any = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    view = ModelView(model, ("*.o_proj",))
    assert view.heads == {"lm_head"} and view.skipped["lm_head"] == "output head: stays in float"
    assert len(view.linears) == 12 and len(view.skipped) == 3
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    assert view.shared[up] == [gate] and view.shared[gate] == [up]
