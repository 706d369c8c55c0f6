"""After any failure a model is unchanged. The tests make each step of smoothing and quantizing fail in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from smoothquant_kernels import (
    SmoothQuantConfig,
    SmoothQuantError,
    W8A8Linear,
    quantize_model,
    smooth_and_quantize,
    smooth_lm,
)
from smoothquant_kernels.modeling import changes as changes_module
from smoothquant_kernels.modeling.changes import Changes
from smoothquant_kernels.modeling.run import model_device
from smoothquant_kernels.nn.float_linear import pending_smooth, set_pending_smooth
from tests.support.models import logits, make_model, token_batches

IDS = token_batches(1, length=12)[0]
DATA = token_batches(2, length=8)


class Stop(BaseException):
    """An interrupt, which no handler in the package may catch."""


@contextmanager
def failing_at(step: int, target: Any, name: str, error: BaseException) -> Iterator[list[int]]:
    """Makes call number `step` of a function fail. The list that it yields counts the calls."""
    original: Callable[..., Any] = getattr(target, name)
    count = [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            raise error
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, call)
        yield count


def one_block(family: str) -> nn.Module:
    model: Any = make_model(family)
    blocks = model.model.decoder if family == "opt" else model.model
    blocks.layers = blocks.layers[:1]
    return model  # type: ignore[no-any-return]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The whole state of a model: bits, classes, modes, hooks and attributes."""
    state: dict[str, Any] = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"{name} is"] = (type(module), id(module), module.training)
        state[f"{name} has"] = sorted(module.__dict__)
        state[f"{name} hooks"] = [
            len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks),
        ]  # fmt: skip
    return state


def assert_same(model: nn.Module, before: dict[str, Any], why: str) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys(), why
    for key, old in before.items():
        same = torch.equal(after[key], old) if isinstance(old, torch.Tensor) else after[key] == old
        assert same, f"{key}, {why}"


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "smooth": lambda m: smooth_lm(m, DATA, progress=False),
    "powers_of_two": lambda m: smooth_lm(
        m, DATA, config=SmoothQuantConfig(smooth_rounding="power_of_two"), progress=False
    ),
    "both": lambda m: smooth_and_quantize(
        m, DATA, SmoothQuantConfig(activation_scheme="static"), progress=False
    ),
}


@pytest.mark.parametrize("call", ["smooth", "powers_of_two", "both"])
@pytest.mark.parametrize("family", ["opt", "llama_gqa"])
def test_a_failure_in_any_module_call_leaves_the_model_unchanged(family: str, call: str) -> None:
    """User code, hooks and kernels can fail in any call of a module."""
    model = one_block(family)
    before = snapshot(model)
    with failing_at(0, nn.Module, "__call__", Stop()) as count:
        CALLS[call](copy.deepcopy(model))
    # A prime stride reaches each kind of step at many places.
    for i, step in enumerate([*range(1, count[0], 13), count[0]]):
        error = RuntimeError("out of memory") if i % 2 else Stop()
        with failing_at(step, nn.Module, "__call__", error):
            try:
                CALLS[call](model)
            except (Stop, RuntimeError, SmoothQuantError):
                assert_same(model, before, f"{type(error).__name__} at call {step}")
                continue
        # If a probe fails, a norm or a reader refuses to be probed, and the call may go on without it.
        assert isinstance(error, RuntimeError), f"call {step} was not reached"
        model = one_block(family)
        before = snapshot(model)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (Changes, "write"),
        (Changes, "scale"),
        (Changes, "attach_smooth"),
        (Changes, "replace_module"),
        (Changes, "set_attribute"),
        (W8A8Linear, "from_linear"),
        (changes_module, "_assign"),
        (torch, "equal"),
    ],
)
@pytest.mark.parametrize("rounding", ["none", "power_of_two"])
def test_an_interrupt_between_two_changes_leaves_the_model_unchanged(
    target: Any, name: str, rounding: str
) -> None:
    model = one_block("llama_gqa")
    before = snapshot(model)
    config = SmoothQuantConfig(smooth_rounding=rounding, only_where_better=False)
    reached = 0
    for step in (*range(1, 10), *range(10, 60, 7)):
        with failing_at(step, target, name, Stop()):
            try:
                smooth_and_quantize(model, DATA, config, progress=False)
            except Stop:
                reached += 1
                assert_same(model, before, f"{name} number {step}, {rounding}")
                continue
        break
    assert reached or (name, rounding) == ("write", "power_of_two")


def test_undoing_a_scaling_works_before_and_after_it() -> None:
    """Undoing an exact scaling divides. After an interrupt just before the scaling it must not divide."""
    old = torch.tensor([[0.0, 3.0, -5.0], [1.0, 0.0, 7.0]])
    for factor in (torch.tensor([1.0, 2.0, 0.25]), torch.tensor([1.5, 1.1, 0.7])):
        for scaled in (True, False):
            parameter = nn.Parameter(old.clone())
            changes = Changes()
            changes.scale(parameter, factor)
            assert not torch.equal(parameter, old)
            if not scaled:
                parameter.data.copy_(old)
            changes.back_to(0)
            assert torch.equal(parameter, old)


def test_changes_are_undone_in_reverse_order() -> None:
    linear = nn.Linear(4, 3)
    before = copy.deepcopy(linear.state_dict())
    set_pending_smooth(linear, torch.ones(4))
    changes = Changes()
    changes.scale(linear.weight, torch.full((4,), 3.0))
    middle, weight = changes.mark(), linear.weight.detach().clone()
    changes.scale(linear.weight.t(), torch.full((3,), 0.5))
    changes.attach_smooth(linear, torch.full((4,), 2.0))
    changes.write(linear.bias, torch.zeros(3))
    changes.back_to(middle)
    assert torch.equal(linear.weight, weight) and torch.equal(linear.bias, before["bias"])
    assert torch.equal(pending_smooth(linear), torch.ones(4))
    changes.back_to(0)
    assert torch.equal(linear.weight, before["weight"])


@pytest.mark.parametrize("first", [0.5, None])
def test_a_smoothed_model_is_refused_before_it_is_changed(first: float | None) -> None:
    model = make_model("llama")
    smooth_lm(model, DATA, alpha=first, progress=False)
    before = snapshot(model)
    with pytest.raises(SmoothQuantError, match=r"smoothed already \(\d+ of 14 layers\)"):
        smooth_lm(model, DATA, alpha=0.7, progress=False)
    with pytest.raises(SmoothQuantError, match="call quantize_model to go on"):
        smooth_and_quantize(model, DATA, progress=False)
    assert_same(model, before, "refused")
    quantize_model(model)  # as the message says


@pytest.mark.parametrize("part_first", [True, False])
def test_a_part_or_whole_of_a_smoothed_model_is_refused(part_first: bool) -> None:
    """Neither the whole nor the part knows the findings of the other call, so both calls are refused."""
    model: Any = make_model("llama")
    first, second = (model.model, model) if part_first else (model, model.model)
    config = SmoothQuantConfig(activation_scheme="static")
    smooth_lm(first, DATA, config=config, progress=False)
    before = snapshot(model)
    with pytest.raises(SmoothQuantError, match=r"smoothed already \(\d+ of 14 layers\)"):
        smooth_lm(second, DATA, progress=False)
    with pytest.raises(SmoothQuantError, match="the very model that smooth_lm was given"):
        quantize_model(second)
    assert_same(model, before, "refused")
    assert quantize_model(first).smoothquant_info["config"]["activation_scheme"] == "static"  # type: ignore[union-attr, index]


def test_int8_layers_are_not_smoothed_but_stay_listed() -> None:
    model = make_model("llama")
    quantize_model(model, config=SmoothQuantConfig(skip=("*.mlp.*",)))
    before = snapshot(model)
    with pytest.raises(SmoothQuantError, match=r"quantized already \(8 W8A8Linear\)"):
        smooth_lm(model, DATA, progress=False)
    assert_same(model, before, "refused")
    quantize_model(model, config=SmoothQuantConfig())  # continues with the other layers
    info: Any = model.smoothquant_info
    int8 = [n for n, m in model.named_modules() if isinstance(m, W8A8Linear)]
    assert len(int8) == 14 and {layer["name"] for layer in info["layers"]} == set(int8)
    assert [s["name"] for s in info["skipped"]] == ["lm_head"]


def _expanded(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach()[:1].expand(layer.weight.shape))


def _inference(layer: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight = nn.Parameter(layer.weight.clone())


@pytest.mark.parametrize("make", [_expanded, _inference])
@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm", "model.layers.0.mlp.up_proj"])
def test_a_parameter_that_cannot_be_written_is_not_folded(
    make: Callable[[nn.Module], None], name: str
) -> None:
    """Writing would fail halfway, and undoing would fail as well."""
    model: Any = make_model("llama")
    make(model.get_submodule(name))
    expected, before = logits(model, IDS), snapshot(model)
    config = SmoothQuantConfig(smooth_rounding="power_of_two", only_where_better=False)
    with failing_at(1, Changes, "replace_module", Stop()), pytest.raises(Stop):
        smooth_and_quantize(model, DATA, config, progress=False)
    assert_same(model, before, "stopped")
    smooth_lm(model, DATA, config=config, progress=False)
    assert torch.equal(logits(model, IDS), expected)
    reasons = [layer["reason"] for layer in model.smoothquant_info["layers"]]
    assert f"the weight of {name} is read-only" in reasons
    assert any(layer["smoothing"] == "folded" for layer in model.smoothquant_info["layers"])


def test_a_model_that_was_only_measured_can_be_smoothed() -> None:
    model = make_model("llama")
    expected = logits(model, IDS)
    smooth_lm(model, DATA, config=SmoothQuantConfig(smooth=False), progress=False)
    smooth_lm(model, DATA, progress=False)
    assert any(layer["smoothing"] != "none" for layer in model.smoothquant_info["layers"])
    torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-4, atol=1e-5)
    assert model_device(model).type == "cpu"
