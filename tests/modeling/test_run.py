"""The device and the mode in which a model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels.modeling.run import evaluating, evaluation_mode, model_device


class Merging(nn.Linear):
    """A layer that acts whenever its mode is set."""

    merged = 0

    def train(self, mode: bool = True) -> nn.Linear:
        self.merged += 1
        return super().train(mode)


def test_the_device_of_a_model() -> None:
    model = nn.Module()
    assert model_device(model).type == "cpu"
    model.register_buffer("weight_q", torch.empty(1, dtype=torch.int8, device="meta"))
    assert model_device(model).type == "meta"
    model.first = nn.Linear(1, 1)
    assert model_device(model).type == "cpu"


@pytest.mark.parametrize("mode", [evaluation_mode, evaluating])
def test_the_mode_of_each_module_is_restored(mode: Any) -> None:
    model = nn.Sequential(Merging(2, 2), nn.Dropout(), nn.ReLU())
    model[1].eval()
    with pytest.raises(KeyboardInterrupt), mode(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_grad_enabled() == (mode is evaluation_mode)
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert model[0].merged == (mode is evaluating)
