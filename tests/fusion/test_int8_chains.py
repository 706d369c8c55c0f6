"""Static scales: ReLU, and the product of gate and up, are quantized in the epilogue of the GEMM before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import SmoothQuantConfig, ops, smooth_and_quantize
from smoothquant_kernels.fusion.norms import norm_form
from smoothquant_kernels.fusion.optimize import optimize_for_inference
from smoothquant_kernels.fusion.record import fusion_info, fusion_spills
from tests.support.fusion import recorded_calls

K, HIDDEN = 32, 48


class Mlp(nn.Module):
    """x + fc2(relu(fc1(norm(x)))), or with a gate."""

    def __init__(self, gate: nn.Module | None = None, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm(K)  # type: ignore[call-arg]
        self.fc1 = nn.Linear(K, HIDDEN)
        self.up = None if gate is None else nn.Linear(K, HIDDEN)
        self.act = nn.ReLU() if gate is None else gate
        self.fc2 = nn.Linear(HIDDEN, K)
        self.config = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = self.act(self.fc1(h))
        return x + self.fc2(y if self.up is None else y * self.up(h))


def sample(seed: int, rows: int = 5) -> Tensor:
    return 3 * torch.randn(2, rows, K, generator=torch.Generator().manual_seed(seed))


def quantized(dtype: torch.dtype = torch.float32, **options: Any) -> Mlp:
    config = SmoothQuantConfig(
        activation_scheme=options.pop("scheme", "static"),
        rotation=options.pop("rotation", "none"),
        only_where_better=False,
    )
    data = [{"x": sample(s).to(dtype)} for s in range(3)]
    model = smooth_and_quantize(Mlp(**options).eval().to(dtype), data, config, progress=False)
    assert isinstance(model, Mlp)
    return model


def optimized(model: Mlp, *, gated: bool = False) -> Mlp:
    dtype = model.fc1.dtype
    made = optimize_for_inference(copy.deepcopy(model), {"x": sample(9).to(dtype)}, gated=gated)
    assert isinstance(made, Mlp)
    return made


def stays_int8(model: nn.Module) -> bool:
    return next(layer for layer in fusion_info(model) if layer.name == "fc2").int8


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_relu_in_the_epilogue(dtype: torch.dtype, norm: type[nn.Module]) -> None:
    """The bits of the three ops that are called; in float32 those of the two fused calls, too."""
    plain = quantized(dtype, norm=norm)
    fused = optimized(plain)
    assert stays_int8(fused)
    x = sample(4).to(dtype)
    with torch.no_grad(), recorded_calls() as calls:
        y = fused(x)
    assert not calls  # neither linear_s8 nor fused_linear_s8
    fc1, fc2, parameters = plain.fc1, plain.fc2, plain.norm.weight
    assert fc1.inv_smooth is None and fc2.inv_smooth is None  # folded
    with torch.no_grad():
        if norm is nn.RMSNorm:
            form = norm_form(plain.norm)
            assert form is not None
            eps = form.eps
            x_q, x_scale = ops.rms_norm_quantize(x, parameters, eps, scale=fc1.x_scale)
        else:
            x_q, x_scale = ops.layer_norm_quantize(
                x, parameters, plain.norm.bias, 1e-5, scale=fc1.x_scale
            )
        middle = ops.gemm_s8_requant(
            x_q, fc1.w_q, x_scale, fc1.w_scale, fc2.x_scale, bias=fc1.bias, relu=True
        )
        scale = fc2.x_scale.expand(10)
        expected = ops.gemm_s8(
            middle, fc2.w_q, scale, fc2.w_scale, bias=fc2.bias, residual=x, out_dtype=dtype
        )
        assert torch.equal(y, expected)
        if dtype == torch.float32:
            h = ops.gemm_s8(x_q, fc1.w_q, x_scale, fc1.w_scale, bias=fc1.bias, out_dtype=dtype)
            separate, _ = ops.act_quantize(h, "relu", scale=fc2.x_scale)
            assert torch.equal(middle, separate)
    assert not fusion_spills(fused)


def test_nan_stays_in_its_token() -> None:
    """int8 has no NaN, so the scale of the token carries it."""
    fused = optimized(quantized())
    x = sample(4)
    with torch.no_grad():
        clean = fused(x)
        for bad in (torch.nan, torch.inf):
            x[1, 2, 3] = bad
            y = fused(x)
            assert y[1, 2].isnan().all()
            y[1, 2] = clean[1, 2]
            assert torch.equal(y, clean)


@pytest.mark.parametrize(
    "options", [{"scheme": "per_token"}, {"rotation": 16}, {"gate": nn.GELU()}], ids=str
)
def test_where_it_does_not_fit(options: dict[str, Any]) -> None:
    """A dynamic scale, a rotation, an activation that is no ReLU and has no gate: computed by the reader."""
    if "gate" in options:

        class Plain(Mlp):
            def forward(self, x: Tensor) -> Tensor:
                return x + self.fc2(F.gelu(self.fc1(self.norm(x))))

        torch.manual_seed(0)
        config = SmoothQuantConfig(activation_scheme="static", rotation="none")
        data = [{"x": sample(s)} for s in range(3)]
        plain: Any = smooth_and_quantize(Plain().eval(), data, config, progress=False)
    else:
        plain = quantized(**options)
    fused = optimized(plain)
    assert not stays_int8(fused)
    with torch.no_grad():
        a, b = plain(sample(4)), fused(sample(4))
    assert (a - b).abs().max() <= 0.02 * a.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gate_and_up_in_the_epilogue(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit the numbers without `gated`."""
    if not hasattr(ops, "gemm_s8_gated"):
        pytest.skip("gemm_s8_gated")
    gate = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}[kind]
    plain = quantized(dtype, gate=gate, norm=nn.RMSNorm)
    separate, fused = optimized(plain), optimized(plain, gated=True)
    assert stays_int8(fused) and not stays_int8(separate)
    for rows in (1, 5, 17):
        x = sample(4, rows).to(dtype)
        with torch.no_grad():
            assert torch.equal(fused(x), separate(x))
    assert not fusion_spills(fused)
    state = plain.state_dict()
    for name, value in fused.state_dict().items():
        assert torch.equal(value, state[name])


def test_chains_compile_whole() -> None:
    fused = optimized(quantized())
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(sample(4)), fused(sample(4)))
