"""Forward hooks that a `with` block removes, however it ends: the one place where the package registers any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called on, by position or by name; None if it is called on nothing."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, `value` in place of the first."""
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})


class Hooks:
    """Forward hooks on modules, given as such or by their names in `model`, for the time of a `with` block.

    A module's hooks are called in the order in which they were added, after those that it has already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _module(self, where: nn.Module | str) -> nn.Module:
        return self._model.get_submodule(where) if isinstance(where, str) else where

    def on_input(self, where: nn.Module | str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's input; what it returns, if anything, replaces the input."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = change(first_argument(args, kwargs))
            return None if new is None else with_first(args, kwargs, new)

        module = self._module(where)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, where: nn.Module | str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's output; what it returns, if anything, replaces the output.

        An output that is no tensor is left alone.
        """

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else None

        self._handles.append(self._module(where).register_forward_hook(hook))

    def on_call(
        self, where: nn.Module | str, change: Callable[[Tensor, Tensor], Tensor | None]
    ) -> None:
        """As `on_output`; `change` is called with the module's input and its output."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = first_argument(args, kwargs)
            return change(x, output) if isinstance(output, Tensor) else None

        self._handles.append(self._module(where).register_forward_hook(hook, with_kwargs=True))
