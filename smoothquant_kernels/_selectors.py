"""Which linears select: experts, tokens, queries. A rounding error there does not perturb a result, it changes which.

Selection is an operation, not a class or a name: something orders a linear's outputs (`topk`, `sort`, `argmax`) or
compares them with a threshold, and what comes of it is used as an index. So the outputs of linears are followed
through a forward pass, below autograd:

* the output of a linear carries its mark, and so does all that is computed from it without weights: activations,
  softmax, sums, products of activations, for `_STEPS` operations. A product with another weight ends it;
* what orders marked numbers puts out *choices*: indices, or truth values;
* an operation that indexes with a choice tells on the linear. A maximum that is only a value, an `argmax` that is only
  returned (the next token, say) and a mask that only multiplies do not.

A model that cannot be run leaves the names: `router`, or as many outputs as the module beside it holds experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from smoothquant_kernels._readers import storage_of, tensors_of
from smoothquant_kernels.modules import tensors_in

_STEPS = 16  # DeepSeek V3.2's indexer: 12 from its projections to its topk
#: Operations that are there for their indices: read by Python (`tolist`) if nothing else reads them.
_INDICES = frozenset("aten.topk aten.argmax aten.argmin aten.multinomial".split())
#: Operations whose integer results say which of the marked numbers is the larger.
_ORDER = frozenset("topk sort argsort argmax argmin kthvalue multinomial mode".split())
_ORDER_ALONG = frozenset({"max", "min", "median"})  # with a dimension they return indices, too
_THRESHOLD = frozenset("gt ge lt le".split())
_INDEXING = frozenset(
    "index index_put index_put_ index_select index_add index_add_ index_copy index_copy_ gather take scatter scatter_ "
    "scatter_add scatter_add_ scatter_reduce scatter_reduce_ embedding nonzero masked_select take_along_dim bincount "
    "_local_scalar_dense sort argsort histc one_hot searchsorted".split()
)
#: A mask may index rows; a single truth value that is looked at is a check of ranges.
_BY_MASK = frozenset("index index_put index_put_ nonzero masked_select".split())


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

    def mark(self, t: Tensor, mark: int) -> None:
        """`t` is the output of the linear with this mark, and of nothing before it."""
        self._remember(t)
        self._marks[storage_of(t)] = {mark: 0}
        self._choices.pop(storage_of(t), None)

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
        if choices and name in _INDEXING:
            self._confirm(name, read)
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
        return True if name in _THRESHOLD else None

    def _confirm(self, name: str, read: list[Tensor]) -> None:
        """An operation indexes with choices. A mask as large as what it indexes only edits numbers."""
        rank = max(t.dim() for t in read)
        for t in read:
            for mark, (chooser, threshold) in self._choices.get(storage_of(t), {}).items():
                rows = name == "nonzero" or t.dim() < rank
                if not threshold or (name in _BY_MASK and rows):
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
