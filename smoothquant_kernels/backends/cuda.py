"""The CUDA library: whether it is installed, what it was built with, and what to say where it is missing.

Importing this module never fails. It loads the library, which registers the CUDA kernels, if the library was built and
fits the installed torch. Otherwise `extension_status().reason` says why not and how to build it.

A JSON file beside the library holds the facts about the build, so that they can be read where the library cannot be
loaded. The module `_kernels` describes the loaded library. It fits only the Python that built it, and no op needs it.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from smoothquant_kernels.backends import library as libraries
from smoothquant_kernels.backends import tuned_tiles
from smoothquant_kernels.ops.registry import LIBRARY, NAMESPACE, OPS

if TYPE_CHECKING:
    from smoothquant_kernels._kernels import GemmPlan, Library, PathRow, Table

FOLDER = libraries.FOLDER
LIBRARY_NAME = "libsmoothquant_kernels.so"
BUILD_INFO_NAME = "_build_info.json"
BUILD_COMMAND = (
    "SMOOTHQUANT_KERNELS_BUILD=cuda pip install --no-build-isolation --no-deps . "
    "(in a source tree, with nvcc and a CUDA build of torch)"
)


@dataclass(frozen=True)
class ExtensionStatus:
    """The state of the CUDA library.

    Attributes:
        available: the library is loaded and its CUDA kernels are registered.
        reason: empty when available; else why not, with the command that builds it.
        archs: what it was built for, as in TORCH_CUDA_ARCH_LIST, e.g. ``("8.0+PTX", "9.0a")``.
        cutlass_version: e.g. ``"4.2.0"``.
        cuda_version: of the compiler, e.g. ``"13.0"``.
        torch_target: the oldest torch that the library runs with, e.g. ``"2.10"``.
    Without a library the last four are empty.
    """

    available: bool
    reason: str
    archs: tuple[str, ...] = ()
    cutlass_version: str = ""
    cuda_version: str = ""
    torch_target: str = ""


_lock = threading.Lock()
_explained: set[str] = set()  # ops whose CUDA kernel only raises an error
_status: ExtensionStatus | None = None


def extension_status() -> ExtensionStatus:
    """The state of the library, which the first call loads."""
    global _status
    with _lock:
        if _status is None:
            _status = _load(FOLDER)
        return _status


def build_info(folder: Path = FOLDER) -> dict[str, Any]:
    """All recorded facts about the build, such as flags and registers of each kernel. Empty without a build."""
    return libraries.facts_of(folder / BUILD_INFO_NAME)


def open_library(path: Path) -> Library:
    """What the module `_kernels` says of a loaded library.

    Raises:
        ImportError: the wheel was built with another Python, or the library by another build; a sentence.
    """
    try:
        from smoothquant_kernels import _kernels
    except ImportError:
        raise ImportError(
            f"the module smoothquant_kernels._kernels was not built for Python {platform.python_version()}"
        ) from None
    facts = build_info(path.parent)
    if any(facts.get(name) != value for name, value in _kernels.built_with.items()):
        raise ImportError("the module smoothquant_kernels._kernels is of another build")
    try:
        return _kernels.Library(str(path))
    except RuntimeError as error:
        raise ImportError(str(error)) from None


def described_library() -> tuple[Library | None, str]:
    """What describes the CUDA library, or None and why not."""
    status = extension_status()
    if not status.available:
        return None, status.reason
    try:
        return open_library(FOLDER / LIBRARY_NAME), ""
    except ImportError as error:
        return None, f"{error}; to build it: {BUILD_COMMAND}"


def gemm_tables() -> dict[str, Table]:
    """The GEMM tables by GPU: {"sm90": {"tiles": [...], "rules": [...]}, ...}. Empty if nothing describes a library."""
    library, _ = described_library()
    return {} if library is None else library.gemm_tables()


def gemm_plan(m: int, n: int, k: int) -> GemmPlan | None:
    """The plan of `gemm_s8` on the current GPU, or None where nothing describes a library, or it refuses."""
    library, _ = described_library()
    return None if library is None else library.plan_gemm(m, n, k)


def dispatch_tables() -> dict[str, list[PathRow]]:
    """Which kernel serves which problem, as the library itself reports it.

    Returns:
        op -> rows of {"path", "when", "why"}, in the library's order. Empty where nothing describes a library.
    """
    library, _ = described_library()
    if library is None:
        return {}
    found = {"quantize": library.quantize_paths()}
    for gpu, table in library.gemm_tables().items():
        names = [
            tile["name"] + (" (ruled out)" if tile["excluded"] else "") for tile in table["tiles"]
        ]
        found[f"gemm_s8 {gpu}"] = [
            {
                "path": ", ".join(names[tile] for tile in rule["tiles"]),
                "when": rule["when"],
                "why": rule["why"],
            }
            for rule in table["rules"]
        ]
    return found


def _load(folder: Path) -> ExtensionStatus:
    library = folder / LIBRARY_NAME
    if not library.is_file():
        return ExtensionStatus(
            False, f"the CUDA library was not built; to build it: {BUILD_COMMAND}"
        )
    facts = build_info(folder)
    built = ExtensionStatus(
        available=True,
        reason="",
        archs=tuple(str(arch) for arch in facts.get("archs", ())),
        cutlass_version=str(facts.get("cutlass_version", "")),
        cuda_version=str(facts.get("cuda_version", "")),
        torch_target=str(facts.get("torch_target", "")),
    )
    problem = _mismatch(built.cuda_version, built.torch_target)
    problem = problem or libraries.load(library)
    if problem is None:
        tuned_tiles.load(lambda: open_library(library))
        return built
    reason = f"{problem}; to build it again: {BUILD_COMMAND}"
    return replace(built, available=False, reason=reason)


def _mismatch(cuda_version: str, torch_target: str) -> str | None:
    """Why the library does not fit this torch."""
    if not cuda_version or not torch_target:
        return f"{BUILD_INFO_NAME} is missing or damaged beside {LIBRARY_NAME}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA (libtorch_cuda is missing)"
    if torch.version.cuda.split(".")[0] != cuda_version.split(".")[0]:
        return (
            f"the CUDA library was built with CUDA {cuda_version}, but torch {torch.__version__} "
            f"comes with CUDA {torch.version.cuda}"
        )
    return libraries.too_old("CUDA library", torch_target)


# --------------------------------------------------------------------------------- missing kernels


def missing_kernel_message(op: str, device: torch.device | None = None) -> str:
    """The error message of a CUDA call that no kernel serves.

    Args:
        op: the op's name without the namespace.
        device: the GPU of the call. The message names it and its compute capability.
    """
    status = extension_status()
    where = ""
    if device is not None and device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        where = f" on {torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    cause = status.reason or (
        f"the library was built from other sources than this package; to build it: {BUILD_COMMAND}"
    )
    built = f"; built for {' '.join(status.archs)}" if status.archs else ""
    return f"no CUDA kernel for {op}{where}: {cause}{built}"


def raise_missing_kernel(op: str, device: torch.device | None = None) -> NoReturn:
    """Raises RuntimeError with `missing_kernel_message`."""
    raise RuntimeError(missing_kernel_message(op, device))


def has_cuda_kernel(op: str) -> bool:
    """Whether the library has registered a CUDA kernel for the op."""
    if not extension_status().available or op in _explained:
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CUDA"))


def explain_missing_kernel(op: str) -> None:
    """Gives an op without a CUDA kernel one that raises `missing_kernel_message`.

    Otherwise a CUDA tensor gets the dispatcher's "Could not run ... with arguments from the 'CUDA' backend", which
    lists forty backends and no remedy.
    """
    if has_cuda_kernel(op) or op in _explained:
        return
    _explained.add(op)
    LIBRARY.impl(op, _explainer(op), "CUDA")


def _explainer(op: str) -> Callable[..., Any]:
    def explain(*args: Any, **kwargs: Any) -> NoReturn:
        values = (*args, *kwargs.values())
        devices = (value.device for value in values if isinstance(value, torch.Tensor))
        raise_missing_kernel(
            op, next((device for device in devices if device.type == "cuda"), None)
        )

    return explain


# The library was loaded while the ops had no CUDA kernels: the dispatcher takes kernels and schemas in either order.
for _op in OPS:
    explain_missing_kernel(_op)
