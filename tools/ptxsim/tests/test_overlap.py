"""Programmatic dependent launch (PTXSIM_OVERLAP): right chains run, and each planted defect shows."""

import pathlib

import pytest
from conftest import build_cu, run_script

NONE, READS, COPIES, WRITES, NEVER, OTHERS, TRIGGERS = range(7)

SCRIPT = """
import ctypes as C, numpy as np
rt = C.CDLL("libcudart.so.13"); L = C.CDLL("{so}")
rt.ptxsim_last_message.restype = C.c_char_p
n = 1000
a, one = np.arange(n, dtype=np.int32), np.ones(n, np.int32)
b, c = np.full(n, -7, np.int32), np.full(n, -7, np.int32)
def dev(t):
    rt.ptxsim_register_host(C.c_void_p(t.ctypes.data), C.c_size_t(t.nbytes))
    return C.c_void_p(t.ctypes.data)
pointers = [dev(t) for t in (a, b, c, one)]
expected = np.arange(n) + 3
error = L.run_chain(*pointers, n, {first}, {last}, {barrier}, {memset})
print("error" if error else "right" if (c == expected).all() else "wrong")
print(rt.ptxsim_last_message().decode())
"""


@pytest.fixture(scope="module")
def overlap_so():
    return build_cu("overlap.cu", ["90a"], ["-O2", "-lineinfo"])


def chain(so: pathlib.Path, first=NONE, last=NONE, *, barrier=0, memset=0, options=("--overlap",)):
    code = SCRIPT.format(so=so, first=first, last=last, barrier=barrier, memset=memset)
    return run_script(code, *options)[0]


@pytest.mark.parametrize("barrier", [0, 1])
@pytest.mark.parametrize("checks", [(), ("--check", "init,race"), ("--threads", "4")], ids=str)
def test_right_chains(overlap_so, barrier, checks):
    assert chain(overlap_so, barrier=barrier, options=("--overlap", *checks)).startswith("right")


@pytest.mark.parametrize("defect", [READS, COPIES])
def test_early_reads_are_wrong(overlap_so, defect):
    assert chain(overlap_so, last=defect).startswith("wrong")
    assert chain(overlap_so, first=defect).startswith("wrong")
    assert chain(overlap_so, last=defect, options=()).startswith("right"), (
        "launches never overlap without the mode"
    )


def test_the_threads_that_do_not_wait_read_early(overlap_so):
    assert chain(overlap_so, last=OTHERS).startswith("error"), "they also write early"


def test_early_writes_are_errors(overlap_so):
    said = chain(overlap_so, last=WRITES)
    assert said.startswith("error")
    assert "global store of 4 bytes before griddepcontrol.wait" in said and "overlap.cu:" in said


def test_a_kernel_that_never_waits_is_an_error(overlap_so):
    said = chain(overlap_so, last=NEVER)
    assert said.startswith("error") and "before griddepcontrol.wait" in said


def test_a_memset_in_between_has_ended(overlap_so):
    """After a memset a dependent launch is an ordinary one: what it reads early is there."""
    assert chain(overlap_so, last=READS, memset=1).startswith("right")


def test_a_kernel_may_let_the_next_one_start_before_it_has_waited(overlap_so):
    """Then what the last one reads early may be older still, but after its wait all is there."""
    assert chain(overlap_so, first=TRIGGERS).startswith("right")
    assert chain(overlap_so, first=TRIGGERS, last=READS).startswith("wrong")
