"""Norms and activation functions are recognized by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels.fusion.norms import activation_kind, norm_form

K = 40


class Rms(nn.Module):
    """As in transformers: float32 inside, rounded before the product with the weight."""

    def __init__(self, eps: float, plus: float = 0.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(K, generator=torch.Generator().manual_seed(2)))
        self.variance_epsilon, self.plus, self.other = eps, plus, 0.125

    def forward(self, x: Tensor) -> Tensor:
        v = x.float()
        v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.gamma + self.plus) * v.to(x.dtype)


class Other(Rms):
    def __init__(self, how: str) -> None:
        super().__init__(1e-5)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.how == "scale":
            return x * self.gamma
        if self.how == "off":
            return y * 1.01
        if self.how == "clamp":
            return y.clamp(-1, 1)
        if self.how == "double":
            return y.double()
        if self.how == "l2":
            return x / x.norm(dim=-1, keepdim=True) * self.gamma
        raise ValueError("no such thing")


def noisy(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-12, 1e-3])
def test_norms(dtype: torch.dtype, eps: float) -> None:
    rms, plus = norm_form(Rms(eps).to(dtype)), norm_form(Rms(eps, 1.0).to(dtype))
    assert rms is not None and (rms.kind, rms.weight, rms.bias) == ("rms_norm", "gamma", "")
    assert plus is not None and plus.one_plus and not rms.one_plus
    layer = norm_form(noisy(nn.LayerNorm(K, eps=eps)).to(dtype))
    assert layer is not None
    assert (layer.kind, layer.weight, layer.bias) == ("layer_norm", "weight", "bias")
    if eps > 1e-6 or dtype != torch.bfloat16:
        # Smaller ones change nothing that the type can show, so any of them is right.
        assert rms.eps == layer.eps == eps or eps < 1e-10


def test_torch_rms_norm_without_an_eps_has_that_of_its_type() -> None:
    form = norm_form(noisy(nn.RMSNorm(K)))
    assert form is not None and form.eps == torch.finfo(torch.float32).eps


def test_layer_norm_without_a_bias() -> None:
    form = norm_form(noisy(nn.LayerNorm(K, bias=False)))
    assert form is not None and (form.kind, form.bias) == ("layer_norm", "")


@pytest.mark.parametrize("how", ["scale", "off", "clamp", "double", "l2", "raises"])
def test_modules_that_are_no_norms(how: str) -> None:
    assert norm_form(Other(how)) is None


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(K), nn.GroupNorm(1, K), nn.GroupNorm(4, K), nn.Linear(K, 1), nn.PReLU(K)],
    ids=str,
)
def test_modules_of_torch_that_are_no_norms(module: Any) -> None:
    assert norm_form(module) is None


class _Call(nn.Module):
    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return self.f(x)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.ReLU(), "relu"), (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"),
        (_Call(lambda x: x * torch.sigmoid(x)), "silu"), (_Call(lambda x: x.clamp(min=0)), "relu"),
        (_Call(lambda x: x * torch.sigmoid(1.702 * x)), None), (nn.ReLU6(), None), (nn.Tanh(), None),
        (nn.Identity(), None), (nn.Dropout(), None), (nn.LeakyReLU(), None), (nn.Softplus(), None),
        (_Call(lambda x: F.relu(x).square()), None), (_Call(lambda x: F.silu(x)[:-1]), None),
        (_Call(lambda x: F.silu(x).double()), None), (_Call(lambda x: 1 / 0), None), (nn.Hardswish(), None),
        (nn.CELU(), None), (nn.ReLU(inplace=True), None), (nn.Hardtanh(0, 20), None),
        (_Call(lambda x: F.gelu(x).clamp(-10, 10)), None), (_Call(lambda x: F.silu(x).clamp(max=1e3)), None),
        (_Call(lambda x: F.silu(x) * 1.0005), None),
    ],
)  # fmt: skip
def test_activations(module: nn.Module, kind: str | None) -> None:
    assert activation_kind(module.eval()) == kind


def test_a_module_with_parameters_is_no_activation() -> None:
    assert activation_kind(nn.PReLU()) is None
