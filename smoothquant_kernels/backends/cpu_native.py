"""The CPU library: compiled kernels that serve the ops' CPU key without any Python in between.

Importing this module loads the library, if it was built and fits this machine and its torch. Otherwise `cpu_status()`
says why not and how to build it, and the kernels of `onednn.py` serve, with the same bits. The library holds several
instruction sets ("levels") and uses the fastest that the processor has.

`SMOOTHQUANT_KERNELS_CPU` forces a level, or oneDNN. Only a level that cannot be used raises an error at import.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass, replace
from pathlib import Path

from smoothquant_kernels.backends import cpu_choice, library
from smoothquant_kernels.backends.cpu_choice import LEVELS
from smoothquant_kernels.errors import SmoothQuantError

LIBRARY_NAME = "libsmoothquant_kernels_cpu.so"
BUILD_INFO_NAME = "_build_info_cpu.json"
BUILD_COMMAND = (
    "SMOOTHQUANT_KERNELS_BUILD=cpu pip install --no-build-isolation --no-deps . "
    "(in a source tree, with a C++ compiler)"
)
_OPS = (
    "quantize", "rms_norm_quantize", "layer_norm_quantize", "act_quantize", "gemm_s8", "gemm_s8_requant",
    "gemm_s8_gated", "gemm_w4a8", "linear_s8", "fused_linear_s8", "linear_w4a8", "kv_append", "decode_attention_s8",
    "grouped_gemm_s8", "combine_experts",
)  # fmt: skip


@dataclass(frozen=True)
class CpuStatus:
    """The state of the CPU library.

    Attributes:
        available: the library is loaded, and its kernels serve.
        reason: empty when available; else why not, with the command that builds it.
        levels: the instruction sets that it was built with, from the slowest to the fastest.
        compiler: e.g. ``"g++ (Debian 12.2.0-14) 12.2.0"``.
        torch_target: the oldest torch that the library runs with, e.g. ``"2.10"``.
    Without a library the last three are empty.
    """

    available: bool
    reason: str
    levels: tuple[str, ...] = ()
    compiler: str = ""
    torch_target: str = ""


_status = CpuStatus(False, "it is not loaded yet")
_entries: ctypes.CDLL | None = None


def cpu_status() -> CpuStatus:
    """Whether the compiled kernels serve, and why not."""
    return _status


def levels_here() -> tuple[str, ...]:
    """The levels that the library holds and this processor runs, from the slowest to the fastest."""
    if _entries is None:
        return ()
    return tuple(name for i, name in enumerate(LEVELS) if _entries.sqk_cpu_has_level(i))


def level() -> str:
    """The level in use; empty where the library does not serve."""
    return "" if _entries is None else LEVELS[_entries.sqk_cpu_level()]


def use_level(name: str | None) -> None:
    """Makes later calls use a level, or the fastest for None. It does not change any result.

    Raises:
        SmoothQuantError: the library does not serve, or lacks the level, or the processor does.
    """
    if _entries is None:
        raise SmoothQuantError(f"there is no level to choose: {_status.reason}.")
    if name is not None and name not in LEVELS:
        raise SmoothQuantError(f"level must be one of {', '.join(LEVELS)}; got {name!r}.")
    if _entries.sqk_cpu_use_level(-1 if name is None else LEVELS.index(name)):
        cause = (
            "this processor lacks its instructions"
            if name in _status.levels
            else f"the CPU library was built without it, by {_status.compiler}"
        )
        raise SmoothQuantError(
            f"the level {name} cannot be used: {cause}; it can use {', '.join(levels_here())}."
        )


def _load(folder: Path, choice: str = "auto") -> tuple[CpuStatus, ctypes.CDLL | None]:
    file = folder / LIBRARY_NAME
    if not file.is_file():
        return CpuStatus(
            False, f"the CPU library was not built; to build it: {BUILD_COMMAND}"
        ), None
    facts = library.facts_of(folder / BUILD_INFO_NAME)
    built = CpuStatus(
        available=True,
        reason="",
        levels=tuple(map(str, facts.get("levels", ()))),
        compiler=str(facts.get("compiler", "")),
        torch_target=str(facts.get("torch_target", "")),
    )
    problem = _mismatch(file, facts.get("machine"), facts.get("bytes"), built.torch_target)
    if problem is None and choice == "auto" and built.levels == ("portable",):
        reason = (
            f"the CPU library holds portable code only, which is slower than oneDNN; "
            f"{cpu_choice.VARIABLE}=portable chooses it"
        )
        return replace(built, available=False, reason=reason), None
    problem = problem or library.load(file)
    if problem is None:
        return built, ctypes.CDLL(str(file))
    reason = f"{problem}; to build it again: {BUILD_COMMAND}"
    return replace(built, available=False, reason=reason), None


def _mismatch(file: Path, machine: object, size: object, torch_target: str) -> str | None:
    """Why the library must not be loaded. Loading a file that was cut off can end the process."""
    if not machine or not torch_target:
        return f"{BUILD_INFO_NAME} is missing or damaged beside {LIBRARY_NAME}"
    if machine != platform.machine():
        return f"the CPU library was built for {machine}, but this is {platform.machine()}"
    if size != file.stat().st_size:
        return f"{LIBRARY_NAME} is damaged: it has {file.stat().st_size} bytes, not {size}"
    return library.too_old("CPU library", torch_target)


def _serve() -> tuple[str, ...]:
    """Loads the library, unless the environment chooses oneDNN, and returns the ops that it serves."""
    global _status, _entries
    choice = cpu_choice.wanted()
    if choice.startswith(cpu_choice.ONEDNN):
        _status = CpuStatus(False, f"{cpu_choice.VARIABLE}={choice} chooses oneDNN")
        return ()
    _status, _entries = _load(library.FOLDER, choice)
    if choice != "auto":
        try:
            use_level(choice)
        except SmoothQuantError as error:
            raise SmoothQuantError(f"{cpu_choice.VARIABLE}={choice}: {error}") from None
    return _OPS if _status.available else ()


#: The ops whose CPU kernel is compiled. The registry reads it; this module needs no op, so it can be imported first.
COMPILED_ON_CPU = _serve()
