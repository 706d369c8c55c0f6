"""`SQK_TUNE_CACHE`: tiles that `benchmarks.tuner --cache` measured on a user's GPU replace the shipped rules.

All tiles give the same bits, so a choice affects speed only. Without the variable no file is read. With it the file is
read once, when the CUDA library is loaded. The library gets it when torch starts CUDA. Asking the GPUs earlier would
keep the process from forking workers. A wrong file causes one warning, and the shipped rules stay.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from smoothquant_kernels._kernels import Library, Table

VARIABLE = "SQK_TUNE_CACHE"
#: The layout of the file.
FORMAT = 1
_MAKE = "write a new one on this machine: python -m benchmarks.tuner --cache FILE"


#: n, k, m, the tile's name, splits.
_Row = tuple[int, int, int, str, int]


class _Unusable(Exception):
    """The file cannot be used: what is wrong with it and what to do."""


@dataclass(frozen=True)
class TuneCache:
    """The state of the measured choices.

    Attributes:
        state: one line for people, also shown by `doctor`.
        in_use: plans for GPUs named `gpu` follow the file.
        path, gpu, choices: the file, the GPU it was measured on, and the number of problems it covers.
    """

    state: str
    in_use: bool = False
    path: str = ""
    gpu: str = ""
    choices: int = 0


_current = TuneCache(f"none: {VARIABLE} is not set")


def tune_cache() -> TuneCache:
    """Whether measured choices are in use, and why not."""
    return _current


def load(open_library: Callable[[], Library]) -> None:
    """Reads the file that SQK_TUNE_CACHE names, for a CUDA library that was just loaded. Never raises.

    Args:
        open_library: returns what describes the library, or raises ImportError. Not called without the variable.
    """
    global _current
    path = os.environ.get(VARIABLE, "")
    if not path:
        return
    try:
        data = _read(Path(path))
        library = open_library()
        rows = _rows(data, library.gemm_tables())
    except _Unusable as error:
        _refuse(path, str(error))
        return
    except ImportError as error:
        _refuse(path, f"the CUDA library cannot take it ({error}); build it again")
        return
    _current = TuneCache(
        f"{path}, of {data['gpu']}: waits until CUDA is started",
        path=path,
        gpu=data["gpu"],
        choices=len(rows),
    )
    _when_cuda_starts(lambda: _install(library, data, rows))


def _when_cuda_starts(function: Callable[[], None]) -> None:
    # torch.cuda delays its own questions to the GPUs the same way. It calls at once if CUDA runs already.
    lazy: Callable[[Callable[[], None]], None] | None = getattr(torch.cuda, "_lazy_call", None)
    if lazy is not None:
        lazy(function)
    elif torch.cuda.is_available():
        function()


def _refuse(path: str, why: str) -> None:
    global _current
    _current = TuneCache(f"not in use: {path}: {why}", path=path)
    warnings.warn(
        f"{VARIABLE}={path} is not used, and GEMMs go by the shipped rules: {why}. Or unset {VARIABLE}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _read(path: Path) -> dict[str, Any]:
    """The content of the file. The types of its members are checked."""
    try:
        data: Any = json.loads(path.read_text())
    except OSError as error:
        raise _Unusable(f"it cannot be read ({error.strerror}); {_MAKE}") from None
    except ValueError as error:
        raise _Unusable(f"it is not JSON ({error}); {_MAKE}") from None
    if isinstance(data, dict) and "results" in data:
        raise _Unusable(
            "it holds all the results of the tuner; make a cache from it: "
            f"python -m benchmarks.tuner --report {path} --cache FILE"
        )
    facts: dict[str, Any] = data if isinstance(data, dict) else {}
    if facts.get("format") != FORMAT:
        found = facts.get("format", "not given")
        raise _Unusable(f"its format is {found}, this package reads {FORMAT}; {_MAKE}")
    types = {"gpu": str, "sms": int, "table": str, "choices": list}
    for name, kind in types.items():
        if not isinstance(facts.get(name), kind):
            raise _Unusable(f"its {name!r} is {facts.get(name)!r}, not {kind.__name__}; {_MAKE}")
    return facts


def _rows(data: Mapping[str, Any], tables: Mapping[str, Table]) -> list[_Row]:
    """The choices as the library takes them."""
    table = data["table"]
    if table not in tables:
        raise _Unusable(
            f"it is for the table {table!r}, the library has {', '.join(tables)}; {_MAKE}"
        )
    tiles = {tile["name"] for tile in tables[table]["tiles"]}
    rows: list[_Row] = []
    for choice in data["choices"]:
        try:
            numbers = [choice[name] for name in ("n", "k", "m", "splits")]
            name = choice["tile"]
        except (TypeError, KeyError):
            numbers, name = [], None
        sizes = numbers and all(type(i) is int and 0 < i < 1 << 31 for i in numbers)
        if not sizes or not isinstance(name, str):
            raise _Unusable(f"it has no choice of a tile in {str(choice)[:100]}; {_MAKE}")
        if name not in tiles:
            raise _Unusable(
                f"its tile {name!r} is not in this library's table {table}: it is of another version, or "
                f"of a build with SMOOTHQUANT_KERNELS_TUNING=1; {_MAKE}"
            )
        n, k, m, splits = numbers
        rows.append((n, k, m, name, splits))
    return rows


def _install(library: Library, data: Mapping[str, Any], rows: list[_Row]) -> None:
    """Gives the rows to the library if the file is of one of the GPUs. Runs when CUDA starts."""
    global _current
    wanted, path = (data["gpu"], data["sms"]), _current.path
    try:
        here = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:
        _refuse(path, f"the GPUs do not say what they are ({str(error).splitlines()[0]})")
        return
    if wanted not in [(gpu.name, gpu.multi_processor_count) for gpu in here]:
        named = ", ".join(f"{gpu.name} ({gpu.multi_processor_count} SMs)" for gpu in here) or "none"
        _refuse(path, f"it is of {wanted[0]} ({wanted[1]} SMs), the GPUs here: {named}; {_MAKE}")
        return
    try:
        library.use_measured(data["table"], data["sms"], rows)
    except ValueError as error:
        _refuse(path, f"the library refuses a choice: {error}; {_MAKE}")
        return
    _current = replace(
        _current,
        in_use=True,
        state=f"{path}: {len(rows)} measured choices of {data['gpu']} come before the rules",
    )
