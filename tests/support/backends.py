"""Where the ops run: `pytest --backend cpu | simulator | cuda tests/kernels`.

The tests in tests/kernels are the same for all backends: the CPU kernels, the CUDA kernels' PTX on a simulator
(tests/csrc/test_simulator.py starts pytest inside it), and the CUDA kernels on a GPU. Each is compared with
`reference.py`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smoothquant_kernels.backends import cuda
from smoothquant_kernels.ops import registry
from tests.support import c_gemm, cases

NAMES = ("cpu", "simulator", "cuda")
#: Set by tests/csrc/test_simulator.py for the pytest that it starts: the library to load.
LIBRARY_VARIABLE = "SQK_SIMULATOR_LIBRARY"


@dataclass(frozen=True)
class Backend:
    """One way to run the kernels.

    Attributes:
        name: one of `NAMES`.
        device: the device of the operands.
        library: the compiled kernels, or None for the CPU backend, which has none.
    """

    name: str
    device: str
    library: Path | None

    @property
    def compiled(self) -> bool:
        """Whether the CUDA sources are under test, rather than the CPU backend."""
        return self.library is not None

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
        assert self.library is not None, "the CPU backend has no C entries"
        return ctypes.CDLL(str(self.library))


def start(name: str) -> Backend:
    """Makes the backend ready, or skips the test and says why it is unavailable."""
    if name == "cpu":
        return Backend("cpu", "cpu", None)
    if name == "simulator":
        path = os.environ.get(LIBRARY_VARIABLE)
        if path is None:
            pytest.skip("tests/csrc/test_simulator.py starts this inside the simulator")
        torch.ops.load_library(path)  # binds the CUDA kernels to the CPU key
        registry.eager_cpu = lambda *call: False
        return Backend("simulator", "cpu", Path(path))
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    require_library()
    return Backend("cuda", "cuda", cuda.FOLDER / cuda.LIBRARY_NAME)


def gemm_tiles(name: str) -> list[dict[str, Any]]:
    """The GEMM tiles of the backend's GPU: one placeholder for the CPU, none if the backend is unavailable.

    pytest's collection needs them before a Backend exists.
    """
    if name == "cpu":
        return [cases.NO_TILE]
    if name == "simulator":
        path = os.environ.get(LIBRARY_VARIABLE)
    else:
        available = torch.cuda.is_available() and cuda.extension_status().available
        path = str(cuda.FOLDER / cuda.LIBRARY_NAME) if available else None
    return [] if path is None else c_gemm.tiles(c_gemm.declare(ctypes.CDLL(path)))


def require_library() -> None:
    """Skips the test without the CUDA library, or fails it where the library was just built (`make test-cuda`)."""
    status = cuda.extension_status()
    if not status.available:
        give_up = pytest.fail if os.environ.get("SQK_REQUIRE_LIBRARY") else pytest.skip
        give_up(f"no CUDA library: {status.reason}")
