"""Runs the repeated blocks of a model one at a time: finds them, proves that they form a chain, takes them out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.batches import explained
from smoothquant_kernels.modeling.hooks import first_argument, with_first
from smoothquant_kernels.modeling.run import Batch, output_tensor, run
from smoothquant_kernels.nn.float_linear import is_float_linear
from smoothquant_kernels.streaming.source import IN_MEMORY


def find_blocks(model: nn.Module) -> str:
    """Returns the name of the ModuleList with the most parameters of linears, the outer one if two are alike.

    Raises:
        SmoothQuantError: the model has no such list.
    """
    best, most = "", 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(
                p.numel()
                for m in module.modules()
                if is_float_linear(m)
                for p in m.parameters(recurse=False)
            )
            best, most = (name, count) if count > most else (best, most)
    if not most:
        raise SmoothQuantError(
            f"{type(model).__name__} has no list of blocks with linear layers: {IN_MEMORY}."
        )
    return best


class _Finished(Exception):
    """The requested block has run, so nothing after it is needed."""


class _Slot(nn.Module):
    """A placeholder for a block. It keeps the block's attributes (its kind of attention, ...)."""

    def __init__(self, chain: BlockChain, index: int, block: nn.Module) -> None:
        super().__init__()
        self._call = (chain, index, block)  # in a tuple, so that they do not become submodules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chain, index, _ = self._call
        return chain.visit(index, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_call"][2], name)


class _Visit(NamedTuple):
    """A call of a placeholder: the hidden states that it read and returned, and its other arguments."""

    block: int
    read: Tensor
    put_out: Tensor
    others: list[Any]


class BlockChain:
    """The blocks of a model, each of which reads the output of the previous one, and the rest of the model around them.

    Placeholders replace the blocks. Each returns its input, except the one whose turn it is. That one calls the block
    that was given for it. So the model itself computes the masks, the position embeddings and everything else that it
    passes to a block, each time they are needed.

    Attributes:
        names: the names of the blocks.
        empty: the original blocks, without weights.
        tuples: whether blocks return (hidden, ) instead of hidden.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.list_name = find_blocks(model)
        found = model.get_submodule(self.list_name)
        assert isinstance(found, nn.ModuleList)
        self._list = found
        self.empty = list(found)
        self.names = [f"{self.list_name}.{i}" for i in range(len(self.empty))]
        self._turn: tuple[int, Callable[..., Any], Tensor | None, bool] | None = None
        self._result: Any = None
        self._visits: list[_Visit] | None = None
        self.tuples = False
        for i, block in enumerate(self.empty):
            found[i] = _Slot(self, i, block)

    def restore(self) -> None:
        """Puts the blocks back, without weights."""
        for i, block in enumerate(self.empty):
            self._list[i] = block

    def copy_of(self, index: int) -> nn.Module:
        """Returns a copy of a block, to be filled with weights and changed."""
        return copy.deepcopy(self.empty[index])

    # --- running ---

    def visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward pass of a placeholder."""
        hidden = first_argument(args, kwargs)
        if not isinstance(hidden, Tensor):
            raise SmoothQuantError(
                f"{self.names[index]} is not given hidden states as its first argument: {IN_MEMORY}."
            )
        others = pytree.tree_leaves(with_first(args, kwargs, None))
        if self._turn is None or self._turn[0] != index:
            self._note(index, hidden, hidden, others)
            return (hidden,) if self.tuples else hidden
        _, block, given, stop = self._turn
        if given is not None:
            args, kwargs = with_first(args, kwargs, given.to(hidden.device))
        output = block(*args, **kwargs)
        result = self._hidden_of(output, index)
        self._note(index, hidden, result, others)
        if stop:
            self._result = result
            raise _Finished
        return output

    def _note(self, index: int, read: Tensor, put_out: Tensor, others: list[Any]) -> None:
        if self._visits is not None:
            self._visits.append(_Visit(index, read, put_out, others))

    def _hidden_of(self, output: Any, index: int) -> Tensor:
        """Returns a block's output, or the first item of a tuple. The model must not need the other items."""
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            raise SmoothQuantError(
                f"{self.names[index]} returns a {type(output).__name__} and not hidden states: {IN_MEMORY}."
            )
        self.tuples = isinstance(output, tuple)
        return first

    @contextmanager
    def _turn_of(
        self, index: int, block: Callable[..., Any], hidden: Tensor | None, *, stop: bool
    ) -> Iterator[None]:
        self._turn = (index, block, hidden, stop)
        try:
            yield
        finally:
            self._turn = self._result = None

    def step(self, index: int, block: nn.Module, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Returns the block's output [B, T, H] for `hidden`. None means what the model passes to the first block."""
        with self._turn_of(index, block, hidden, stop=True):
            try:
                run(self.model, batch, logits=False)
            except _Finished:
                return self._result  # type: ignore[no-any-return]
        raise SmoothQuantError(f"{self.names[index]} was not called: {IN_MEMORY}.")

    def finish(self, batch: Batch, hidden: Tensor, *, logits: bool = True) -> Tensor:
        """Returns the model's output for a given output of the last block."""
        last = len(self.names) - 1

        def given(*args: Any, **kwargs: Any) -> Any:
            return (hidden,) if self.tuples else hidden

        with self._turn_of(last, given, None, stop=False):
            return output_tensor(run(self.model, batch, logits=logits))

    def output_after(
        self, index: int, block: nn.Module, batch: Batch, hidden: Tensor | None
    ) -> Tensor:
        """Returns the output that the model would have if it ended after this block.

        It tells more than the block's own output, which a few massive activations can dominate.
        """
        with self._turn_of(index, block, hidden, stop=False):
            return output_tensor(run(self.model, batch))

    # --- proof ---

    def prove(self, first: nn.Module, batch: Batch) -> None:
        """Checks that the blocks form a chain.

        The model must call each block once, in order, on exactly the output of the previous block. The other arguments
        of a block must not depend on any block's output. `first` is the first block, with its weights.

        Raises:
            SmoothQuantError: they do not form a chain.
        """
        # This step sets `tuples`.
        explained(self.model, batch, lambda: self.step(0, first, batch, None))
        runs = []
        for factor in (1.0, 0.0):

            def block(*args: Any, factor: float = factor, **kwargs: Any) -> Any:
                hidden = first_argument(args, kwargs) * factor
                return (hidden,) if self.tuples else hidden

            self._visits = []
            try:
                with self._turn_of(0, block, None, stop=False):
                    run(self.model, batch)
                runs.append(self._visits)
            except (KeyError, AttributeError, IndexError, TypeError, RuntimeError) as error:
                raise SmoothQuantError(
                    f"the blocks {self.list_name} cannot be run one at a time ({str(error)[:200]}): {IN_MEMORY}."
                ) from error
            finally:
                self._visits = None
        for visits in runs:
            if [visit.block for visit in visits] != list(range(len(self.names))):
                raise SmoothQuantError(
                    f"the blocks {self.list_name} are not called once each, in order: {IN_MEMORY}."
                )
            for before, visit in itertools.pairwise(visits):
                if visit.read is not before.put_out:
                    raise SmoothQuantError(
                        f"{self.names[visit.block]} does not read the output of the block before it: {IN_MEMORY}."
                    )
        for one, two in zip(*runs, strict=True):
            if not _same_arguments(one.others, two.others):
                raise SmoothQuantError(
                    f"an argument of {self.names[one.block]} depends on other blocks: {IN_MEMORY}."
                )


def _same_arguments(one: list[Any], two: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b)

    return len(one) == len(two) and all(map(same, one, two))


class BlockView(nn.Module):
    """A block under its full name, so that patterns of layer names and `smoothquant_info` need no translation.

    Its forward returns the output that the model would have if it ended after the block.
    """

    takes_any_length = False  # only the hidden states of the sample are known

    def __init__(
        self, name: str, block: nn.Module, output: Callable[[Mapping[str, Tensor]], Tensor]
    ):
        super().__init__()
        parent: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, block)
        self._output = output

    def forward(self, **batch: Tensor) -> Tensor:
        return self._output(batch)
