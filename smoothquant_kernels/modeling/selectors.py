"""Which linears select: experts, tokens, queries. A rounding error there does not perturb a result, it changes which.

Selection is an operation, not a class or a name: something orders a linear's outputs (`topk`, `sort`, `argmax`), makes
integers of them, or compares them with a threshold, and what comes of it is used as an index; or it compares them with
each other; or Python reads them. So the outputs of linears are followed through a forward pass, below autograd:

* the output of a linear carries its mark, and so does all that is computed from it without weights: activations,
  softmax, sums, products of activations, for `_STEPS` operations. A product with another weight ends it;
* what orders marked numbers puts out *choices*: indices, or truth values;
* an operation that indexes with a choice tells on the linear, and so does a comparison of one output with another. A
  maximum that is only a value, an `argmax` that is only returned (the next token, say) and a mask that only multiplies
  do not;
* `tolist` and `numpy` take many numbers to where nothing can be followed: whatever they are for, they choose.

A model that cannot be run leaves the names: `router`, or as many outputs as the module beside it holds experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from smoothquant_kernels.modeling.readers import storage_of, tensors_of
from smoothquant_kernels.modeling.run import tensors_in

_STEPS = 16  # DeepSeek V3.2's indexer: 12 from its projections to its topk
#: Operations that are there for their indices: read by Python (`tolist`) if nothing else reads them.
_INDICES = frozenset("aten.topk aten.argmax aten.argmin aten.multinomial".split())
#: Operations whose integer results say which of the marked numbers is the larger.
_ORDER = frozenset(
    "topk sort argsort argmax argmin kthvalue multinomial mode bucketize searchsorted".split()
)
_ORDER_ALONG = frozenset({"max", "min", "median"})  # with a dimension they return indices, too
_THRESHOLD = frozenset("gt ge lt le eq ne".split())
#: Numbers that stand for the order of others: one of them is compared with those.
_RANKED = frozenset({"amax", "amin", *_ORDER, *_ORDER_ALONG})
_INDEXING = frozenset(
    "index index_put index_put_ index_select index_add index_add_ index_copy index_copy_ gather take scatter scatter_ "
    "scatter_add scatter_add_ scatter_reduce scatter_reduce_ embedding nonzero masked_select take_along_dim bincount "
    "_local_scalar_dense sort argsort histc one_hot searchsorted repeat_interleave".split()
)
#: A mask may index rows; a single truth value that is looked at is a check of ranges.
_BY_MASK = frozenset("index index_put index_put_ nonzero masked_select".split())
#: Operations that look at the values of what they are given, not only where it points to.
_BY_VALUE = frozenset(
    "_local_scalar_dense nonzero masked_select sort argsort histc bincount".split()
)
_ROWS_BY_MASK = frozenset("where masked_fill masked_fill_".split())
_PYTHON = ("tolist", "numpy")


class Selectors(TorchDispatchMode):
    """Follows the outputs of linears until something selects by them.

    Attributes:
        found: mark -> the operation that ordered the linear's outputs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, str] = {}
        self._weights = {storage_of(p) for p in model.parameters() if p.dim() > 1}
        # storage -> mark -> steps from the linear; and for choices mark -> what chose, whether by a threshold
        self._marks: dict[int, dict[int, int]] = {}
        self._choices: dict[int, dict[int, tuple[str, bool]]] = {}
        # they keep the address of a freed storage from being given to another
        self._known: dict[int, StorageWeakRef] = {}
        self._ranked: set[int] = set()

    def mark(self, t: Tensor, mark: int) -> None:
        """`t` is the output of the linear with this mark, and of nothing before it."""
        self._remember(t)
        self._marks[storage_of(t)] = {mark: 0}
        self._choices.pop(storage_of(t), None)

    @contextmanager
    def python_reads(self) -> Iterator[None]:
        """Within it, reads by Python tell on linears as well.

        Not a mode for torch's functions, under which `nn.TransformerEncoder` would take another path.
        """

        def told(reader: str) -> Callable[..., Any]:
            read = getattr(Tensor, reader)

            def call(t: Tensor, *args: Any, **kwargs: Any) -> Any:
                for mark in self._marks.get(storage_of(t), {}) if t.numel() > 1 else ():
                    self.found.setdefault(mark, f"Tensor.{reader}")  # one number: a check of ranges
                return read(t, *args, **kwargs)

            return call

        own = {reader: vars(Tensor).get(reader) for reader in _PYTHON}
        try:
            for reader in _PYTHON:
                setattr(Tensor, reader, told(reader))
            yield
        finally:
            for reader, before in own.items():
                if before is None:  # of the base class
                    delattr(Tensor, reader)
                else:
                    setattr(Tensor, reader, before)

    def finish(self, output: Any) -> None:
        """Indices that no operation read and that the model does not return were read by Python, unseen."""
        returned: set[int] = set()
        for t in tensors_in(output):
            returned |= self._choices.get(storage_of(t), {}).keys()
        for choices in self._choices.values():
            for mark, (chooser, _) in choices.items():
                if chooser in _INDICES and mark not in returned:
                    self.found.setdefault(mark, chooser)

    def _remember(self, t: Tensor) -> None:
        self._known.setdefault(storage_of(t), StorageWeakRef(t.untyped_storage()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [t for arg in (*args, *kwargs.values()) for t in tensors_of(arg)]
        self._follow(func._schema.name.partition("::")[2], read, tensors_of(result))
        return result

    def _follow(self, name: str, read: list[Tensor], results: list[Tensor]) -> None:
        sources = {storage_of(t) for t in read}
        if sources and sources <= self._weights:  # a weight in another type is one still
            for t in results:
                self._remember(t)
                self._weights.add(storage_of(t))
            return
        marks, choices = self._gather(read)
        if not marks and not choices:
            return
        if all(storage_of(t) in sources for t in results) and not name.endswith("_"):
            if name not in _INDEXING:  # views
                return
        if choices and (name in _INDEXING or name in _ROWS_BY_MASK):
            self._confirm(name, read)
        if marks and name in _THRESHOLD and len(read) == 2:
            self._compared(name, *read)
        if marks and name == "nonzero":
            for mark in self._gather(t for t in read if t.is_floating_point())[0]:
                self.found.setdefault(mark, f"aten.{name}")
        kind = self._chooses(name, results)
        for t in results:
            self._remember(t)
            key = storage_of(t)
            if not t.is_floating_point():
                new = dict(choices)
                if kind is not None:
                    new |= dict.fromkeys(marks, (f"aten.{name}", kind))
                self._choices[key] = self._choices.get(key, {}) | new
            elif marks and not self._weights & sources:
                self._marks[key] = self._marks.get(key, {}) | marks
                if name in _RANKED:
                    self._ranked.add(key)

    def _gather(self, read: Iterable[Tensor]) -> tuple[dict[int, int], dict[int, tuple[str, bool]]]:
        """Marks, each a step further, and choices of all that an operation reads."""
        marks: dict[int, int] = {}
        choices: dict[int, tuple[str, bool]] = {}
        for t in read:
            for mark, steps in self._marks.get(storage_of(t), {}).items():
                if steps < _STEPS:
                    marks[mark] = min(steps + 1, marks.get(mark, _STEPS))
            choices |= self._choices.get(storage_of(t), {})
        return marks, choices

    @staticmethod
    def _chooses(name: str, results: list[Tensor]) -> bool | None:
        """Whether an operation's result is a choice: True by a threshold, False by order, None if it is none."""
        if name in _ORDER or (name in _ORDER_ALONG and len(results) == 2):
            return False
        if name == "_to_copy" and results[0].dtype != torch.bool:  # rounded
            return False
        return True if name in _THRESHOLD or name == "_to_copy" else None

    def _compared(self, name: str, a: Tensor, b: Tensor) -> None:
        """Outputs of one linear against each other: which is the larger. `x != x` asks for NaN."""
        keys = storage_of(a), storage_of(b)
        if name in ("eq", "ne") and not self._ranked.intersection(keys):
            return
        for mark in self._marks.get(keys[0], {}).keys() & self._marks.get(keys[1], {}).keys():
            self.found.setdefault(mark, f"aten.{name}")

    def _confirm(self, name: str, read: list[Tensor]) -> None:
        """An operation indexes with choices. A mask as large as what it indexes only edits numbers."""
        rank = max(t.dim() for t in read)
        width = max((t.shape[-1] for t in read if t.dim()), default=0)
        for t in read:
            rows = name == "nonzero" or t.dim() < rank
            if name in _ROWS_BY_MASK:
                chosen = t.dtype == torch.bool and t.dim() > 0 and t.shape[-1] == 1 < width
            else:
                chosen = name in _BY_MASK and rows
                chosen |= t.dtype != torch.bool and t.dim() > 0 and name not in _BY_VALUE
            for mark, (chooser, threshold) in self._choices.get(storage_of(t), {}).items():
                if chosen or (not threshold and name in _INDEXING):
                    self.found.setdefault(mark, chooser)


def selects_by_name(model: nn.Module, name: str, out_features: int) -> str | None:
    """Why a linear is a router by its place in the model, or None."""
    parts = name.lower().split(".")
    if any(part.split("_")[-1] == "router" or part.startswith("router") for part in parts):
        return "its name says that it is a router"
    parent, _, own = name.rpartition(".")
    if "expert" in own.lower() or out_features < 2:
        return None
    for sibling, module in model.get_submodule(parent).named_children():
        if "expert" in sibling.lower() and out_features == _count(module):
            return f"it has as many outputs as {sibling} has experts"
    return None


def _count(experts: nn.Module) -> int:
    """How many experts a module holds: as its children, or in 3-D parameters."""
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return len(experts)
    return next((p.shape[0] for p in experts.parameters(recurse=False) if p.dim() == 3), 0)
