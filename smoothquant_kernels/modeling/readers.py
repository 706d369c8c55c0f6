"""Who reads a module's output: every operation of a forward pass is seen, not only what changes its result.

A producer may take 1 / s in if nothing but its group's linears notices. Comparing the model's output cannot show that
alone: a reader may have no effect on the sample (a weight of zero, an expert that another outvotes, an output that
is not compared). So each operation is looked at instead, below autograd, where PyTorch has nothing hidden left:

* the producer's output carries a mark, and so does every view of it (marks belong to storages);
* an operation that scales with its input, channel by channel, hands the mark on (`_SCALES`);
* the group's linears take it off; they are given s;
* any other operation that reads a marked tensor refuses the producer, and so does a marked output of the model, or an
  operation outside a module that reads its parameters.

Kernels that are given raw addresses from Python are not seen; the comparison of outputs remains for those.
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

#: What operators raise that refuse to run under a dispatch mode (flex attention).
UNWATCHED = (RuntimeError, NotImplementedError, TypeError)

#: Operations f with f(c x) = c f(x) for c > 0 in each channel: name -> the arguments that x may be. Only copies, ReLU
#: and products: a clamp, say, is exact for the sample's small values and wrong for larger ones.
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
# every fused attention: linear in the values, its third argument
_ATTENTION = "_scaled_dot_product_"
_VALUES = (2,)


def storage_of(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class Readers(TorchDispatchMode):
    """Follows marked tensors through everything that runs within the `with` block.

    Attributes:
        refused: mark -> the first thing that must not have read it.
        inside: marks that the running linear takes off.
        running: the running module, among those whose parameters are watched.
    """

    def __init__(self, parameters: Mapping[nn.Module, int]) -> None:
        """`parameters`: modules and the marks that are refused if an operation outside reads their parameters."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.refused: dict[int, str] = {}
        self.inside = 0
        self.running: nn.Module | None = None
        # storage -> marks (a sum of powers of two); kept alive, so that no other tensor comes to lie there
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
        """What the model returns is read by its caller."""
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
        """The marks of one argument; checks that parameters are read by their own modules."""
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
    """Marks that stand in one of `places` and nowhere else: x * x is not proportional to x."""
    once = repeated = 0
    for m in read:
        repeated |= once & m
        once |= m
    allowed = _union(m for i, m in enumerate(read) if i in places)
    elsewhere = _union(m for i, m in enumerate(read) if i not in places)
    return allowed & ~elsewhere & ~repeated


def readable(error: BaseException) -> str:
    """The first line of an error, for a reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


@contextmanager
def overridden(attributes: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Gives modules attributes of their own, by name and value; at the end they have again what they had."""
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

    Without hooks: some modules look for hooks below them and run another way where there are any
    (`nn.TransformerEncoderLayer`).
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
