"""Hooks: their arguments, their effect, and their removal wherever the package adds some."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smoothquant_kernels
from smoothquant_kernels.cli.demo import _inputs
from smoothquant_kernels.modeling.batches import PositionCounter
from smoothquant_kernels.modeling.groups import Group, find_groups
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.report.measure import measure
from smoothquant_kernels.search.sensitivity import count_rows, record
from smoothquant_kernels.smoothing.calibrate import collect_statistics
from smoothquant_kernels.smoothing.padding import Padding
from tests.support.models import make_model, token_batches

PACKAGE = Path(smoothquant_kernels.__file__).parent
IDS = token_batches(1, length=12)[0]
TEXT = {"input_ids": IDS}
PADDED = {**TEXT, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)}


class Doubled(nn.Module):
    def forward(self, x: Tensor, extra: int = 0) -> Any:
        return (2 * x,) if extra == 1 else 2 * x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Doubled()

    def forward(self, x: Tensor, **named: Any) -> Any:
        return self.a(x=x, **named) if named else self.a(x)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


ONE = torch.ones(1)


@pytest.mark.parametrize("named", [{}, {"extra": 0}], ids=["by position", "by name"])
def test_an_input_is_observed_and_replaced(named: dict[str, int]) -> None:
    model = Net()
    seen: list[float] = []

    def change(x: Tensor) -> Tensor:
        seen.append(float(x))
        return x + 1

    with Hooks(model) as hooks:
        hooks.on_input("a", change)
        hooks.on_input(model.a, change)  # runs after the first hook, on its result
        assert float(model(ONE, **named)) == 6
        assert seen == [1, 2]
    assert float(model(ONE, **named)) == 2


def test_an_output_is_observed_and_replaced_if_it_is_a_tensor() -> None:
    model = Net()
    calls: list[tuple[float, float]] = []
    with Hooks(model) as hooks:
        hooks.on_output("a", lambda y: y + 1)
        hooks.on_call("a", lambda x, y: calls.append((float(x), float(y))))
        hooks.on_call(model.a, lambda x, y: x + y)
        assert float(model(ONE)) == 4
        assert float(model(ONE, extra=2)) == 4  # passes the input by name
        assert model(ONE, extra=1) == (2,)
    assert calls == [(1, 3), (1, 3)]
    assert hooks_of(model) == 0


def test_new_hooks_run_after_existing_ones() -> None:
    model = Net()
    handle = model.a.register_forward_pre_hook(lambda _, args: (args[0] + 10,))
    with Hooks(model) as hooks:
        hooks.on_input("a", lambda x: 2 * x)
        assert float(model(ONE)) == 44
    assert float(model(ONE)) == 22
    handle.remove()


def test_a_setup_that_fails_leaves_no_hook() -> None:
    model = Net()
    with pytest.raises(AttributeError, match="no_such"), Hooks(model) as hooks:
        hooks.on_input("a", lambda x: x)
        hooks.on_output("no_such", lambda y: y)
    assert hooks_of(model) == 0


class Stop(BaseException):
    """An interrupt."""


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "head" not in n}


def learn_padding(model: nn.Module) -> None:
    Padding(model, linears_of(model)).start(PADDED, lambda batch: model(**batch))


USERS: dict[str, Callable[[nn.Module], Any]] = {
    "calibration": lambda m: collect_statistics(m, linears_of(m), [TEXT], progress=False),
    "calibration of padding": lambda m: collect_statistics(
        m, linears_of(m), [PADDED], progress=False
    ),
    "padding": learn_padding,
    "positions": lambda m: PositionCounter(m)({"inputs": IDS}),
    "groups": lambda m: find_groups(ModelView(m), linears_of(m), TEXT),
    "sensitivity": lambda m: record(m, [Group((name,)) for name in linears_of(m)], [PADDED]),
    "rows": lambda m: count_rows(m, linears_of(m), [TEXT]),
    "report": lambda m: measure(m, dict.fromkeys(linears_of(m), ()), [PADDED]),
    "demo": lambda m: _inputs(m, TEXT, list(linears_of(m))),
}


@pytest.mark.parametrize("user", USERS)
def test_an_interrupt_while_hooks_are_added_leaves_none(
    user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    added = 0

    def stopped(add: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal added
            added += 1
            if added == 3:
                assert hooks_of(model) == 2, "the first two hooks must be registered"
                raise Stop
            return add(*args, **kwargs)

        return call

    for name in ("register_forward_hook", "register_forward_pre_hook"):
        monkeypatch.setattr(nn.Module, name, stopped(getattr(nn.Module, name)))
    with pytest.raises(Stop):
        USERS[user](model)
    assert hooks_of(model) == 0


def test_only_hooks_register_hooks() -> None:
    calls = {
        f"{path.relative_to(PACKAGE)}: {node.attr}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("register")
        and node.attr.endswith("_hook")
    }
    assert calls == {
        "modeling/hooks.py: register_forward_hook",
        "modeling/hooks.py: register_forward_pre_hook",
        "fusion/merged.py: register_load_state_dict_post_hook",  # runs in no forward pass
    }
