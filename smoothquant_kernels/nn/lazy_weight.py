"""The float weight that outside code sees on a quantized layer: type and shape at once, values only when read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.ops.rotate import rotated

#: The operations that add a bias to a product. The layer's own bias is float32, whatever the type of its weight.
_WITH_BIAS = ("addmm", "linear")
#: These return a copy or a view, depending on the arguments. They count as copies.
_PERHAPS_VIEWS = ("to", "contiguous", "reshape", "flatten", "type_as")


class LazyWeight(Tensor):
    """A read-only float tensor. Every operation that reads it computes its values again.

    Model code asks a linear's weight for its type, device or shape before it calls the layer
    (`x.to(self.proj.weight.dtype)`). That costs a few microseconds here. Some code multiplies by the weight itself.
    That is correct but slow. Views (`weight.t()`, `weight[:8]`, `weight.data`) are read-only and lazy, too.

    Args:
        values: computes the tensor; called by every operation that reads it.
        shape, dtype, device: those of the tensor that `values` returns.
        stride, offset: those of a view; None and 0 for a contiguous tensor.

    Raises:
        SmoothQuantError: an operation would write to it. No memory could hold the written values.

    Equivalent to:
        values()
    """

    # transformers initializes the weights of new layers that lack this mark
    _is_hf_initialized = True

    _values: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        values: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        stride: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> LazyWeight:
        view: dict[str, Any] = {}
        if stride is not None:
            view = {"strides": stride, "storage_offset": offset}
        made: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=device, **view
        )
        made._values = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        name = func._schema.name.partition("::")[2]
        if _is_view(func, name):
            return _view(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(LazyWeight, lambda t: t._values(), (args, kwargs))
        if name in _WITH_BIAS:
            args = _bias_like_weight(name, args)
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self._values())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self._values().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._values().clone().__reduce_ex__(protocol)

    def numpy(self, **options: Any) -> Any:
        """A copy of the values."""
        return self._values().numpy(**options)

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self._values().tolist()

    def data_ptr(self) -> int:
        """Raises SmoothQuantError, because there is no memory to point to."""
        raise SmoothQuantError(
            "the weight of a quantized layer is int8 and has no address as a float tensor: call the layer, use "
            "layer.dequantized_weight(), or skip the layer when quantizing."
        )

    @property
    def data(self) -> Tensor:
        """The same weight without a gradient."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _read_only("an assignment to .data")

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:  # nn.Parameter(layer.weight) sets it
        raise _read_only("an optimizer or a tied layer")

    def requires_grad_(self, requires_grad: bool = True) -> LazyWeight:
        """Does nothing for False; raises SmoothQuantError for True."""
        if requires_grad:
            raise _read_only("an optimizer")
        return self


def _read_only(writer: str) -> SmoothQuantError:
    return SmoothQuantError(
        f"{writer} would write to the weight of a quantized layer, which is int8: change the float model and quantize "
        "it again, or skip this layer when quantizing."
    )


def _refuse_writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for i, argument in enumerate(func._schema.arguments):
        written = argument.alias_info is not None and argument.alias_info.is_write
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if written and any(isinstance(leaf, LazyWeight) for leaf in pytree.tree_leaves(value)):
            raise _read_only(func._schema.name)


def _is_view(func: Any, name: str) -> bool:
    """Whether the result shares memory with an argument."""
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases) and name not in _PERHAPS_VIEWS


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The view or views of a lazy weight. They are lazy too, so that writes to them are refused."""
    first = next(
        leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, LazyWeight)
    )

    def on_meta(t: LazyWeight) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    def part(i: int) -> Tensor:
        read_args, read_kwargs = pytree.tree_map_only(
            LazyWeight, lambda t: t._values(), (args, kwargs)
        )
        found: Tensor = pytree.tree_leaves(func(*read_args, **read_kwargs))[i]
        return found

    meta_args, meta_kwargs = pytree.tree_map_only(LazyWeight, on_meta, (args, kwargs))
    likes, structure = pytree.tree_flatten(func(*meta_args, **meta_kwargs))
    views = [
        LazyWeight(
            partial(part, i),
            like.shape,
            first.dtype,
            first.device,
            like.stride(),
            int(like.storage_offset()),
        )
        for i, like in enumerate(likes)
    ]
    return pytree.tree_unflatten(views, structure)


def _bias_like_weight(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with a float32 bias converted to the type of the product."""
    at, product = (2, args[0]) if name == "linear" else (0, args[1])
    bias = args[at] if at < len(args) else None
    if isinstance(bias, Tensor) and bias.dtype == torch.float32:
        return (*args[:at], bias.to(product.dtype), *args[at + 1 :])
    return args


def dequantized_weight(
    w_q: Tensor, w_scale: Tensor, inv_smooth: Tensor | None, rotation: int = 0
) -> Tensor:
    """[N, K] float32: the weight without rotation and smoothing, from w_q [N, K], w_scale [N] or [1] and 1 / s [K]."""
    w = rotated(w_q.float() * (w_scale[:, None] if w_scale.shape[0] > 1 else w_scale), rotation)
    return w if inv_smooth is None else w * inv_smooth
