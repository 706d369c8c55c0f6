"""Finds everything that reads a module's output, by watching every operation of a forward pass.

A producer may absorb 1 / s if only its group's linears notice. A comparison of the model's outputs cannot prove this
alone, because a reader may have no effect on the sample (a weight of zero, an expert that another one outvotes, an
output that is not compared). So `Readers` watches each operation below autograd, where PyTorch hides none:

* The producer's output carries a mark, and so does every view of it (marks belong to storages).
* An operation that scales with its input, channel by channel, passes the mark on (`_SCALES`).
* The group's linears remove the mark, because they receive s.
* Any other operation that reads a marked tensor refuses the producer. So does a marked output of the model, and so does
  an operation that reads the parameters of a watched module from outside.

Kernels that Python calls with raw addresses stay invisible. Only the comparison of outputs covers them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from smoothquant_kernels.modeling.run import tensors_in

#: Raised by operators that refuse to run under a dispatch mode (flex attention).
UNWATCHED = (RuntimeError, NotImplementedError, TypeError)

#: Operations f with f(c x) = c f(x) for c > 0 in each channel: name -> positions of the arguments that may be x.
#: Only copies, ReLU and products. A clamp, say, is exact for the sample's small values but wrong for larger ones.
_SCALES: dict[str, tuple[int, ...]] = {
    "clone": (0,),
    "_to_copy": (0,),
    "copy_": (1,),
    "repeat": (0,),
    "relu": (0,),
    "relu_": (0,),
    "leaky_relu": (0,),
    "mul": (0, 1),
    "mul_": (0, 1),
    "div": (0,),
    "bmm": (1,),  # probabilities [T, T] times values [T, channels]
    "mm": (1,),
}
# Every fused attention is linear in the values, its third argument.
_ATTENTION = "_scaled_dot_product_"
_VALUES = (2,)


def storage_of(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Readers(TorchDispatchMode):
    """Follows marked tensors through all operations of a `with` block.

    Attributes:
        refused: mark -> why it was refused first.
        inside: marks that the running linear removes.
        running: the module that is running, if its parameters are watched.
    """

    def __init__(self, parameters: Mapping[nn.Module, int]) -> None:
        """`parameters`: modules, each with the marks to refuse if an operation outside it reads its parameters."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.refused: dict[int, str] = {}
        self.inside = 0
        self.running: nn.Module | None = None
        # storage -> marks (a sum of powers of two). `_kept` keeps the storages alive, so that no address is used twice.
        self._marks: dict[int, int] = {}
        self._kept: list[UntypedStorage] = []
        self._owners: dict[int, list[tuple[nn.Module, int]]] = {}
        for module, marks in parameters.items():
            for p in module.parameters(recurse=False):
                self._owners.setdefault(storage_of(p), []).append((module, marks))

    def mark(self, t: Tensor, mark: int) -> None:
        """Starts to follow `t` and its views."""
        key = storage_of(t)
        if key not in self._marks:
            self._kept.append(t.untyped_storage())
        self._marks[key] = self._marks.get(key, 0) | mark

    def refuse(self, marks: int, reason: str) -> None:
        while marks:
            lowest = marks & -marks
            self.refused.setdefault(lowest, reason)
            marks ^= lowest

    def refuse_output(self, output: Any) -> None:
        """Refuses the marks in the model's output, because the caller reads it."""
        for t in tensors_in(output):
            self.refuse(self._marks.get(storage_of(t), 0), "the model returns it")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._follow(func, [*args, *kwargs.values()], tensors_of(result))
        return result

    def _follow(self, func: Any, args: list[Any], results: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2]
        read = [self._read(name, tensors_of(arg)) for arg in args]
        marks = _union(read)
        sources = {storage_of(t) for arg in args for t in tensors_of(arg)} if marks else set()
        is_view = not func._schema.is_mutable and all(storage_of(t) in sources for t in results)
        if not marks or (is_view and results):
            return  # a view shares its storage, which keeps its marks
        carried = _carried(_VALUES if name.startswith(_ATTENTION) else _SCALES.get(name, ()), read)
        self.refuse(marks & ~carried, f"aten.{name} reads it")
        for t in results if carried else []:
            self.mark(t, carried)

    def _read(self, name: str, tensors: Iterable[Tensor]) -> int:
        """Returns the marks of one argument. Refuses marks if a parameter is read outside its own module."""
        marks = 0
        for t in tensors:
            key = storage_of(t)
            marks |= self._marks.get(key, 0)
            owners = self._owners.get(key, ())
            if all(owner is not self.running for owner, _ in owners):
                for owner, watched in owners:
                    kind = type(owner).__name__
                    self.refuse(
                        watched, f"aten.{name} reads the parameters of a {kind} from outside"
                    )
        return marks & ~self.inside


def _union(marks: Iterable[int]) -> int:
    result = 0
    for m in marks:
        result |= m
    return result


def _carried(places: tuple[int, ...], read: list[int]) -> int:
    """Marks that occur exactly once, in one of `places`, because x * x is not proportional to x."""
    once = repeated = 0
    for m in read:
        repeated |= once & m
        once |= m
    allowed = _union(m for i, m in enumerate(read) if i in places)
    elsewhere = _union(m for i, m in enumerate(read) if i not in places)
    return allowed & ~elsewhere & ~repeated


def readable(error: BaseException) -> str:
    """The first line of an error message, short enough for a reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


@contextmanager
def overridden(attributes: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Sets attributes on module instances, as (module, name, value), and restores the old ones at the end."""
    with contextlib.ExitStack() as stack:
        for module, name, value in attributes:
            own = module.__dict__
            had = {name: own[name]} if name in own else {}
            stack.callback(own.update, had)
            stack.callback(own.pop, name, None)
            own[name] = value
        yield


@contextmanager
def watched(
    modules: Mapping[str, nn.Module],
    enter: Callable[[str], None],
    leave: Callable[[str, Any], None],
) -> Iterator[None]:
    """Calls `enter(name)` before and `leave(name, output)` after every call of each module's `forward`.

    It uses no hooks, because some modules (`nn.TransformerEncoderLayer`) take another path if a submodule has any.
    """

    def wrapped(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            enter(name)
            output = forward(*args, **kwargs)
            leave(name, output)
            return output

        return call

    with overridden((m, "forward", wrapped(name, m.forward)) for name, m in modules.items()):
        yield
