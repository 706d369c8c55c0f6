"""How a quantizer is distributed over a GPU: the arithmetic of csrc/quantize/plan.cpp, compiled without CUDA."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support import c_interface, described
from tests.support.c_interface import Device, Params, Plan
from tools.build.plan import ROOT

pytestmark = pytest.mark.compiler

A100 = Device(sms=108, capability=80, shared_bytes=166912, wgmma=0)
ADA = Device(sms=142, capability=89, shared_bytes=101376, wgmma=0)
H100 = Device(sms=132, capability=90, shared_bytes=232448, wgmma=1)
SIZES = (4, 2, 2)
REGISTERS = {"warp": 32, "block": 8, "wide": 32, "long": 48, "element": 16, "cluster": 8}


def largest_rotation(path: str, size: int) -> int:
    """What a warp holds at a time; a thread of "long" has single vectors of 16 bytes."""
    elements = {"block": 8, "cluster": 8, "long": 16 // size}
    return min(512, 32 * elements.get(path, 16))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = described.copied(tmp_path_factory.mktemp("plan"))
    loaded.sqk_quantize_plan.argtypes = [ctypes.c_void_p] * 3
    return loaded


def params(
    m: int, k: int, producer: str = "quantize", scheme: str = "token", **more: Any
) -> Params:
    """A problem with aligned addresses, which are never read."""
    p = Params(m=m, k=k, k_padded=k, x=4096, x_q=4096, x_scale=4096, x_stride=k, x_q_stride=k)
    p.producer, p.scheme = (
        c_interface.PRODUCERS.index(producer),
        c_interface.SCHEMES.index(scheme),
    )
    p.dtype, p.path = 1, c_interface.AUTO
    p.scale = 4096 if scheme == "static" else None
    for name, value in more.items():
        setattr(p, name, value)
    return p


def plan(library: ctypes.CDLL, p: Params, device: Device) -> Plan:
    result = Plan()
    status = library.sqk_quantize_plan(ctypes.byref(p), ctypes.byref(device), ctypes.byref(result))
    assert status == 0
    return result


def path(library: ctypes.CDLL, p: Params, device: Device = H100) -> str:
    return c_interface.PATHS[plan(library, p, device).path]


def test_the_table_is_documented(library: ctypes.CDLL) -> None:
    rows = described.library(library).quantize_paths()
    assert {row["path"] for row in rows} == set(c_interface.PATHS)
    documented = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in (ROOT / "docs" / "internals" / "kernels.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    expected = [[row["path"], row["when"], row["why"]] for row in rows]
    assert [cells for cells in documented if cells[0] in c_interface.PATHS] == expected


@pytest.mark.parametrize(
    ("m", "k", "producer", "device", "expected"),
    [
        (4096, 128, "quantize", H100, "warp"),
        (4096, 1024, "quantize", A100, "warp"),
        (16, 1024, "quantize", A100, "block"),
        (4096, 4096, "quantize", H100, "wide"),
        (200, 4096, "quantize", H100, "block"),
        (300, 1024, "quantize", H100, "block"),
        (4096, 8192, "quantize", H100, "wide"),
        (200, 8192, "quantize", H100, "block"),
        (16, 8192, "quantize", H100, "cluster"),
        (34, 8192, "quantize", H100, "block"),
        (1, 65536, "silu", H100, "cluster"),
        (1, 65536, "silu", A100, "wide"),
        (4096, 28672, "silu", H100, "wide"),
        (4096, 28672, "rms_norm", H100, "long"),
        (4096, 49152, "relu", H100, "long"),
        (4096, 16384, "silu", H100, "wide"),
        (1, 1024, "rms_norm", H100, "block"),
        (1, 4096, "rms_norm", H100, "wide"),
        (1, 8192, "rms_norm", H100, "wide"),
        (8192, 128, "rms_norm", H100, "warp"),
        (1, 128, "layer_norm", H100, "warp"),
    ],
)  # fmt: skip
def test_paths(
    library: ctypes.CDLL, m: int, k: int, producer: str, device: Device, expected: str
) -> None:
    assert path(library, params(m, k, producer), device) == expected


@pytest.mark.parametrize(
    ("m", "k", "producer", "dtype", "rotation", "expected"),
    [
        (16, 1024, "quantize", 1, 256, "block"),
        (16, 1024, "quantize", 1, 512, "wide"),
        (16, 1024, "quantize", 0, 256, "block"),
        (16, 1024, "quantize", 0, 512, "wide"),
        (16, 8192, "quantize", 1, 256, "cluster"),
        (16, 8192, "quantize", 1, 512, "wide"),
        (4096, 1024, "quantize", 1, 512, "warp"),
        (4096, 4096, "silu", 1, 512, "wide"),
        (4096, 53248, "silu", 1, 256, "long"),
        (4096, 53248, "silu", 1, 512, "element"),
        (4096, 28672, "rms_norm", 0, 128, "long"),
        (4096, 28672, "rms_norm", 0, 256, "element"),
    ],
)
def test_large_groups_need_a_path_that_holds_them(
    library: ctypes.CDLL,
    m: int,
    k: int,
    producer: str,
    dtype: int,
    rotation: int,
    expected: str,
) -> None:
    assert path(library, params(m, k, producer, dtype=dtype, rotation=rotation)) == expected


def test_few_rows_fill_the_gpu(library: ctypes.CDLL) -> None:
    for m in (1, 2, 4, 8, 16):
        clusters = plan(library, params(m, 65536), H100)
        assert (clusters.cluster, clusters.blocks, clusters.launches) == (8, 8 * m, 1)
        split = plan(library, params(m, 65536), A100)
        assert split.launches == 2 and split.workspace_bytes == 4 * m * split.splits
        assert 30 <= split.blocks == m * split.splits <= A100.sms


@pytest.mark.parametrize(
    "change",
    [
        {"x": 4098}, {"x_stride": 4097}, {"gate": 4098, "producer": "silu"}, {"x_q": 4100}, {"x_q_stride": 4097},
        {"inv_smooth": 4100}, {"columns": 4097, "x_stride": 4104, "x_q_stride": 4104},
        {"weight": 4098, "weight_dtype": 1, "producer": "rms_norm"},
        {"bias": 4098, "bias_dtype": 2, "producer": "layer_norm"},
        {"residual": 4098, "sum": 4096, "sum_stride": 4096, "producer": "rms_norm"},
        {"residual": 4096, "sum": 4098, "sum_stride": 4096, "producer": "rms_norm"},
    ],
)  # fmt: skip
def test_unaligned_rows_are_read_one_element_at_a_time(
    library: ctypes.CDLL, change: dict[str, Any]
) -> None:
    assert path(library, params(64, 4096)) != "element"
    assert path(library, params(64, change.pop("columns", 4096), **change)) == "element"


def test_the_stride_of_one_row_does_not_matter(library: ctypes.CDLL) -> None:
    assert path(library, params(1, 4096, x_stride=4097, x_q_stride=1)) != "element"


@settings(deadline=None, max_examples=400)
@given(
    m=st.integers(0, 1 << 27) | st.integers(0, 40),
    k=st.integers(1, 300_000) | st.integers(1, 2000),
    producer=st.sampled_from(c_interface.PRODUCERS),
    scheme=st.sampled_from(c_interface.SCHEMES),
    dtype=st.integers(0, 2),
    device=st.sampled_from([A100, ADA, H100]),
    rotation=st.sampled_from([0, 0, 2, 16, 128, 256, 512]),
)
@example(
    26, 65792, "quantize", "token", 0, A100, 256
)  # slices too long for `wide`, groups for `long`
@example(0, 16640, "quantize", "token", 0, A100, 256)
def test_every_plan_can_be_launched(
    library: ctypes.CDLL,
    m: int,
    k: int,
    producer: str,
    scheme: str,
    dtype: int,
    device: Device,
    rotation: int,
) -> None:
    k = -(-k // rotation) * rotation if rotation else k
    p = params(m, k, producer, scheme, dtype=dtype, rotation=rotation)
    found = plan(library, p, device)
    name = c_interface.PATHS[found.path]
    assert found.threads % 32 == 0 and 32 <= found.threads <= 1024
    assert found.shared_bytes + 2048 <= device.shared_bytes
    assert found.cluster in (1, 2, 4, 8) and (found.cluster == 1) == (name != "cluster")
    assert name != "cluster" or device.wgmma
    assert found.splits * found.slice >= k > (found.splits - 1) * found.slice
    # A team's registers and shared memory hold its slice, unless the path reads the rest again.
    team = 32 if name == "warp" else found.threads * found.cluster
    registers = 32 if name == "long" and SIZES[dtype] == 4 else REGISTERS[name]
    if name == "element" and rotation:
        registers = 0
    assert rotation <= largest_rotation(name, SIZES[dtype])
    assert rotation == 0 or found.splits == 1 or found.slice % rotation == 0
    assert (
        name != "element" or rotation == 0 or found.slots % SIZES[dtype] == 0
    )  # whole groups of 512
    held = team * (registers + found.slots * 16 // SIZES[dtype])
    assert held >= min(found.slice, k) or name in ("long", "element")
    if name == "long" and k <= (49152 if device is ADA else 65536) and SIZES[dtype] == 2:
        assert held >= k, "rows of 16-bit elements are read once"
    if m > 0:
        teams = found.blocks // found.cluster * found.rows
        assert teams >= 1 and found.blocks % found.cluster == 0
        if found.launches == 1:
            assert teams == -(-m // found.rows) * found.rows and found.workspace_bytes == 0
    if scheme == "tensor":
        assert found.launches == (2 if m else 1)
        assert m == 0 or found.workspace_bytes == 4 * found.blocks
        assert name in ("warp", "wide", "long", "element")
    if producer.endswith("norm"):
        assert found.splits == 1
        one = params(1, k, producer, scheme, dtype=dtype, rotation=rotation)
        other = plan(library, one, device)
        assert (other.path, other.threads) == (found.path, found.threads), "batch invariance"
