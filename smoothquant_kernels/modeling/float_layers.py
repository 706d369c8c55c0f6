"""Which linears stay in float because of how the model uses them.

Either other code reads their weight, or they select, or code asks for something that a quantized layer lacks: a
module's first parameter (`next(self.mlp.parameters()).dtype`) or a method.

There are three sources, from the most to the least reliable: a run of the model (`readers.py`, `selectors.py`), the
source of its classes (`source_reads.py`), and names. The source is consulted only about layers that the run did not
call. Another path may still read the weight of a layer that was called, but a quantized layer answers that in float.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.modeling.readers import UNWATCHED, Readers, overridden, watched
from smoothquant_kernels.modeling.record import Reason
from smoothquant_kernels.modeling.run import Batch, evaluating, run
from smoothquant_kernels.modeling.sample_inputs import repeated
from smoothquant_kernels.modeling.selectors import Selectors, selects_by_name
from smoothquant_kernels.modeling.source_reads import read_in_source
from smoothquant_kernels.modeling.view import ModelView
from smoothquant_kernels.nn.float_linear import weight_of
from smoothquant_kernels.nn.kinds import KINDS


@dataclass
class _Seen:
    """What one run showed about the watched linears."""

    called: set[str] = field(default_factory=set)
    read: dict[str, str] = field(default_factory=dict)
    selects: dict[str, str] = field(default_factory=dict)
    uses: dict[str, str] = field(default_factory=dict)  # full reasons


def stays_in_float(
    view: ModelView, linears: Iterable[str], batch: Batch | None, *, part: bool = False
) -> dict[str, str]:
    """Returns name -> reason for linears that must be neither quantized nor scaled, whatever they look like.

    Args:
        linears: names to check.
        batch: a small batch, as for `find_groups`; None if the model cannot be run.
        part: whether the linears are only a part of those of a model.

    Raises:
        SmoothQuantError: no linear is left to quantize, unless this is only a part of the model.
    """
    model = view.model
    names = {model.get_submodule(name): name for name in linears}
    seen = _watch(view, names, batch) if batch is not None else _Seen()
    if batch is not None and (longer := repeated(model, batch)) is not None:
        with contextlib.suppress(Exception):  # it may be longer than the model allows
            also = _watch(view, names, longer)
            seen.read, seen.selects = also.read | seen.read, also.selects | seen.selects
            seen.uses = also.uses | seen.uses
    found = {name: Reason.READ(op) for name, op in seen.read.items()}
    found = seen.uses | found
    for reader, layer in read_in_source(model):
        name = names.get(layer, "")
        if name and name not in seen.called:
            found.setdefault(name, Reason.READ(type(reader).__name__))
    for module, name in names.items():
        by_name = selects_by_name(model, name, weight_of(module).shape[0])
        why = f"{seen.selects[name]} reads its output" if name in seen.selects else by_name
        if why is not None:
            found.setdefault(name, Reason.SELECTS(why))
    if names and len(found) == len(names) and not part:
        name, reason = next(iter(found.items()))
        raise SmoothQuantError(
            f"no linear layer to quantize in {type(model).__name__}: all {len(found)} must stay in float "
            f"({name}: {reason})."
        )
    return found


def _watch(view: ModelView, names: dict[nn.Module, str], batch: Batch) -> _Seen:
    """Runs the model once and watches every operation. Reports nothing if an operator cannot be watched."""
    model = view.model
    marks = {name: 1 << i for i, name in enumerate(names.values())}
    owners = {module: marks[name] for module, name in names.items()}
    # An embedding that is tied to an output head stays in float, so it may read the weight.
    tied = _sharers(view, view.int8_heads).values()
    readers = Readers(owners | {module: 0 for module in tied if module not in owners})
    selectors = Selectors(model)
    # reads by a module that shares a linear's parameter are reads of its own
    modules = {name: module for module, name in names.items()} | _sharers(view, names.values())
    seen = _Seen()
    running: list[nn.Module | None] = []

    def enter(name: str) -> None:
        running.append(readers.running)
        readers.running = modules[name]

    def leave(name: str, output: Any) -> None:
        readers.running = running.pop()
        if name in marks:
            seen.called.add(name)
            if isinstance(output, Tensor):
                selectors.mark(output, marks[name])

    try:
        with (
            evaluating(model),
            _asking(model) as asking,
            _using(names) as uses,
            watched(modules, enter, leave),
            selectors,
            selectors.python_reads(),
            readers,
        ):
            output = run(model, batch)
        selectors.finish(output)
    except UNWATCHED:
        return _Seen()
    for name, mark in marks.items():
        if (reason := readers.refused.get(mark)) is not None:
            seen.read[name] = reason.partition(" ")[0]
        if (chooser := selectors.found.get(mark)) is not None:
            seen.selects[name] = chooser
    seen.uses = uses | _first_parameters(asking, names, view)
    return seen


@contextmanager
def _asking(model: nn.Module) -> Iterator[dict[nn.Module, None]]:
    """Collects the modules whose parameters are listed while the model runs."""
    found: dict[nn.Module, None] = {}
    running = False

    def enter(_: str) -> None:
        nonlocal running
        running = True

    def leave(*_: Any) -> None:
        nonlocal running
        running = False

    def noted(module: nn.Module, list_them: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if running:
                found[module] = None
            return list_them(*args, **kwargs)

        return call

    lists = ((m, "named_parameters", noted(m, m.named_parameters)) for m in model.modules())
    with overridden(lists), watched({"": model}, enter, leave):
        yield found


def _first_parameters(
    asking: Iterable[nn.Module], names: Mapping[nn.Module, str], view: ModelView
) -> dict[str, str]:
    """Linears that hold a module's first parameter, unless its first one outside the linears has the same dtype."""
    tied = _sharers(view, view.int8_heads).values()
    kept = {p for module in tied for p in module.parameters(recurse=False)}
    owners = {
        p: name
        for module, name in names.items()
        for p in module.parameters(recurse=False)
        if p not in kept
    }
    found: dict[str, str] = {}
    for module in asking:
        parameters = list(module.parameters())
        name = owners.get(parameters[0]) if parameters else None
        left = next((p for p in parameters if p not in owners), None)
        if name is not None and (left is None or left.dtype != parameters[0].dtype):
            found[name] = Reason.ASKS(type(module).__name__)
    return found


@contextmanager
def _using(names: Mapping[nn.Module, str]) -> Iterator[dict[str, str]]:
    """Collects linears that are called with more than an input, or through methods of their class, and the reason."""
    found: dict[str, str] = {}
    running: list[nn.Module] = []

    def forward(module: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            if more := [
                *("a second argument" for _ in args[1:]),
                *(k for k in kwargs if args or k != "input"),
            ]:
                found[names[module]] = Reason.USED(f"it is called with {more[0]}")
            running.append(module)
            try:
                return own(*args, **kwargs)
            finally:
                running.pop()

        return call

    def method(module: nn.Module, name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            if module not in running:  # inside its own forward, only the result matters
                found[names[module]] = Reason.USED(f"the model calls its {name}")
            return own(*args, **kwargs)

        return call

    methods = (
        (m, name, method(m, name, getattr(m, name)))
        for m in names
        for name in _own_methods(type(m))
        if name not in vars(m)
    )
    forwards = ((m, "forward", forward(m, m.forward)) for m in names)
    with overridden(itertools.chain(methods, forwards)):
        yield found


def _own_methods(kind: type) -> tuple[str, ...]:
    """Methods of a subclass of `nn.Linear` that some kind of quantized layer lacks."""
    return tuple(
        name
        for base in kind.__mro__[: kind.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        if inspect.isfunction(value)
        and not name.startswith("__")
        and not all(hasattr(other.layer, name) for other in KINDS if other.is_linear)
    )


def _sharers(view: ModelView, linears: Iterable[str]) -> dict[str, nn.Module]:
    """Other modules that also own a parameter of one of the linears."""
    linears = set(linears)
    others = {
        other.rpartition(".")[0]
        for parameter, group in view.shared.items()
        if parameter.rpartition(".")[0] in linears
        for other in group
    }
    return {name: view.model.get_submodule(name) for name in others - linears}
