"""Which linears select experts, tokens or queries. A rounding error there changes the choice, not just a result.

Selection is an operation, not a class or a name. An operation orders a linear's outputs (`topk`, `sort`, `argmax`),
rounds them to integers or compares them with a threshold, and the result serves as an index. Or it compares the outputs
with each other, or Python reads them. `Selectors` follows the outputs through a forward pass, below autograd:

* The output of a linear carries the linear's mark. So does everything computed from it without weights (activations,
  softmax, sums, products of activations), for `_STEPS` operations. A product with another weight ends the mark.
* An operation that orders marked numbers or compares them with a threshold returns *choices*: indices or truth values.
* A linear selects if an operation indexes with one of its choices or compares one of its outputs with another. A
  maximum used only as a value, an `argmax` that is only returned (the next token, for example) and a mask that only
  multiplies do not count.
* `tolist` and `numpy` take many numbers to where nothing can follow them, so they always count as a selection.

If the model cannot be run, only names are left: `router`, or as many outputs as a sibling module holds experts.
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
#: Operations called for their indices. If no operation reads the indices, Python does (`tolist`).
_INDICES = frozenset("aten.topk aten.argmax aten.argmin aten.multinomial".split())
#: Operations whose integer results show which of the marked numbers is larger.
_ORDER = frozenset(
    "topk sort argsort argmax argmin kthvalue multinomial mode bucketize searchsorted".split()
)
_ORDER_ALONG = frozenset({"max", "min", "median"})  # given a dimension, they also return indices
_THRESHOLD = frozenset("gt ge lt le eq ne".split())
#: Operations whose results rank other numbers, so that a comparison with the result selects.
_RANKED = frozenset({"amax", "amin", *_ORDER, *_ORDER_ALONG})
_INDEXING = frozenset(
    "index index_put index_put_ index_select index_add index_add_ index_copy index_copy_ gather take scatter scatter_ "
    "scatter_add scatter_add_ scatter_reduce scatter_reduce_ embedding nonzero masked_select take_along_dim bincount "
    "_local_scalar_dense sort argsort histc one_hot searchsorted repeat_interleave".split()
)
#: Operations that may index rows by a mask. Reading a single truth value is only a check of ranges.
_BY_MASK = frozenset("index index_put index_put_ nonzero masked_select".split())
#: Operations that read the values of their arguments rather than only index with them.
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
        # storage -> mark -> steps from the linear; for choices: the operation that chose, whether by a threshold
        self._marks: dict[int, dict[int, int]] = {}
        self._choices: dict[int, dict[int, tuple[str, bool]]] = {}
        # weak references, which keep the address of a freed storage from being reused
        self._known: dict[int, StorageWeakRef] = {}
        self._ranked: set[int] = set()

    def mark(self, t: Tensor, mark: int) -> None:
        """Gives `t`, the output of a linear, that linear's mark in place of all earlier ones."""
        self._remember(t)
        self._marks[storage_of(t)] = {mark: 0}
        self._choices.pop(storage_of(t), None)

    @contextmanager
    def python_reads(self) -> Iterator[None]:
        """Counts reads by Python as selections within the block.

        It patches `Tensor`, because `nn.TransformerEncoder` would take another path under a torch function mode.
        """

        def told(reader: str) -> Callable[..., Any]:
            read = getattr(Tensor, reader)

            def call(t: Tensor, *args: Any, **kwargs: Any) -> Any:
                for mark in self._marks.get(storage_of(t), {}) if t.numel() > 1 else ():
                    self.found.setdefault(mark, f"Tensor.{reader}")  # one number only checks ranges
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
        """Records linears whose indices no operation read and the model does not return. Python read those unseen."""
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
        if sources and sources <= self._weights:  # a weight in another dtype is still a weight
            for t in results:
                self._remember(t)
                self._weights.add(storage_of(t))
            return
        marks, choices = self._gather(read)
        if not marks and not choices:
            return
        if all(storage_of(t) in sources for t in results) and not name.endswith("_"):
            if name not in _INDEXING:  # a view shares its storage, which keeps its marks
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
        """Returns the marks, each one step further, and the choices of everything that an operation reads."""
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
        """How an operation's result chooses: True by a threshold, False by order, None if it does not."""
        if name in _ORDER or (name in _ORDER_ALONG and len(results) == 2):
            return False
        if name == "_to_copy" and results[0].dtype != torch.bool:  # rounded
            return False
        return True if name in _THRESHOLD or name == "_to_copy" else None

    def _compared(self, name: str, a: Tensor, b: Tensor) -> None:
        """Records comparisons of a linear's outputs with each other, which find the larger. `x != x` asks for NaN."""
        keys = storage_of(a), storage_of(b)
        if name in ("eq", "ne") and not self._ranked.intersection(keys):
            return
        for mark in self._marks.get(keys[0], {}).keys() & self._marks.get(keys[1], {}).keys():
            self.found.setdefault(mark, f"aten.{name}")

    def _confirm(self, name: str, read: list[Tensor]) -> None:
        """Records the choices that an operation indexes with. A mask as large as its target only edits numbers."""
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
    """Why a linear is a router, judged by its name and its siblings, or None."""
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
    """The number of experts that a module holds, as children or in 3-D parameters."""
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return len(experts)
    return next((p.shape[0] for p in experts.parameters(recurse=False) if p.dim() == 3), 0)
