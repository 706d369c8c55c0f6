"""Forward hooks that are removed at the end of a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (value, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: value}


class Hooks:
    """Forward hooks that are removed at the end of a `with` block."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def on_input(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's input; what it returns, if anything, replaces the input."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = change(_first(args, kwargs))
            return None if new is None else _with_first(args, kwargs, new)

        module = self._model.get_submodule(name)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def on_output(self, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
        """Calls `change` with the module's output; what it returns, if anything, replaces the output."""

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else None

        self._handles.append(self._model.get_submodule(name).register_forward_hook(hook))
