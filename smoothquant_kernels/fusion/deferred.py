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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from smoothquant_kernels.errors import SmoothQuantError

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
    _versions: Sequence[tuple[Tensor, int]] = ()

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
            self.check_sources()
            self._computed = self.compute()
        return self._computed

    def watch_sources(self, *sources: Any) -> None:
        """While the model is being examined, notes the versions of the tensors that the value will be computed from."""
        if self.site.uses is not None:
            tensors = [t for t in sources if isinstance(t, Tensor) and not t.is_inference()]
            self._versions = [(t, t._version) for t in tensors]

    def check_sources(self) -> None:
        """Counts a spill if one of these tensors was changed in place: too late to compute the value from it."""
        if self._versions and any(t._version != version for t, version in self._versions):
            self.site.spills["after a change in place, something"] += 1

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

    def contiguous(self, **options: Any) -> Any:
        return self.spill("contiguous").contiguous(**options) if options else self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself for its own type and device, else the converted tensor."""
        if not kwargs and all(a == self.dtype or a == self.device for a in args):
            return self
        return self.spill("to").to(*args, **kwargs)

    def view(self, *shape: Any) -> Any:
        return self._reshaped("view", shape)

    def reshape(self, *shape: Any, **options: Any) -> Any:
        return self._reshaped("reshape", options.get("shape", shape))

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

    def __rpow__(self, other: Any) -> Any:
        return other ** self.spill("pow")

    def __floordiv__(self, other: Any) -> Any:
        return self.spill("floordiv") // other

    def __mod__(self, other: Any) -> Any:
        return self.spill("mod") % other

    def __abs__(self) -> Any:
        return abs(self.spill("abs"))

    def __lt__(self, other: Any) -> Any:
        return self.spill("lt") < other

    def __le__(self, other: Any) -> Any:
        return self.spill("le") <= other

    def __gt__(self, other: Any) -> Any:
        return self.spill("gt") > other

    def __ge__(self, other: Any) -> Any:
        return self.spill("ge") >= other

    def __eq__(self, other: Any) -> Any:
        return self.spill("eq") == other

    def __ne__(self, other: Any) -> Any:
        return self.spill("ne") != other

    __hash__ = object.__hash__

    def __setitem__(self, index: Any, value: Any) -> None:
        self.spill("an assignment")[index] = value

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
        if func is torch.Tensor.matmul and torch.compiler.is_compiling():
            raise SmoothQuantError(
                "a value that waits is an operand of @, and torch.compile does not say on which side: optimize with a "
                "sample that takes this path, or write torch.matmul."
            )
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
