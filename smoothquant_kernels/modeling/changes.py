"""Changing a model so that everything can be taken back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.modeling.view import module_places, put_module
from smoothquant_kernels.nn.float_linear import pending_smooth, set_pending_smooth


class Changes:
    """The changes made to a model so far. An exception of any kind in the `with` block takes all of them back.

    Memory: a copy of every parameter written, but for those whose new value gives the old one back exactly (scaled by a
    power of two, say): these cost nothing.
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
        """Takes back what was changed after the mark, the last change first."""
        while len(self._undo) > mark:
            self._undo[-1]()
            self._undo.pop()

    # Each entry is noted before the change and is harmless without it: an interrupt may fall between the two.

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Gives a parameter, or a view of one, new values."""
        old = parameter.data.clone()
        self._undo.append(lambda: _assign(parameter, old))
        _assign(parameter, value)

    def scale(self, parameter: Tensor, factor: Tensor) -> None:
        """Multiplies a parameter by factors that broadcast to it, in float32 at least, rounding once to its type."""
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
        """Leaves smoothing factors to the quantizer of a linear."""
        old = pending_smooth(linear)
        self._undo.append(lambda: set_pending_smooth(linear, old))
        set_pending_smooth(linear, smooth)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets a plain attribute."""
        had, old = name in module.__dict__, module.__dict__.get(name)
        self._undo.append(
            lambda: module.__dict__.update({name: old}) if had else module.__dict__.pop(name, None)
        )
        module.__dict__[name] = value

    def replace_module(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """Puts `new` in place of a module, under all its names."""
        old = model.get_submodule(name)
        places = module_places(model, old)
        self._undo.append(lambda: put_module(places, old))
        put_module(places, new)


def widened(t: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return t if t.dtype == torch.float64 else t.float()


def writable(t: Tensor) -> bool:
    """Whether a tensor takes new values in place: not one expanded over its memory, nor one of inference mode."""
    if t.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return all(stride or size < 2 for size, stride in zip(t.shape, t.stride(), strict=True))


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
