"""Which rows of each layer's input are padding: learned from the model, not guessed from the number of rows.

A mask says which positions of one stream are padding: the text, the decoder's text or an image's patches. A layer reads
the positions of a mask if its input gets one position shorter when the stream does. So the first batch with padding
runs twice, once without one position, and the shapes that every linear reads are compared. The axis that changes is the
one of positions. An input that does not change, or changes by another amount (the other tower's text, patches, the rows
that a router gives to an expert, sound at another rate), does not belong to the mask. All of its rows are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.batches import (
    special_tokens,
    stream_shape,
    take_positions,
    take_rows,
)
from smoothquant_kernels.modeling.hooks import Hooks
from smoothquant_kernels.modeling.run import Batch, output_tensor, token_mask

OUTPUT = ""  # names the model's output; it is also the name of the whole model
_SUFFIX = "attention_mask"
_Shapes = dict[str, list[tuple[int, ...]]]


class Padding:
    """Finds padding in the inputs of `linears`, batch by batch.

    Args:
        model: the model. Its configuration names tokens that stand for images.
        linears: the layers whose inputs `keep` is called for.
        whole: modules that read the tokens before any routing; `keep` is called for their inputs, too.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Module],
        whole: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self._model, self._whole = model, whole or {}
        self._linears = {**linears, **self._whole}
        self._masks: dict[str, Tensor] = {}
        # mask -> layer -> the order of its rows: "bt" (rows of the batch first) or "tb" (positions first)
        self._orders: dict[str, dict[str, str]] = {}

    def start(self, batch: Batch, run: Callable[[Batch], Any]) -> None:
        """Sets the batch that runs next. Calls `run`, which runs the model, only for the first batch with padding."""
        self._masks = _padded_masks(batch)
        for name in self._masks:
            if name not in self._orders:
                found = self._learn(name, batch, run)
                if found is not None:
                    self._orders[name] = found

    def keep(self, name: str, t: Tensor) -> Tensor | None:
        """[rows] bool, False at padding, for a tensor [..., K] that the layer reads or writes. None keeps all rows."""
        lead = tuple(t.shape[:-1])
        for mask_name, mask in self._masks.items():
            order = self._orders.get(mask_name, {}).get(name)
            rows, length = mask.shape
            if order == "bt" and lead in ((rows, length), (rows * length,)):
                return mask.reshape(-1).to(t.device)
            if order == "tb" and lead == (length, rows):
                return mask.t().reshape(-1).to(t.device)
        return None

    def _learn(
        self, mask_name: str, batch: Batch, run: Callable[[Batch], Any]
    ) -> dict[str, str] | None:
        """The row order of every layer that reads this mask's positions, or None if the batch cannot show it."""
        stream = mask_name.removesuffix(_SUFFIX)
        mask = self._masks[mask_name]
        worst = mask.sum(1).argsort()[:2].sort().values.tolist()
        part = take_rows(batch, worst, self._model) if len(worst) == 2 else batch
        part = batch if part is None else part
        part_mask = token_mask(part, mask_name)
        shape = stream_shape(stream, part)
        if part_mask is None or shape != tuple(part_mask.shape) or shape[1] < 2:
            return None
        column = _removable(part, stream, part_mask, special_tokens(self._model))
        index = torch.tensor([i for i in range(shape[1]) if i != column])
        shorter = take_positions(part, stream, index, self._model)
        try:
            with torch.no_grad():
                one, two = self._shapes(part, run), self._shapes(shorter, run)
        except torch.OutOfMemoryError:
            raise
        except (SmoothQuantError, LookupError, RuntimeError, TypeError, ValueError):
            return {}  # the model takes only one length
        orders = {n: _order(one[n], two.get(n, []), *shape) for n in one}
        # Flattened rows keep the order of the tensors that they came from, unknown once any layer has "tb".
        if "tb" in orders.values():
            orders = {n: order for n, order in orders.items() if order != "flat"}
        # A router's experts take rows in their own order, even when one of them gets all rows.
        routed = {n for n in orders if "expert" in n and "shared" not in n} - self._whole.keys()
        orders = {n: o for n, o in orders.items() if not (o == "flat" and n in routed)}
        return {n: "bt" if o == "flat" else o for n, o in orders.items() if o is not None}

    def _shapes(self, batch: Batch, run: Callable[[Batch], Any]) -> _Shapes:
        """layer -> the shapes, without the last dimension, that it reads at each call. `OUTPUT` has the output's."""
        found: _Shapes = {}

        def note(name: str, x: Tensor) -> None:
            found.setdefault(name, []).append(tuple(x.shape[:-1]))

        with Hooks(self._model) as hooks:
            for name, module in self._linears.items():
                hooks.on_input(module, partial(note, name))
            output = run(batch)
        try:
            found[OUTPUT] = [tuple(output_tensor(output).shape[:-1])]
        except SmoothQuantError:
            pass
        return found


def _padded_masks(batch: Batch) -> dict[str, Tensor]:
    """The masks of a batch that mark any padding, by name."""
    names = [name for name in batch if name.endswith(_SUFFIX)]
    masks = {n: m for n in names if (m := token_mask(batch, n)) is not None}
    return {n: m for n, m in masks.items() if not bool(m.all())}


def _removable(batch: Batch, stream: str, mask: Tensor, special: set[int]) -> int:
    """A position that the model can run without: one that is padding in all rows, or else holds no special token."""
    columns = torch.arange(mask.shape[1])
    empty = ~mask.any(0).cpu()
    if bool(empty.any()):
        return int(columns[empty][-1])
    ids = batch.get(f"{stream}input_ids")
    if ids is None or ids.shape != mask.shape:
        return mask.shape[1] - 1
    marks = torch.tensor(sorted(special), device=ids.device)
    plain = ~(torch.isin(ids, marks) & mask.to(ids.device)).any(0).cpu()
    return int(columns[plain][-1]) if bool(plain.any()) else mask.shape[1] - 1


def _order(
    one: list[tuple[int, ...]], two: list[tuple[int, ...]], rows: int, length: int
) -> str | None:
    """How a layer's rows follow the positions, if they do so in the same way in all of its calls, else None."""
    orders = {
        (rows, length): ((rows, length - 1), "bt"),
        (rows * length,): ((rows * (length - 1),), "flat"),
    }
    if rows != length:  # if equal, both orders have one shape, and the axis that changes decides
        orders[(length, rows)] = ((length - 1, rows), "tb")
    found = set()
    if len(one) != len(two):
        return None
    for before, after in zip(one, two, strict=True):
        expected, order = orders.get(before, (None, None))
        if rows == length and (before, after) == ((length, rows), (length - 1, rows)):
            expected, order = after, "tb"
        found.add(order if after == expected else None)
    return found.pop() if len(found) == 1 else None
