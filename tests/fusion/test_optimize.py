"""`optimize_for_inference`: merged outputs, changes in place, failures, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smoothquant_kernels import SmoothQuantError, quantize_model
from smoothquant_kernels.fusion.forwards import FusedLinear
from smoothquant_kernels.fusion.optimize import optimize_for_inference
from smoothquant_kernels.fusion.record import fused_forwards, fusion_info, fusion_spills
from tests.support.fused_block import Block, K, close, optimized, sample


def test_merged_outputs_belong_to_their_input() -> None:
    """Linears that read a float tensor keep the outputs of their mates: never for another tensor, or a changed one."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(K, 8), nn.Linear(K, 8)
            self.change: Callable[[Tensor], Tensor] = lambda x: x

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(self.change(x))

    plain, fused = quantize_model(Pair().eval()), quantize_model(Pair().eval())
    optimize_for_inference(fused, {"x": sample()})
    group = fused_forwards(fused)["a"]
    assert isinstance(group, FusedLinear) and group.group._last is None
    changes = (lambda x: x, lambda x: x * 2, lambda x: x.mul_(2), lambda x: x.clone())
    for change in changes:
        plain.change = fused.change = change
        with torch.no_grad():
            for _ in range(2):
                for y, z in zip(plain(sample()), fused(sample()), strict=True):
                    assert torch.equal(y, z)
    plain.change = fused.change = lambda x: x
    with torch.no_grad():
        fused(sample())
    assert group.group._last is None  # nothing is kept alive


@pytest.mark.parametrize("where", ["relative_change", "Site"])
def test_nothing_is_left_behind_by_a_failure(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from smoothquant_kernels.fusion import optimize

    block = quantize_model(Block().eval())
    before = {n: (t.data_ptr(), t.clone()) for n, t in block.named_buffers()}
    failing: Any = lambda *_: 1.0  # noqa: E731
    if where == "Site":

        def failing(*_: Any) -> Any:
            raise MemoryError

    monkeypatch.setattr(optimize, where, failing)
    with pytest.raises((SmoothQuantError, MemoryError)):
        optimize_for_inference(block, {"x": sample()})
    assert not fused_forwards(block) and not fusion_info(block)
    assert all(torch.equal(t, before[n][1]) for n, t in block.named_buffers())
    assert not any(m._load_state_dict_post_hooks for m in block.modules())
    storages = [t.untyped_storage().data_ptr() for t in block.buffers()]
    assert len(set(storages)) == len(storages)


def test_models_that_cannot_be_optimized() -> None:
    with pytest.raises(SmoothQuantError, match=r"Block has no W8A8Linear .* quantize it first"):
        optimize_for_inference(Block().eval())

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(K, K)

        def forward(self, x: Tensor, mask: str) -> Tensor:
            return self.a(x)

    model = quantize_model(Two().eval())
    with pytest.raises(SmoothQuantError, match="no input was found that Two accepts"):
        optimize_for_inference(model)


def test_hooks_and_replaced_forwards_stay_whole() -> None:
    """A user's hook sees tensors, as before: the module it is on is not fused."""
    block = quantize_model(Block().eval())
    seen: list[Any] = []
    block.norm.register_forward_hook(lambda _, args, y: seen.append(y))
    block.down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    optimize_for_inference(block, {"x": sample()})
    seen.clear()  # while the model is examined, hooks see values that are not computed
    with torch.no_grad():
        block(sample())
    assert seen and all(isinstance(t, Tensor) for t in seen)
    gate, _, down = sorted(fusion_info(block), key=lambda layer: "gate up down".index(layer.name))
    assert "has forward hooks" in gate.reason and gate.merged == ("gate", "up")
    assert down.reason == "it has forward hooks"


@pytest.mark.parametrize("place", ["norm", "gate", "down"])
def test_an_input_that_is_changed_before_the_value_is_read(place: str) -> None:
    """A value that waits would be computed from the changed tensor. The first pass sees that."""

    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            h = self.norm(x)
            if place == "norm":
                x.mul_(2)
            gate = self.gate(h) + 0.0
            a = self.act(gate)
            if place == "gate":
                gate.zero_()
            a = a * self.up(h) + 0.0 if place == "down" else a * self.up(h)
            y = self.down(a)
            if place == "down":
                a.zero_()
            return x + y

    plain, fused = quantize_model(InPlace().eval()), quantize_model(InPlace().eval())
    optimize_for_inference(fused, {"x": sample()})
    with torch.no_grad():
        assert close(fused(sample()), plain(sample()))
        assert not fusion_spills(fused)
    layers = {layer.name: layer for layer in fusion_info(fused)}
    assert ("change in place" in layers["gate"].reason) == (place == "norm")
    assert bool(layers["down"].producer) == (place == "norm")


@pytest.mark.parametrize("out", ["tensor", "tuple", "dict"])
def test_the_models_output_is_a_tensor(out: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.linear = nn.LayerNorm(K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Any:
            h = self.norm(x)
            y = self.linear(h)
            return {"tensor": y, "tuple": (y, [h]), "dict": {"y": y, "h": (h,)}}[out]

    net = optimize_for_inference(quantize_model(Net().eval()), {"x": sample()})
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(net(sample()))
    assert found and all(isinstance(t, Tensor) for t in found)
    (layer,) = fusion_info(net)
    assert layer.kind == ("layer_norm" if out == "tensor" else "quantize")


def test_an_output_is_handed_out_once() -> None:
    """A linear that is called twice makes two tensors, which may be changed in place."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.a, self.b = nn.LayerNorm(K), nn.Linear(K, K), nn.Linear(K, K)
            self.reads_norm = True

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x) if self.reads_norm else x * 1
            one = self.a(h)
            one = one.mul_(0.5) if isinstance(one, Tensor) else one * 0.5
            return one * 3 + self.a(h) * 1 + self.b(h) * 1

    for reads_norm in (True, False):
        plain, fused = (quantize_model(Twice().eval()) for _ in range(2))
        plain.reads_norm = fused.reads_norm = reads_norm
        optimize_for_inference(fused, {"x": sample()})
        with torch.inference_mode():
            for _ in range(2):
                assert close(fused(sample()), plain(sample()))


def test_merged_outputs_of_an_inference_tensor_that_changes_between_calls() -> None:
    """A static buffer is the same object in every call, and inference tensors have no version."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.both = nn.Linear(K, 8), nn.Linear(K, 8), True

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.a(x), self.b(x)] if self.both else [self.a(x)]

    plain, fused = (quantize_model(Pair().eval()) for _ in range(2))
    optimize_for_inference(fused, {"x": sample()})
    with torch.inference_mode():
        x = sample()
        for both in (True, False, True, False, False, True):
            plain.both = fused.both = both
            x.mul_(-1.5)
            for a, b in zip(plain(x), fused(x), strict=True):
                assert torch.equal(a, b)


def test_code_that_needs_contiguous_outputs_keeps_separate_linears() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.a, self.b = nn.LayerNorm(K), nn.Linear(K, 8), nn.Linear(K, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.a(h).view(x.shape[0], -1) + self.b(h).view(x.shape[0], -1)

    plain, fused = (quantize_model(Flat().eval()) for _ in range(2))
    optimize_for_inference(fused, {"x": sample()})
    with torch.no_grad():
        assert close(fused(sample()), plain(sample()))
    assert [(layer.kind, layer.merged) for layer in fusion_info(fused)] == [("layer_norm", ())] * 2


def test_state_of_one_merged_layer_is_checked_at_the_next_call() -> None:
    block = optimized()[1]
    state = block.gate.state_dict()
    state["w_scale"] = state["w_scale"] * 2
    with torch.no_grad():
        before = block(sample())
        block.gate.load_state_dict(state)
        assert not torch.equal(block(sample()), before)
        inverse = torch.ones(K)
        block.gate.inv_smooth = inverse  # as if loaded: other factors than those of `up`
        block.gate.load_state_dict({**state, "inv_smooth": inverse * 2}, strict=False)
        with pytest.raises(SmoothQuantError, match="different smoothing factors"):
            block(sample())


@pytest.mark.parametrize("how", ["data", "copy", "replaced"])
def test_a_norm_whose_parameters_change(how: str) -> None:
    class OnePlus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(K)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.linear = OnePlus(), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)) * 1

    plain, fused = (quantize_model(Net().eval()) for _ in range(2))
    optimize_for_inference(fused, {"x": sample()})
    assert fusion_info(fused)[0].kind == "rms_norm"
    new = torch.linspace(-1, 1, K)
    with torch.no_grad():
        fused(sample())
        for net in (plain, fused):
            if how == "data":
                net.norm.weight.data = new
            elif how == "copy":
                net.norm.weight.data.copy_(new)
            else:
                net.norm.weight = nn.Parameter(new)
        assert close(fused(sample()), plain(sample()))
