"""Where the ops run: `pytest --backend cpu | levels | onednn | simulator | cuda tests/kernels`.

The tests in tests/kernels are the same for all backends: the compiled CPU kernels, the CPU kernels in Python on oneDNN,
the CUDA kernels' PTX on a simulator (tests/csrc/test_simulator.py starts pytest inside it), and the CUDA kernels on a
GPU. Each is compared with `reference`. `cpu`, the default, is what serves a CPU here and oneDNN beside it; `levels`
is every other instruction set of the compiled kernels that this processor has.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels.backends import cpu_native, cuda
from smoothquant_kernels.ops import registry
from tests.support import c_gemm, cases

NAMES = ("cpu", "levels", "onednn", "simulator", "cuda")
#: Set by tests/csrc/test_simulator.py for the pytest that it starts: the library to load.
LIBRARY_VARIABLE = "SQK_SIMULATOR_LIBRARY"


@dataclass(frozen=True)
class Backend:
    """One way to run the kernels.

    Attributes:
        name: one of `NAMES`, or a level of the compiled CPU kernels.
        device: the device of the operands.
        library: the compiled kernels, or None for kernels in Python.
        compiled: whether the CUDA sources are under test.
    """

    name: str
    device: str
    library: Path | None
    compiled: bool = False

    def put(self, t: Tensor) -> Tensor:
        """A contiguous copy on the backend's device. To test other strides, take views of the result."""
        return t.detach().clone().contiguous().to(self.device)

    def move(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments with their tensors on the backend's device."""
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}

    def options(self, scheme: str, inv_smooth: Tensor | None) -> dict[str, Any]:
        """`cases.quantize_options` and the smoothing factors, on the backend's device."""
        given = {**cases.quantize_options(scheme), "inv_smooth": inv_smooth}
        return {k: self.put(v) if isinstance(v, Tensor) else v for k, v in given.items()}

    @functools.cached_property
    def c_library(self) -> ctypes.CDLL:
        assert self.library is not None, "kernels in Python have no C entries"
        return ctypes.CDLL(str(self.library))


@contextlib.contextmanager
def kernels_in_python() -> Iterator[None]:
    """The kernels on oneDNN and of the reference serve, even if compiled ones are loaded."""
    names = sorted(registry.COMPILED)
    library = torch.library.Library(registry.NAMESPACE, "IMPL")
    try:
        for name in names:
            registry.serve_in_python(name, library)
        registry.COMPILED.clear()
        yield
    finally:
        registry.COMPILED.update(names)
        library._destroy()  # the compiled kernels serve again


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    """The compiled kernels use a level."""
    before = cpu_native.level()
    cpu_native.use_level(name)
    try:
        yield
    finally:
        cpu_native.use_level(before)


def several(name: str) -> list[str]:
    """The backends that one value of `--backend` stands for."""
    if name == "levels":
        return [level for level in cpu_native.levels_here() if level != cpu_native.level()]
    return ["cpu", "onednn"] if name == "cpu" and registry.COMPILED else [name]


@contextlib.contextmanager
def started(name: str) -> Iterator[Backend]:
    """Makes the backend ready, or skips the test and says why it is unavailable."""
    library = cuda.FOLDER / cpu_native.LIBRARY_NAME if cpu_native.cpu_status().available else None
    if name in cpu_native.LEVELS:
        with at_level(name):
            yield Backend(name, "cpu", library)
    elif name == "onednn":
        with kernels_in_python():
            yield Backend("onednn", "cpu", None)
    elif name == "cpu":
        yield Backend("cpu", "cpu", library)
    elif name == "levels":
        pytest.skip("this processor has one level, or the CPU library is not loaded")
    else:
        yield _cuda(name)


def _cuda(name: str) -> Backend:
    if name == "simulator":
        path = os.environ.get(LIBRARY_VARIABLE)
        if path is None:
            pytest.skip("tests/csrc/test_simulator.py starts this inside the simulator")
        torch.ops.load_library(path)  # binds the CUDA kernels to the CPU key
        registry.eager_cpu = lambda *call: False
        return Backend("simulator", "cpu", Path(path), compiled=True)
    require_gpu()
    return Backend("cuda", "cuda", cuda.FOLDER / cuda.LIBRARY_NAME, compiled=True)


def gemm_tiles(name: str, w4: bool = False) -> list[dict[str, Any]]:
    """The GEMM tiles of the backend's GPU: one placeholder for the CPU, none if the backend is unavailable.

    Those for weights of 4 bits, or those for int8.

    pytest's collection needs them before a Backend exists.
    """
    if name in ("cpu", "levels", "onednn"):
        return [cases.NO_TILE]
    if name == "simulator":
        path = os.environ.get(LIBRARY_VARIABLE)
    else:
        available = torch.cuda.is_available() and cuda.extension_status().available
        path = str(cuda.FOLDER / cuda.LIBRARY_NAME) if available else None
    if path is None:
        return []
    return (c_gemm.w4_tiles if w4 else c_gemm.tiles)(c_gemm.declare(ctypes.CDLL(path)))


def require_gpu() -> None:
    """Skips the test without a GPU or the CUDA library."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    require_library()


def require_library() -> None:
    """Skips the test without the CUDA library, or fails it where the library was just built (`make test-cuda`)."""
    status = cuda.extension_status()
    if not status.available:
        give_up = pytest.fail if os.environ.get("SQK_REQUIRE_LIBRARY") else pytest.skip
        give_up(f"no CUDA library: {status.reason}")
