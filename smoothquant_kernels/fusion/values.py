"""Values that a fused op computes together with their reader, and that are tensors for every other operation.

`optimize_for_inference` makes norms, activation functions and linears return these objects. They travel through the
model's own forward code. A quantized linear that receives one calls one op for the producer, the quantization and the
GEMM. Any other operation gets the tensor that the model would have computed without the optimization, and the value's
site counts it (`Site.spills`).

They are no tensors, so that making one costs a fraction of a microsecond, and `torch.compile` traces through them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smoothquant_kernels import ops

#: Names of torch functions and methods -> kinds of `act_quantize`.
_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu": "gelu"}
_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
_SUMS = ("add", "__add__", "__radd__")


class Site:
    """A place of the model that makes such values: a norm, an activation or a linear.

    Attributes:
        name: the module's name.
        spills: what other operations read the values -> how often. Not counted inside `torch.compile`.
        uses: while the model is being examined, how the values were read; else None.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.spills: Counter[str] = Counter()
        self.uses: set[str] | None = None

    def use(self, how: str) -> None:
        """Notes how a value was read, while the model is being examined."""
        if self.uses is not None:
            self.uses.add(how)


class Deferred:
    """A float value [..., K] that is not computed yet. See the module."""

    #: The tensor, once another operation has asked for it.
    _computed: Tensor | None = None

    @property
    def site(self) -> Site:
        """Where the value was made."""
        raise NotImplementedError

    @property
    def source(self) -> Any:
        """What the value is made of: a tensor, or another value."""
        raise NotImplementedError

    # Computed when asked for, because most values are made and read without.

    @property
    def shape(self) -> torch.Size:
        shape: torch.Size = self.source.shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.source.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.source.device
        return device

    def compute(self) -> Tensor:
        """The tensor that the model without fusion has here."""
        raise NotImplementedError

    def linear(self, w_q: Tensor, w_scale: Tensor, **rest: Any) -> Tensor:
        """[..., N]: the value times an int8 weight; `rest` are further arguments of `ops.linear_s8`."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """`compute`, once."""
        if self._computed is None:
            self._computed = self.compute()
        return self._computed

    def spill(self, reader: str) -> Tensor:
        """The tensor, for an operation that cannot use the value as it is."""
        if not torch.compiler.is_compiling():
            self.site.spills[reader] += 1
        return self.tensor()

    # What model code asks without computing.

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def contiguous(self) -> Any:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself for its own type and device, else the converted tensor."""
        if not kwargs and all(a == self.dtype or a == self.device for a in args):
            return self
        return self.spill("to").to(*args, **kwargs)

    def view(self, *shape: Any) -> Any:
        return self._reshaped("view", shape)

    def reshape(self, *shape: Any) -> Any:
        return self._reshaped("reshape", shape)

    def _reshaped(self, name: str, shape: tuple[Any, ...]) -> Any:
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        new = self.with_rows(shape) if shape and shape[-1] == self.shape[-1] else None
        return getattr(self.spill(name), name)(*shape) if new is None else new

    def with_rows(self, shape: tuple[int, ...]) -> Deferred | None:
        """The same value in another shape with the same last dimension, or None if it must be computed for that."""
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.spill(name), name)

    # Python looks up operators on the class, so each that model code uses is defined here.

    def __mul__(self, other: Any) -> Any:
        return self.times(other)

    def __rmul__(self, other: Any) -> Any:
        return self.times(other)

    def __add__(self, other: Any) -> Any:
        return self.plus(other)

    def __radd__(self, other: Any) -> Any:
        return self.plus(other)

    def __sub__(self, other: Any) -> Any:
        return self.spill("sub") - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.spill("sub")

    def __truediv__(self, other: Any) -> Any:
        return self.spill("div") / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.spill("div")

    def __pow__(self, other: Any) -> Any:
        return self.spill("pow") ** other

    def __neg__(self) -> Any:
        return -self.spill("neg")

    def __matmul__(self, other: Any) -> Any:
        return self.spill("matmul") @ other

    def __rmatmul__(self, other: Any) -> Any:
        return other @ self.spill("matmul")

    def __getitem__(self, index: Any) -> Any:
        return self.spill("an index")[index]

    def __iter__(self) -> Any:
        return iter(self.spill("an iteration"))

    def __bool__(self) -> bool:
        return bool(self.spill("bool"))

    def __float__(self) -> float:
        return float(self.spill("float"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    def times(self, other: Any) -> Any:
        """The product with another value."""
        return self.spill("mul") * other

    def plus(self, other: Any) -> Any:
        """The sum with another value."""
        return self.spill("add") + other

    def activated(self, kind: str, original: Callable[[Tensor], Tensor]) -> Any:
        """An activation function of the value; `original` computes it on a tensor."""
        return original(self.spill(kind))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in _SUMS and len(args) == 2 and not kwargs:
            return first.plus(args[1]) if isinstance(first, Deferred) else args[1].plus(first)
        if name == "dropout" and isinstance(first, Deferred) and not _drops(args, kwargs):
            return first
        if name in _PRODUCTS and len(args) == 2 and not kwargs:
            return first.times(args[1]) if isinstance(first, Deferred) else args[1].times(first)
        if name in _ACTIVATIONS and isinstance(first, Deferred) and (kind := _kind(name, kwargs)):
            return first.activated(kind, lambda t: func(t, *args[1:], **kwargs))
        args, kwargs = pytree.tree_map_only(Deferred, lambda d: d.spill(name), (args, kwargs))
        return func(*args, **kwargs)


def differentiable(*tensors: Any) -> bool:
    """Whether autograd records operations on these tensors. The fused ops have no gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of `torch.nn.functional.dropout` or `torch.dropout` drops anything."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p != 0


def _kind(name: str, kwargs: dict[str, Any]) -> str:
    """The kind of a call of an activation function; empty for options that `act_quantize` does not have."""
    if name != "gelu":
        return _ACTIVATIONS[name]
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(kwargs.get("approximate", "none"), "")


class NormValue(Deferred):
    """What a norm makes of x.

    Attributes:
        outputs: a group of merged linears -> what they make of this value, computed by the first that reads it.
    """

    def __init__(self, norm: Any, x: Tensor) -> None:
        self.norm = norm
        self.x = x
        self.outputs: dict[Any, tuple[Tensor, ...]] = {}

    @property
    def site(self) -> Site:
        site: Site = self.norm.site
        return site

    @property
    def source(self) -> Any:
        return self.x

    def compute(self) -> Tensor:
        y: Tensor = self.norm.original(self.x)
        return y

    def with_rows(self, shape: tuple[int, ...]) -> Deferred | None:
        self.site.use("norm")
        return NormValue(self.norm, self.x.reshape(shape))

    def linear(self, w_q: Tensor, w_scale: Tensor, **rest: Any) -> Tensor:
        norm = self.norm
        norm.site.use("linear")
        return ops.fused_linear_s8(self.x, norm.kind, w_q, w_scale, **norm.parameters(), **rest)

    def quantized(self, **rest: Any) -> tuple[Tensor, Tensor]:
        """(x_q, x_scale) of the value; `rest` are further arguments of `ops.quantize`."""
        norm = self.norm
        norm.site.use("linear")
        rest |= norm.parameters()
        weight, bias, eps = rest.pop("norm_weight"), rest.pop("norm_bias", None), rest.pop("eps")
        if norm.kind == "rms_norm":
            x_q, x_scale = ops.rms_norm_quantize(self.x, weight, eps, **rest)
        else:
            x_q, x_scale = ops.layer_norm_quantize(self.x, weight, bias, eps, **rest)
        return x_q, x_scale


class LinearValue(Deferred):
    """What a quantized linear makes of its input: it waits for the residual to add, or an activation to come."""

    def __init__(self, fused: Any, x: Any) -> None:
        self.fused = fused
        self.x = x

    @property
    def site(self) -> Site:
        site: Site = self.fused.site
        return site

    @property
    def source(self) -> Any:
        return self.x

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.fused.layer.out_features))

    def compute(self) -> Tensor:
        y: Tensor = self.fused.run(self.x)
        return y

    def with_rows(self, shape: tuple[int, ...]) -> Deferred | None:
        rows = (*shape[:-1], self.x.shape[-1])
        if isinstance(self.x, Deferred) or self._computed is not None:
            return None
        return LinearValue(self.fused, self.x.reshape(rows))

    def linear(self, w_q: Tensor, w_scale: Tensor, **rest: Any) -> Tensor:
        return ops.linear_s8(self.spill("linear"), w_q, w_scale, **rest)

    def plus(self, other: Any) -> Any:
        if isinstance(other, LinearValue):
            other.site.use("sum")
            other = other.tensor()
        elif isinstance(other, Deferred):
            other = other.spill("add")
        x, n = self.x, self.fused.layer.out_features
        # The shape as a tuple, because to make a torch.Size takes longer.
        fits = (
            isinstance(other, Tensor)
            and other.dtype == x.dtype
            and other.shape == (*x.shape[:-1], n)
            and self._computed is None
        )
        if not fits:
            return self.spill("add") + other
        if other.requires_grad and torch.is_grad_enabled():
            return self.tensor() + other
        self.fused.site.use("residual")
        return self.fused.run(x, other)

    def times(self, other: Any) -> Any:
        if isinstance(other, ActivatedValue):
            return other.times(self)
        return self.spill("mul") * other

    def activated(self, kind: str, original: Callable[[Tensor], Tensor]) -> Any:
        self.site.use("function")
        return ActivatedValue(self.site, kind, self, original)


class ActivatedValue(Deferred):
    """An activation function of a linear's output, or its product with another one (gate and up)."""

    def __init__(
        self,
        site: Site,
        kind: str,
        source: Any,
        original: Callable[[Tensor], Tensor],
        up: Any = None,
    ) -> None:
        self._site = site
        self.kind = kind
        self.gate = source
        self.original = original
        self.up = up

    @property
    def site(self) -> Site:
        return self._site

    @property
    def source(self) -> Any:
        return self.gate

    def compute(self) -> Tensor:
        y = self.original(_tensor(self.gate))
        return y if self.up is None else y * _tensor(self.up)

    def with_rows(self, shape: tuple[int, ...]) -> Deferred | None:
        parts = [t if t is None else _tensor(t).reshape(shape) for t in (self.gate, self.up)]
        return ActivatedValue(self._site, self.kind, parts[0], self.original, parts[1])

    def times(self, other: Any) -> Any:
        fits = (
            isinstance(other, (Tensor, LinearValue))
            and self.up is None
            and other.shape == self.shape
            and other.dtype == self.dtype
            and self._computed is None
        )
        if not fits:
            return self.spill("mul") * other
        if differentiable(other):
            return self.tensor() * other
        if isinstance(other, LinearValue):
            other.site.use("gated")
        return ActivatedValue(self._site, self.kind, self.gate, self.original, other)

    def linear(self, w_q: Tensor, w_scale: Tensor, **rest: Any) -> Tensor:
        self._site.use("linear")
        if type(self.gate) is LinearValue and "scale" in rest:
            y = self._in_int8(w_q, w_scale, rest)
            if y is not None:
                return y
        gate = _tensor(self.gate)
        if self.up is None:
            return ops.fused_linear_s8(gate, self.kind, w_q, w_scale, **rest)
        return ops.fused_linear_s8(_tensor(self.up), self.kind, w_q, w_scale, gate=gate, **rest)

    def _in_int8(self, w_q: Tensor, w_scale: Tensor, rest: dict[str, Any]) -> Tensor | None:
        """`linear` where the GEMM before can quantize the value by this one's static scale; None where it cannot."""
        gate, group = self.gate, self.gate.fused.group
        if gate._computed is not None or "rotation" in rest:
            return None
        rest = dict(rest)
        scale, inv_smooth = rest.pop("scale"), rest.pop("inv_smooth", None)
        rest.pop("granularity", None)
        if self.up is None and self.kind == "relu" and inv_smooth is None and group.is_single:
            quantized = group.relu_quantized(gate.x, scale)
        elif type(self.up) is LinearValue and self.up.x is gate.x and self.up._computed is None:
            if group.gated_indices != (gate.fused.index, self.up.fused.index):
                return None
            quantized = group.gated_quantized(gate.x, self.kind, scale, inv_smooth)
        else:
            return None
        y_q, y_scale = quantized
        return ops.gemm_s8(y_q, w_q, y_scale, w_scale, **rest, out_dtype=self.dtype)


def _tensor(value: Any) -> Tensor:
    """The value of an operand that a fused op reads as a tensor. Not a spill."""
    t: Tensor = value.tensor() if isinstance(value, Deferred) else value
    return t
