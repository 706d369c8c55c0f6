"""Into how many parts a sequence is split: the arithmetic of csrc/attention/plan.cpp, compiled without CUDA."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.test_plan import A100, ADA, H100
from tests.support import c_attention, described
from tests.support.c_interface import SUCCESS, UNSUPPORTED_ARCH, Device

pytestmark = pytest.mark.compiler

#: What a thread's launch bounds allow an SM, and the shared memory of an SM beyond that of one block.
RESIDENT, RESERVED = {8: 4, 16: 2, 32: 2}, 1024
TICKETS, MOST_SPLITS, CHUNK = 640, 64, 64


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return c_attention.declare_plans(described.copied(tmp_path_factory.mktemp("plan")))


def plan(library: ctypes.CDLL, params: c_attention.Params, device: Device) -> c_attention.Plan:
    status, found = c_attention.plan(library, params, device)
    assert status == SUCCESS
    return found


def columns_of(dim: int, columns: int) -> int:
    return 8 if columns <= 8 else 32 if dim <= 128 else 16


@settings(max_examples=300, deadline=None)
@given(
    batch=st.integers(1, 300),
    kv_heads=st.integers(1, 40),
    group=st.integers(1, 16),
    tokens=st.integers(1, 8),
    dim=st.integers(1, 256),
    positions=st.integers(1, 200_000),
    device=st.sampled_from([A100, ADA, H100]),
)
def test_a_plan(
    library: ctypes.CDLL,
    batch: int,
    kv_heads: int,
    group: int,
    tokens: int,
    dim: int,
    positions: int,
    device: Device,
) -> None:
    """It fits the GPU and the tickets, splits no chunk, and fills waves nearly as well as any number of splits."""
    params = c_attention.described(batch, kv_heads * group, kv_heads, tokens, dim, positions)
    found = plan(library, params, device)
    columns = columns_of(dim, group * tokens)
    groups = batch * kv_heads * -(-group * tokens // columns)
    assert found.blocks == groups * found.splits and found.threads == 128
    chunks = -(-positions // CHUNK)
    assert 1 <= found.splits <= min(MOST_SPLITS, chunks)
    assert found.splits == 1 or groups <= TICKETS
    assert found.shared_bytes + RESERVED <= device.shared_bytes
    padded = 64 if dim <= 64 else 128 if dim <= 128 else 256
    sums = groups * found.splits * columns * (padded + 2) * 4
    tickets = -(-4 * groups // 256) * 256
    assert found.workspace_bytes == (sums + tickets if found.splits > 1 else 0)
    per_sm = (device.shared_bytes + RESERVED) // (found.shared_bytes + 2 * RESERVED)
    resident = max(1, min(per_sm, RESIDENT[columns])) * device.sms

    def filled(splits: int) -> float:
        waves = -(-groups * splits // resident)
        return float(groups * splits / (waves * resident))

    if groups <= TICKETS:
        most = max(filled(splits) for splits in range(1, min(MOST_SPLITS, chunks) + 1))
        assert filled(found.splits) >= most / 1.1**2


def test_plans_that_matter(library: ctypes.CDLL) -> None:
    """Llama-3 8B at 32k tokens: about all that fits an H100 at once, for one sequence and for 64."""
    for batch, splits in ((1, 62), (4, 16), (16, 4), (64, 1)):
        params = c_attention.described(batch, 32, 8, 1, 128, 32_768)
        assert plan(library, params, H100).splits == splits, batch
    one = c_attention.described(1, 32, 8, 1, 128, 64)
    assert plan(library, one, H100).splits == 1


def test_a_plan_knows_no_lengths(library: ctypes.CDLL) -> None:
    """One graph serves all lengths."""
    params = c_attention.described(2, 32, 8, 1, 128, 8192)
    before = plan(library, params, A100)
    params.lengths = 4096
    assert bytes(plan(library, params, A100)) == bytes(before)


def test_an_older_gpu(library: ctypes.CDLL) -> None:
    turing = Device(sms=68, capability=75, shared_bytes=65536)
    params = c_attention.described(1, 8, 8, 1, 64, 64)
    assert c_attention.plan(library, params, turing)[0] == UNSUPPORTED_ARCH
