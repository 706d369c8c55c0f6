"""What a CUDA graph of a decoding step needs, checked without a GPU.

A stream that is captured must not wait, and every address must stay valid for the replays. So no operation may read a
value on the host, results must come from torch's allocator, and the library may only call what a capture records.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch

from smoothquant_kernels.schemes import ACTIVATION_SCHEMES
from tests.nn.test_compiled_models import decode
from tests.nn.test_generate import FAMILIES, model
from tools.build.plan import ROOT

#: What the library may call of the CUDA runtime. The first two are recorded; the others ask, or set up a kernel.
#: None allocates memory, copies to the host or waits for the GPU.
CALLS = {
    "cudaLaunchKernelExC",
    "cudaMemsetAsync",
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetDriverEntryPoint",
    "cudaGetDriverEntryPointByVersion",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaOccupancyMaxActiveClusters",
    # Of tickets (csrc/common/tickets.cu), which a graph owns while it exists. No capture asks for the address.
    "cudaGetSymbolAddress",
    "cudaGraphRetainUserObject",
    "cudaStreamGetCaptureInfo",
    "cudaStreamGetId",
    "cudaUserObjectCreate",
    "cudaUserObjectRelease",
}
#: Without OPT: that of transformers reads the length of a static cache on the host.
CAPTURED = [family for family in FAMILIES if family != "opt"]


def test_the_library_calls_only_what_a_capture_allows() -> None:
    found = {
        name
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".cu", ".cuh", ".cpp", ".h"}
        for name in re.findall(r"\b(cuda[A-Z]\w+) *\(", path.read_text("utf-8"))
    }
    assert found == CALLS


@pytest.mark.parametrize("scheme", ACTIVATION_SCHEMES)
@pytest.mark.parametrize("family", CAPTURED)
def test_a_decoding_step_reads_no_value(family: str, scheme: str) -> None:
    """Tensors on the meta device have no values, so reading one fails, as does a size that depends on one."""
    made = copy.deepcopy(model(family, scheme)).to("meta")
    with torch.device("meta"):
        steps = decode(made, made)
    assert all(t.is_meta and t.shape[:2] == (2, 1) for t in steps)
    with pytest.raises(RuntimeError, match="meta"):
        steps[0].max().item()
