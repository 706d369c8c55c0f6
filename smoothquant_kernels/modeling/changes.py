"""Changes a model so that everything can be undone, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.nn.float_linear import pending_smooth, set_pending_smooth


class Changes:
    """The changes made to a model so far. Any exception in the `with` block undoes all of them.

    Memory: a copy of every parameter written. A parameter whose new value gives the old one back exactly (scaled by a
    power of two, for example) costs nothing.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.back_to(0)

    def mark(self) -> int:
        """A point that `back_to` can return to."""
        return len(self._undo)

    def back_to(self, mark: int) -> None:
        """Undoes all changes since the mark, the last one first."""
        while len(self._undo) > mark:
            self._undo[-1]()
            self._undo.pop()

    # An interrupt may fall between an undo entry and its change, so the entry comes first and is harmless without it.

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Gives a parameter, or a view of one, new values."""
        old = parameter.data.clone()
        self._undo.append(lambda: _assign(parameter, old))
        _assign(parameter, value)

    def scale(self, parameter: Tensor, factor: Tensor) -> None:
        """Multiplies a parameter by factors that broadcast to it, in float32 or wider, and rounds once to its type."""
        old = parameter.data
        new = (widened(old) * factor).to(old.dtype)
        if not torch.equal((widened(new) / factor).to(old.dtype), old):
            self.write(parameter, new)
            return
        place = _first_difference(new, old)
        if place is not None:
            value = old[place].clone()

            def divide() -> None:
                now = parameter.data
                if not torch.equal(now[place], value):
                    _assign(parameter, (widened(now) / factor).to(now.dtype))

            self._undo.append(divide)
            _assign(parameter, new)

    def attach_smooth(self, linear: nn.Module, smooth: Tensor) -> None:
        """Leaves smoothing factors on a linear, for its quantizer."""
        old = pending_smooth(linear)
        self._undo.append(lambda: set_pending_smooth(linear, old))
        set_pending_smooth(linear, smooth)

    def set_attribute(self, module: Any, name: str, value: Any) -> None:
        """Sets a plain attribute of a module or of another object."""
        had, old = name in module.__dict__, module.__dict__.get(name)
        self._undo.append(
            lambda: module.__dict__.update({name: old}) if had else module.__dict__.pop(name, None)
        )
        module.__dict__[name] = value

    def keep_modules(self, model: nn.Module) -> None:
        """Remembers the modules of a model, with all their attributes; not what is in their tensors."""
        kept = [(m, {k: _copied(v) for k, v in vars(m).items()}) for m in model.modules()]

        def restore() -> None:
            for module, attributes in kept:
                module.__dict__.clear()
                module.__dict__.update(attributes)

        self._undo.append(restore)

    def replace_module(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """Replaces a module with `new`, under all its names."""
        old = model.get_submodule(name)
        places = module_places(model, old)
        self._undo.append(lambda: put_module(places, old))
        put_module(places, new)


def widened(t: Tensor) -> Tensor:
    """`t` in float32, or unchanged if it is float64."""
    return t if t.dtype == torch.float64 else t.float()


def writable(t: Tensor) -> bool:
    """Whether a tensor can be written in place: no elements share memory, and inference mode does not forbid it."""
    if t.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return all(stride or size < 2 for size, stride in zip(t.shape, t.stride(), strict=True))


def _copied(value: Any) -> Any:
    """A copy of a dict, such as that of a module's buffers; anything else itself."""
    return copy.copy(value) if isinstance(value, dict) else value


def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value)


def _first_difference(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    different = a != b
    if not bool(different.any()):
        return None
    index = int(different.reshape(-1).int().argmax())
    place = []
    for size in reversed(a.shape):
        index, rest = divmod(index, size)
        place.append(rest)
    return tuple(reversed(place))


def module_places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place of a module in a model, as (parent, attribute). A module may have several names."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
    parts = [name.rpartition(".") for name in names]
    return [(model.get_submodule(parent), child) for parent, _, child in parts]


def put_module(places: Iterable[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Puts a module into each of the places."""
    for parent, child in places:
        setattr(parent, child, module)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replaces the module `name` with `new`, under all names that the module has."""
    put_module(module_places(model, model.get_submodule(name)), new)
