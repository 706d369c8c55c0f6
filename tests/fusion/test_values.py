"""Values that are not computed yet: for every operation but a quantized linear they are the model's own tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smoothquant_kernels import SmoothQuantError
from smoothquant_kernels.fusion.record import fusion_info, fusion_spills
from smoothquant_kernels.fusion.values import ActivatedValue, LinearValue, NormValue
from tests.support.fused_block import Block, K, close, optimized, sample


@pytest.fixture
def blocks() -> tuple[Block, Block]:
    return optimized()


def test_the_block_is_fused_whole(blocks: tuple[Block, Block]) -> None:
    plain, fused = blocks
    with torch.no_grad():
        assert close(fused(sample()), plain(sample()))
    gate, up, down = fusion_info(fused)
    assert gate.merged == up.merged == ("gate", "up")
    assert (gate.producer, gate.kind, gate.residual) == ("norm", "rms_norm", False)
    assert (down.producer, down.kind, down.residual) == ("act", "silu", True)
    assert not fusion_spills(fused)


#: Operations on a tensor t of any shape, as model code writes them.
READERS: dict[str, Callable[[Any], Any]] = {
    "tanh": torch.tanh,
    "method": lambda t: t.abs(),
    "add": lambda t: t + 1.0,
    "radd": lambda t: 1.0 + t,
    "sub": lambda t: t - 1.0,
    "rsub": lambda t: torch.ones(1) - t,
    "mul": lambda t: t * 2.0,
    "rmul": lambda t: torch.full((1,), 2.0) * t,
    "div": lambda t: t / 2.0,
    "rdiv": lambda t: 2.0 / (t + 10.0),
    "pow": lambda t: t**2,
    "neg": operator.neg,
    "matmul": lambda t: t @ t.transpose(-1, -2),
    "rmatmul": lambda t: torch.ones(2, 3) @ t,
    "index": lambda t: t[:, -1],
    "iteration": lambda t: torch.stack(list(t)),
    "view": lambda t: t.view(-1, t.shape[-1]) + 0.0,
    "split": lambda t: t.view(2, 3, 2, -1) + 0.0,
    "reshape": lambda t: t.reshape(-1) + 0.0,
    "transpose": lambda t: t.transpose(0, 1),
    "linear": lambda t: F.linear(t, torch.ones(2, t.shape[-1])),
    "layer_norm": lambda t: F.layer_norm(t, t.shape[-1:]),
    "cat": lambda t: torch.cat([t, t], dim=-1),
    "float16": lambda t: t.to(torch.float16),
    "dropout": lambda t: F.dropout(t, 0.5, training=False) + 0.0,
    "relu": lambda t: F.relu(t) + 0.0,
    "gelu": lambda t: F.gelu(t, approximate="tanh") + 0.0,
    "out of place twice": lambda t: t.sum() + t.mean(),
    "as argument": lambda t: torch.where(torch.ones(1, dtype=torch.bool), t, t * 2),
    "equal": lambda t: torch.eq(t, 0.0),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", ["norm", "product", "linear"])
def test_any_other_operation_gets_the_tensor_of_the_model(
    blocks: tuple[Block, Block], value: str, reader: str
) -> None:
    """Bit for bit what the model without fusion computes from the same inputs, and the read is counted."""
    plain, fused = blocks
    place = ["norm", "product", "linear"].index(value)
    read = READERS[reader]
    seen: dict[str, Any] = {}

    def extra(*values: Any) -> Any:
        seen["value"] = values[place]
        return read(values[place])

    plain.extra = fused.extra = extra
    with torch.no_grad():
        expected = plain(sample())
        got = fused(sample())
        kind = (NormValue, ActivatedValue, LinearValue)[place]
        assert type(seen["value"]) is kind
        # The product and what follows read int8 values of the fused norm, so they may round the other way.
        own = read(seen["value"].tensor())
    assert isinstance(got, Tensor) and got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got, own)
    if value == "norm":
        assert torch.equal(got, expected)
    name = ("norm", "act", "down")[place]
    assert fusion_spills(fused).keys() == {name}
    assert sum(fusion_spills(fused)[name].values()) >= 1


def test_what_model_code_asks_of_a_value_costs_no_computation(blocks: tuple[Block, Block]) -> None:
    plain, fused = blocks
    asked: list[Any] = []

    def extra(*values: Any) -> Any:
        for v in values:
            asked.append(
                (
                    v.shape,
                    v.size(-1),
                    v.size(),
                    v.dim(),
                    v.ndim,
                    v.dtype,
                    v.device,
                    v.numel(),
                    len(v),
                )
            )
            assert v.to(torch.float32) is v or isinstance(v, Tensor)
            assert v.contiguous() is v or isinstance(v, Tensor)
        return torch.zeros(1)

    plain.extra = fused.extra = extra
    with torch.no_grad():
        plain(sample())
        fused(sample())
    assert asked[:3] == asked[3:]
    assert not fusion_spills(fused)


def test_residuals_of_other_shapes_and_types_are_added_by_torch(
    blocks: tuple[Block, Block],
) -> None:
    plain, fused = blocks
    residuals: list[Any] = [
        torch.ones(K), torch.ones(1, 1, K), torch.ones(2, 3, K, dtype=torch.float64), 2.0,
        torch.ones(2, 3, K, dtype=torch.float16),
    ]  # fmt: skip
    for residual in residuals:
        plain.extra = fused.extra = lambda h, a, y, r=residual: r + y
        with torch.no_grad():
            got, expected = fused(sample()), plain(sample())
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert close(got, expected)
    assert sum(fusion_spills(fused)["down"].values()) == len(residuals)


def test_residual_in_the_epilogue_is_the_sum(blocks: tuple[Block, Block]) -> None:
    """In float32 the epilogue rounds as the sum does, so the bits are equal."""
    _, fused = blocks
    r = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(5))
    seen: list[Any] = []
    for change in (lambda y: r + y, lambda y: y + r, lambda y: r + y.tensor()):
        fused.extra = lambda h, a, y, f=change: f(y)
        with torch.no_grad():
            seen.append(fused(sample()))
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("act", [F.relu, F.silu, torch.relu, F.gelu], ids=lambda f: f.__name__)
def test_functions_are_found_as_modules_are(act: Callable[[Tensor], Tensor]) -> None:
    """A function has no module whose forward could be replaced: the linear before it makes the value."""
    plain, fused = optimized(act=act)
    with torch.no_grad():
        assert close(fused(sample()), plain(sample()))
    gate, _, down = fusion_info(fused)
    assert down.kind == act.__name__ and down.producer == "gate"
    assert gate.merged == ("gate", "up")
    assert not fusion_spills(fused)


def test_training_mode_is_refused_by_a_sentence(blocks: tuple[Block, Block]) -> None:
    _, fused = blocks
    fused.train()
    with pytest.raises(SmoothQuantError, match=r"norm is fused for inference .* undo_optimization"):
        fused(sample())


def test_gradients_take_the_path_of_the_model(blocks: tuple[Block, Block]) -> None:
    """In evaluation mode without no_grad, a model with trainable parameters or inputs computes as if not fused."""
    plain, fused = blocks
    grads = []
    for block in (plain, fused):
        x = sample().requires_grad_()
        y = block(x)
        y.square().sum().backward()
        assert block.norm.weight.grad is not None and x.grad is not None
        grads.append((y.detach(), x.grad, block.norm.weight.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_residual_with_a_gradient_keeps_it() -> None:
    _, fused = optimized()
    fused.norm.weight.requires_grad_(False)
    r = torch.ones(2, 3, K, requires_grad=True)
    fused.extra = lambda h, a, y: r + y
    fused(sample()).sum().backward()
    assert r.grad is not None and torch.equal(r.grad, torch.ones_like(r))
