"""Forward hooks that a `with` block removes, however it ends. The package registers all its hooks here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by name; None without arguments."""
    return args[0] if args else next(iter(kwargs.values()), None)


def with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with `value` in place of the first."""
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})


class Hooks:
    """Forward hooks that last for a `with` block, on modules or on names of modules in `model`.

    A module calls these hooks in the order of their addition, after those that it already has.
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
        """Calls `change` with the module's input. A result other than None replaces the input."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = change(first_argument(args, kwargs))
            return None if new is None else with_first(args, kwargs, new)

        module = self._module(where)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_arguments(
        self, where: nn.Module | str, note: Callable[[tuple[Any, ...], dict[str, Any]], None]
    ) -> None:
        """Calls `note` with all arguments of each call of the module."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(args, kwargs)

        module = self._module(where)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, where: nn.Module | str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's output. A result other than None replaces the output.

        Ignores an output that is not a tensor.
        """

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else None

        self._handles.append(self._module(where).register_forward_hook(hook))

    def on_call(
        self, where: nn.Module | str, change: Callable[[Tensor, Tensor], Tensor | None]
    ) -> None:
        """Does the same as `on_output`, but calls `change` with the module's input and output."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            x = first_argument(args, kwargs)
            return change(x, output) if isinstance(output, Tensor) else None

        self._handles.append(self._module(where).register_forward_hook(hook, with_kwargs=True))
