"""What the simulator reports: bounds, deadlocks, uninitialized values, races, and the statistics of a launch."""

import ctypes as C
import json

import numpy as np
from conftest import run_script

F = np.float32
rng = np.random.default_rng(1)


def test_out_of_bounds(sim, basic):
    a, c = np.zeros(1000, F), np.zeros(900, F)
    assert basic.run_oob(sim.buf(a), sim.buf(c), 1000) == 700
    m = sim.message()
    assert (
        "out-of-bounds global store of 4 bytes" in m
        and "k_vadd" in m
        and "basic.cu:" in m
        and "thread (132,0,0)" in m
        and "block (3,0,0)" in m
    )
    assert "0 bytes past the end of registered host" in m
    # the error is sticky
    assert basic.run_vadd(sim.buf(a), sim.buf(a), sim.buf(a), 1000) == 700


def test_unregistered(sim, basic):
    a = np.zeros(100, F)
    assert (
        basic.run_vadd(
            C.c_void_p(a.ctypes.data), C.c_void_p(a.ctypes.data), C.c_void_p(a.ctypes.data), 100
        )
        == 700
    )
    assert "out-of-bounds global load" in sim.message()


def test_misaligned(sim, basic):
    a, o = np.zeros(64, np.uint8), np.zeros(4, F)
    assert basic.run_misaligned(sim.buf(a), sim.buf(o)) == 716
    assert "misaligned global access of 16 bytes" in sim.message()


def test_use_after_free(sim, basic):
    o = np.zeros(64, F)
    assert basic.run_uaf(sim.buf(o)) == 700
    assert "use after free" in sim.message()


def test_shared_out_of_bounds(sim, basic):
    o = np.zeros(64, F)
    assert basic.run_smemoob(sim.buf(o), 0) == 0
    assert basic.run_smemoob(sim.buf(o), 1) == 700
    assert "out-of-bounds shared store" in sim.message()


def test_dynamic_shared_limit(sim, basic):
    o = np.zeros(64, F)
    p = sim.buf(o)
    assert basic.run_dyn(p, 64, 256, 0) == 0
    assert basic.run_dyn(p, 12500, 50000, 0) == 1  # above 48 KB without the attribute
    assert basic.run_dyn(p, 12500, 50000, 1) == 0
    assert basic.run_dyn(p, 58112, 227 * 1024, 1) == 0
    assert basic.run_dyn(p, 58112, 228 * 1024, 1) == 1  # more than the architecture has
    assert basic.run_dyn(p, 65, 256, 0) == 700
    assert "out-of-bounds shared store" in sim.message()


def test_deadlock(sim, basic):
    o = np.zeros(64, F)
    assert basic.run_deadlock(sim.buf(o), 1) == 0
    assert basic.run_deadlock(sim.buf(o), 2) == 702
    m = sim.message()
    assert (
        "deadlock" in m
        and "waits at barrier 1 (32 of 64" in m
        and "waits at barrier 2 (32 of 64" in m
        and "planted.cuh:" in m
    )


def test_mbarrier_deadlock(sim, basic):
    o = np.zeros(32, F)
    assert basic.run_mbardead(sim.buf(o), 2) == 0
    assert basic.run_mbardead(sim.buf(o), 1) == 702
    assert "spins on a wait" in sim.message()


def test_trap_and_printf(sim, basic, capfd):
    assert basic.run_trap(1) == 0
    assert basic.run_trap(3) == 719
    assert "trap" in sim.message()
    assert "value 3 str 1.50" in capfd.readouterr().out


SCRIPT = """
import ctypes as C, numpy as np
rt = C.CDLL("libcudart.so.13"); L = C.CDLL("{so}")
rt.ptxsim_last_message.restype = C.c_char_p
o = np.zeros({n}, np.float32)
rt.ptxsim_register_host(C.c_void_p(o.ctypes.data), C.c_size_t(o.nbytes))
print(L.{fn}(C.c_void_p(o.ctypes.data){args}))
print(rt.ptxsim_last_message().decode())
"""


def check_run(so, fn, n, opts, args=""):
    return run_script(SCRIPT.format(so=so, fn=fn, n=n, args=args), *opts)[0]


def test_uninitialized_global(basic_so):
    assert check_run(basic_so, "run_uninit_global", 64, []).startswith("0")
    out = check_run(basic_so, "run_uninit_global", 64, ["--check", "init"])
    assert (
        out.startswith("719")
        and "stored to global memory depends on uninitialized global" in out
        and "basic.cu:" in out
    )


def test_uninitialized_shared(basic_so):
    assert check_run(basic_so, "run_uninit_shared", 64, []).startswith("0")
    out = check_run(basic_so, "run_uninit_shared", 64, ["--check", "init"])
    assert (
        out.startswith("719") and "stored to global memory depends on uninitialized shared" in out
    )


def test_uninitialized_through_mma(basic_so):
    out = check_run(basic_so, "run_mma_uninit", 128, ["--check", "init"])
    assert (
        out.startswith("719")
        and "a value stored to global memory depends on uninitialized" in out
        and "k_mma_s8" in out
    )


def test_race(basic_so):
    assert check_run(basic_so, "run_race", 128, ["--check", "race"], ", 1").startswith("0")
    out = check_run(basic_so, "run_race", 128, ["--check", "race"], ", 0")
    assert out.startswith("719") and "shared-memory race" in out and "planted.cuh:" in out


def test_clean_under_checks(basic_so):
    code = f"""
import ctypes as C, numpy as np
rt = C.CDLL("libcudart.so.13"); L = C.CDLL("{basic_so}")
keep = []
def b(a):
    keep.append(a)
    rt.ptxsim_register_host(C.c_void_p(a.ctypes.data), C.c_size_t(a.nbytes))
    return C.c_void_p(a.ctypes.data)
f = lambda n: b(np.ones(n, np.float32))
i = lambda n: b(np.ones(n, np.int32))
print(L.run_blocksum(f(5000), f(1), 5000), L.run_quant(f(1000), i(1000), f(10), 10, 100),
      L.run_cpasync(i(600), i(640), 600),
      L.run_mma_s8(i(128), i(64), i(128)), L.run_mma_f16(i(128), i(64), f(128)),
      L.run_wgmma(i(512), i(128), f(1024), 0), L.run_wgmma(i(512), i(128), f(1024), 1),
      L.run_dsmem(i(256)), L.run_bulk(f(256), f(256)), L.run_warp(i(64)),
      L.run_atomics(b(np.zeros(8, np.int32)), b(np.zeros(1, np.uint64)), f(1)))
"""
    assert run_script(code, "--check", "init,race")[0].split() == ["0"] * 11


def test_architectures(basic_so):
    code = f"""
import ctypes as C
L = C.CDLL("{basic_so}")
a, b, c = C.c_int(), C.c_int(), C.c_int()
L.props(C.byref(a), C.byref(b), C.byref(c))
print(a.value, b.value, c.value)
"""
    for arch, want in {
        "sm_80": "80 108 166912",
        "sm_86": "86 84 101376",
        "sm_89": "89 128 101376",
        "sm_90": "90 132 232448",
        "sm_100": "100 148 232448",
        "sm_120": "120 170 101376",
    }.items():
        assert run_script(code, "--arch", arch)[0].strip() == want


def test_stats(basic_so, tmp_path):
    f = tmp_path / "stats.json"
    check_run(basic_so, "run_race", 128, ["--stats", str(f)], ", 1")
    d = [json.loads(line) for line in f.read_text().splitlines()]
    assert len(d) == 1 and d[0]["block"] == [128, 1, 1] and "k_race" in d[0]["kernel"]
    assert d[0]["global_store"]["bytes"] == 512 and d[0]["global_store"]["sectors"] in (
        16,
        20,
    )  # 20 when the buffer is not 32-byte aligned
    assert d[0]["shared"]["conflict_factor"] == 1.0 and d[0]["instructions"]["barrier_fence"] == 4


def test_tma_without_wait(sim, basic):
    """Copies land late, so a missing wait shows; a wrong byte count hangs and is reported."""
    A, B = rng.integers(1, 256, (16, 64), dtype=np.uint8), np.zeros((16, 64), np.uint8)
    raw = np.zeros(1024, np.uint8)
    args = (sim.buf(A), sim.buf(B), 0, 1, 64, 16, 64, 16, 0, 0, 0, 0, 0, sim.buf(raw), 0)
    assert basic.run_tma(*args, 0) == 0 and np.array_equal(raw, A.reshape(-1))
    basic.run_tma(*args, 1)
    assert not np.array_equal(raw, A.reshape(-1))
    sim.rt.ptxsim_reset()
    assert basic.run_tma(*args, 2) == 702


def test_cp_async_without_wait(sim, basic):
    x, y = rng.integers(1, 1000, 128, dtype=np.int32), np.zeros(128, np.int32)
    assert basic.run_cpnowait(sim.buf(x), sim.buf(y), 0) == 0 and np.array_equal(x, y)
    assert basic.run_cpnowait(sim.buf(x), sim.buf(y), 1) == 0 and not np.array_equal(x, y)


def test_wgmma_operand_overwritten(basic_so):
    assert check_run(basic_so, "run_wgmma_overwrite", 1024, ["--check", "race"], ", 0").startswith(
        "0"
    )
    out = check_run(basic_so, "run_wgmma_overwrite", 1024, ["--check", "race"], ", 1")
    assert out.startswith("719") and "overwritten before wgmma.wait_group" in out
