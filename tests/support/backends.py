"""Where the ops run: `pytest --backend cpu | simulator | cuda tests/kernels`.

The tests of tests/kernels are the same for all: the CPU kernels, the CUDA kernels' PTX run on the CPU by a
simulator (tests/csrc/test_simulator.py starts pytest inside of it), and the CUDA kernels on a GPU. All are compared
with `reference.py`.
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

from smoothquant_kernels.backends import cuda as _extension
from smoothquant_kernels.ops import registry
from tests.support import c_gemm, cases

NAMES = ("cpu", "simulator", "cuda")
#: Set by tests/csrc/test_simulator.py for the pytest that it starts: the library to load.
LIBRARY_VARIABLE = "SQK_SIMULATOR_LIBRARY"


@dataclass(frozen=True)
class Backend:
    """One place where kernels run.

    Attributes:
        name: one of `NAMES`.
        device: of the tensors that go in.
        library: the compiled kernels, or None for the CPU path, which has none.
    """

    name: str
    device: str
    library: Path | None

    @property
    def compiled(self) -> bool:
        """Whether the CUDA sources are under test (and not the CPU path)."""
        return self.library is not None

    def put(self, t: Tensor) -> Tensor:
        """A copy on the backend's device, with nothing of the strides kept: take views of the result."""
        return t.detach().clone().contiguous().to(self.device)

    def options(self, scheme: str, inv_smooth: Tensor | None) -> dict[str, Any]:
        """`cases.quantize_options` and the smoothing factors, on the backend's device."""
        given = {**cases.quantize_options(scheme), "inv_smooth": inv_smooth}
        return {k: self.put(v) if isinstance(v, Tensor) else v for k, v in given.items()}

    @functools.cached_property
    def c_library(self) -> ctypes.CDLL:
        """The C entries."""
        assert self.library is not None, "the CPU path has no C entries"
        return ctypes.CDLL(str(self.library))


def start(name: str) -> Backend:
    """Makes the backend ready, or skips with the reason why it is not here."""
    if name == "cpu":
        return Backend("cpu", "cpu", None)
    if name == "simulator":
        path = os.environ.get(LIBRARY_VARIABLE)
        if path is None:
            pytest.skip("tests/csrc/test_simulator.py starts this inside of the simulator")
        torch.ops.load_library(path)  # binds the CUDA kernels to the CPU key
        registry.eager_cpu = lambda *call: False
        return Backend("simulator", "cpu", Path(path))
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    require_library()
    folder = _extension.FOLDER
    return Backend("cuda", "cuda", folder / _extension.LIBRARY_NAME)


def gemm_tiles(name: str) -> list[dict[str, Any]]:
    """The rows of the GEMM table for the backend's GPU; for the CPU one that says nothing; none without the backend.

    For pytest's collection, before there is a Backend.
    """
    if name == "cpu":
        return [cases.NO_TILE]
    if name == "simulator":
        path = os.environ.get(LIBRARY_VARIABLE)
    else:
        here = torch.cuda.is_available() and _extension.extension_status().available
        path = str(_extension.FOLDER / _extension.LIBRARY_NAME) if here else None
    return [] if path is None else c_gemm.tiles(c_gemm.declare(ctypes.CDLL(path)))


def require_library() -> None:
    """Skips without the CUDA library; fails where it was just built (`make test-cuda`)."""
    status = _extension.extension_status()
    if not status.available:
        give_up = pytest.fail if os.environ.get("SQK_REQUIRE_LIBRARY") else pytest.skip
        give_up(f"no CUDA library: {status.reason}")
