"""The state and errors of the CUDA library, and its smallest op on the CPU, in the simulator and on a GPU."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from smoothquant_kernels import ops
from smoothquant_kernels.backends import cuda
from tests.support import simulator
from tests.support.backends import require_library
from tools.build import commands
from tools.build import plan as build_plan

saturate_s8 = torch.ops.smoothquant_kernels._saturate_s8.default
INF, NAN = float("inf"), float("nan")
# Value -> int8: ties to even, both ends, beyond the ends, subnormal, signed zero, not finite.
EDGES = {
    0.0: 0, 0.5: 0, -0.5: 0, 1.5: 2, -1.5: -2, 2.5: 2, -2.5: -2,
    0.49999997: 0, 0.50000006: 1,
    126.5: 126, 127.0: 127, 127.49: 127, 127.5: 127, 128.0: 127, 1e9: 127, 3e38: 127, INF: 127,
    -127.5: -128, -128.0: -128, -128.5: -128, -128.51: -128, -129.0: -128, -3e38: -128, -INF: -128,
    1e-45: 0, -1e-45: 0, NAN: 0,
}  # fmt: skip


def edge_tensors(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(list(EDGES), dtype=torch.float32, device=device)
    return x, torch.tensor(list(EDGES.values()), dtype=torch.int8, device=device)


def saturate_reference(x: torch.Tensor) -> torch.Tensor:
    """Implemented differently from the CPU kernel: in float64, with Python's round (half to even)."""
    values = [0 if v != v else max(-128.0, min(127.0, v)) for v in x.double().flatten().tolist()]
    return torch.tensor([round(v) for v in values], dtype=torch.int8).reshape(x.shape)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.device) == (torch.int8, expected.shape, expected.device)
    wrong = (got != expected).nonzero().tolist()
    assert not wrong, f"{len(wrong)} differ, first at {wrong[0]}: {got}, {expected}"


# ------------------------------------------------------------------------------------------ the op


def test_saturate_on_edges() -> None:
    x, expected = edge_tensors()
    assert_same(saturate_s8(x), expected)
    assert_same(saturate_reference(x), expected)  # as a dict key, -0.0 is 0.0
    assert saturate_s8(torch.tensor([-0.0])).item() == 0


@pytest.mark.parametrize("shape", [(0,), (0, 7), (1,), (3, 5), (2, 3, 4), (1000,), ()])
def test_saturate_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 150
    assert_same(saturate_s8(x), saturate_reference(x))


def test_saturate_of_a_view_is_contiguous() -> None:
    x = (torch.randn(6, 8, generator=torch.Generator().manual_seed(2)) * 99).t()[1::2, ::2]
    y = saturate_s8(x)
    assert y.is_contiguous()
    assert_same(y, saturate_reference(x))


@pytest.mark.parametrize("shape", [(4,), (3, 5), (0,)])
def test_saturate_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(saturate_s8, (torch.randn(shape),))
    torch.library.opcheck(saturate_s8, (torch.randn(*shape, 2).transpose(0, -1),))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_saturate_of_another_type_names_the_type(device: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.float16, device=device)
    with pytest.raises(RuntimeError, match=r"x must be float32, got float16 of shape \[2, 3\]"):
        saturate_s8(x)


# ----------------------------------------------------------------------------- the library's state


def test_status_is_frozen_and_consistent() -> None:
    status = cuda.extension_status()
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.available = True  # type: ignore[misc]
    assert status.available == (status.reason == "")
    assert status.available or "SMOOTHQUANT_KERNELS_BUILD=cuda" in status.reason
    assert cuda.extension_status() is status


def facts(**changed: object) -> dict[str, object]:
    base = {"archs": ["8.0+PTX"], "cutlass_version": "4.2.0", "cuda_version": "13.0"}
    return {**base, "torch_target": "2.10", **changed}


def fake_install(folder: Path, **changed: object) -> Path:
    (folder / cuda.LIBRARY_NAME).write_bytes(b"not a library")
    (folder / cuda.BUILD_INFO_NAME).write_text(json.dumps(facts(**changed)))
    return folder


def test_no_library(tmp_path: Path) -> None:
    status = cuda._load(tmp_path)
    assert not status.available
    assert status.reason.startswith("the CUDA library was not built; to build it: SMOOTHQUANT")
    assert status.archs == ()


@pytest.mark.parametrize(
    ("changed", "torch_cuda", "expected"),
    [
        ({}, None, "is a build without CUDA (libtorch_cuda is missing)"),
        ({}, "12.6", "was built with CUDA 13.0, but torch"),
        ({"torch_target": "99.1"}, "13.0", "needs torch 99.1 or newer"),
        ({"cuda_version": ""}, "13.0", "_build_info.json is missing or damaged"),
        ({}, "13.0", "libsmoothquant_kernels.so does not load with torch"),
    ],
)
def test_a_library_that_does_not_fit_is_not_loaded(
    changed: dict[str, object],
    torch_cuda: str | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    status = cuda._load(fake_install(tmp_path, **changed))
    assert not status.available
    assert expected in status.reason
    assert "to build it again: SMOOTHQUANT_KERNELS_BUILD=cuda" in status.reason
    assert status.archs == ("8.0+PTX",)


def test_many_threads_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    gate = threading.Barrier(8)

    def load(folder: Path) -> cuda.ExtensionStatus:
        calls.append(folder)
        return cuda.ExtensionStatus(False, "test")

    monkeypatch.setattr(cuda, "_status", None)
    monkeypatch.setattr(cuda, "_load", load)
    seen: list[cuda.ExtensionStatus] = []

    def ask() -> None:
        gate.wait()
        seen.append(cuda.extension_status())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({id(status) for status in seen}) == 1


def test_a_missing_kernel_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    status = cuda.ExtensionStatus(False, "it was not built; to build it: X", ("8.0",))
    monkeypatch.setattr(cuda, "_status", status)
    assert not cuda.has_cuda_kernel("gemm_s8")
    expected = "no CUDA kernel for gemm_s8: it was not built; to build it: X; built for 8.0"
    with pytest.raises(RuntimeError, match=expected):
        cuda.raise_missing_kernel("gemm_s8")


X = torch.ones(2, 4)
# A call of every op that the dispatcher accepts. The tensors' values are never read.
CALLS: dict[str, tuple[Any, ...]] = {
    "_saturate_s8": (X,),
    "quantize": (X,),
    "rms_norm_quantize": (X, X, 1e-5),
    "layer_norm_quantize": (X, None, None, 1e-5),
    "act_quantize": (X, "relu"),
    **dict.fromkeys(("linear_s8", "combine_experts"), (X,) * 3),
    **dict.fromkeys(("gemm_s8", "_gemm_s8_tile", "linear_w4a8", "kv_append"), (X,) * 4),
    **dict.fromkeys(("gemm_s8_requant", "gemm_s8_gated", "gemm_w4a8", "grouped_gemm_s8"), (X,) * 5),
    "fused_linear_s8": (X, "relu", X, X),
    "decode_attention_s8": (X, X, X, 1.0),
}


def test_every_op_is_called_here() -> None:
    assert set(CALLS) == set(ops.OPS)


@pytest.mark.parametrize("op", CALLS)
def test_an_op_without_a_cuda_kernel_has_one_that_explains(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"smoothquant_kernels::{op}", "CUDA")
    if not cuda.has_cuda_kernel(op):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        schema = getattr(torch.ops.smoothquant_kernels, op).default._schema
        wants = {argument.name for argument in schema.arguments}
        options = {name: torch.float16 for name in wants & {"out_dtype", "dtype"}}
        overload = getattr(torch.ops.smoothquant_kernels, op).default
        with pytest.raises(RuntimeError, match=f"no CUDA kernel for {op}: "):
            overload.redispatch(keys, *CALLS[op], **options)


# A library with a CUDA kernel for one op only.
LIBRARY = """
#include <torch/csrc/stable/library.h>
#include <stdexcept>
void kernel(StableIValue*, uint64_t, uint64_t) { throw std::runtime_error("the library's own"); }
STABLE_TORCH_LIBRARY_IMPL(smoothquant_kernels, CUDA, m) { m.impl("quantize", &kernel); }
"""
WITH_LIBRARY = """
import torch
torch.version.cuda = "13.0"  # so that the package accepts the library
from smoothquant_kernels.backends import cuda
assert cuda.extension_status().available, cuda.extension_status()
assert cuda.has_cuda_kernel("quantize") and not cuda.has_cuda_kernel("gemm_s8")
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for op, args in (("quantize", ()), ("act_quantize", ("relu",))):
    try:
        getattr(torch.ops.smoothquant_kernels, op).default.redispatch(keys, torch.ones(2, 4), *args)
    except RuntimeError as error:
        print(error)
"""


def compile_library(program: str, target: Path, *flags: str) -> None:
    """Compiles one C++ source into a shared library, with the installed torch."""
    source = target.with_suffix(".cpp")
    source.write_text(program)
    found = build_plan.find_torch()
    command = ["g++", *commands.CXX_FLAGS, commands.torch_target_macro(), *flags]
    command += ["-shared", f"-I{found.include}", str(source), "-o", str(target)]
    subprocess.run([*command, f"-L{found.root / 'lib'}", "-ltorch_cpu", "-ldl"], check=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.compiler
def test_the_kernels_of_a_library_are_kept(tmp_path: Path) -> None:
    package = tmp_path / "smoothquant_kernels"
    shutil.copytree(cuda.FOLDER, package, ignore=shutil.ignore_patterns("*.so", "*.json"))
    (package / cuda.BUILD_INFO_NAME).write_text(json.dumps(facts()))
    compile_library(LIBRARY, package / cuda.LIBRARY_NAME)
    said = subprocess.run(
        [sys.executable, "-c", WITH_LIBRARY], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "the library's own" in said.stdout
    assert "no CUDA kernel for act_quantize: the library was built from other" in said.stdout


REASON = """
#include "torch/stable.h"
extern "C" __attribute__((visibility("default"))) const char* reason() {
  static std::string said;
  const int64_t size = -1;
  AtenTensorHandle made;
  try {
    SQK_TORCH_CALL(aoti_torch_empty_strided, 1, &size, &size, aoti_torch_dtype_int8(), 0, 0, &made);
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  return said.c_str();
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.compiler
def test_an_error_of_libtorch_carries_its_reason(tmp_path: Path) -> None:
    csrc = build_plan.ROOT / "csrc"
    flags = (f"-I{csrc / 'include'}", f"-I{csrc}", "-DSQK_SIMULATOR")
    compile_library(REASON, tmp_path / "reason.so", *flags)
    # Loaded locally, as Python loads modules, so the library must find libtorch's names by its own
    # dependencies.
    program = "import ctypes, torch; said = ctypes.CDLL('./reason.so').reason; "
    program += "said.restype = ctypes.c_char_p; print(said().decode())"
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert said.stdout.startswith("aoti_torch_empty_strided failed: "), said
    version = build_plan.find_torch().version
    knows = tuple(map(int, version.split("+")[0].split(".")[:2])) >= (2, 13)
    assert ("negative" in said.stdout.lower()) == knows, said.stdout


def test_names_agree_with_the_build() -> None:
    assert cuda.LIBRARY_NAME == build_plan.LIBRARY_NAME
    assert cuda.BUILD_INFO_NAME == build_plan.BUILD_INFO_NAME


# -------------------------------------------------------------------------------- the built library


@pytest.mark.cuda_build
def test_the_built_library_registers_its_kernels() -> None:
    require_library()
    status = cuda.extension_status()
    assert status.archs and status.cutlass_version and status.cuda_version
    assert status.torch_target == build_plan.version_text(build_plan.TORCH_TARGET)
    assert cuda.has_cuda_kernel("_saturate_s8")
    x, expected = edge_tensors()
    assert_same(saturate_s8(x), expected)  # the CPU kernel is still Python's


@pytest.mark.cuda_build
def test_no_kernel_has_a_stack_frame_or_spills() -> None:
    require_library()
    kernels = cuda.build_info()["kernels"]
    assert kernels, "the build recorded no kernels"
    assert not [use for use in kernels if use["stack"] or use["spills"]]
    assert not cuda.build_info()["warnings"]  # C7510: wgmma made serial


@pytest.mark.cuda
def test_saturate_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    require_library()
    x, expected = edge_tensors("cuda")
    assert_same(saturate_s8(x), expected)
    view = (torch.randn(300, 700, device="cuda") * 99).t()[1:, ::2]
    assert_same(saturate_s8(view).cpu(), saturate_reference(view.cpu()))
    assert saturate_s8(torch.empty(0, 4, device="cuda")).shape == (0, 4)
    with pytest.raises(RuntimeError, match="x must be float32, got float16"):
        saturate_s8(x.half())


# ------------------------------------------------------------------------------------ the simulator

BINDING = """
import sys, torch
from smoothquant_kernels.ops import registry
saturate_s8 = torch.ops.smoothquant_kernels._saturate_s8.default
x, expected = torch.load(sys.argv[1])
torch.ops.load_library(sys.argv[2])  # replaces the CPU kernel
assert torch.equal(saturate_s8(x), expected), saturate_s8(x)
view = (torch.randn(30, 70) * 99).t()[1:, ::2]
y = saturate_s8(view)
assert y.is_contiguous() and torch.equal(y, registry.cpu("_saturate_s8")(view))
assert saturate_s8(torch.empty(0, 4)).shape == (0, 4)
try:
    saturate_s8(torch.zeros(2, 3, dtype=torch.float16))
except RuntimeError as error:
    print(error)
"""

C_ENTRY = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
entry = library.sqk_saturate_s8
entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
# More elements than one pass of the largest grid takes (4096 x 256), so that the loop runs twice.
x = (torch.arange(4096 * 256 + 77) % 1021 - 510) * 0.5
y = torch.full((x.numel() + 1,), 99, dtype=torch.int8)
assert entry(x.data_ptr(), y.data_ptr(), x.numel(), None) == 0
assert torch.equal(y[:-1], x.round().clamp(-128, 127).to(torch.int8)) and y[-1] == 99
assert entry(x.data_ptr(), y.data_ptr(), -1, None) == 1  # kInvalidArgument
assert entry(None, y.data_ptr(), 5, None) == 1
assert entry(None, None, 0, None) == 0
"""


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_saturate_in_the_simulator(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator.require()
    torch.save(edge_tensors(), tmp_path / "edges.pt")
    stats = tmp_path / "stats.json"
    monkeypatch.setenv("PTXSIM_STATS", str(stats))
    said = simulator.run(BINDING, str(tmp_path / "edges.pt"), str(simulator.library()), arch=arch)
    assert "_saturate_s8: x must be float32, got float16 of shape [2, 3]" in said
    launches = stats.read_text().splitlines()
    assert len(launches) == 2, "the edges and the view; nothing for 0 elements"
    assert all("saturate_s8_kernel" in line for line in launches)


@pytest.mark.simulator
@pytest.mark.slow
def test_the_c_entry_in_the_simulator() -> None:
    simulator.require()
    simulator.run(C_ENTRY, str(simulator.library()), checks="")
