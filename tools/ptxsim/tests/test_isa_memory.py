"""Single PTX instructions against independent references: memory, atomics, warps and control flow."""

import ctypes as C
import functools

import numpy as np
import pytest
from isa_values import U32, N
from single_instruction import run

rng = np.random.default_rng(6)


def test_mixed_width_loads(sim):
    x = rng.integers(-128, 128, N, dtype=np.int8)
    g = run(
        sim,
        "ld.param.u64 y0, [p0]; cvt.u64.u32 y1, idx; add.s64 y0, y0, y1; ld.global.s8 o0, [y0];",
        [("s8", x)],
        ["s64"],
        N,
    )
    assert np.array_equal(g, x.astype(np.int64))


def test_vector_memory(sim):
    x = rng.integers(0, 1 << 32, 4 * 32, dtype=np.uint64).astype(np.uint32)
    body = """ld.param.u64 y0, [p0]; and.b32 x0, idx, 31; mad.wide.u32 y0, x0, 16, y0;
    ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {x0, x1, x2, x3}, [y0];
    mov.u32 bx, sm; and.b32 nt, idx, 31; mad.lo.u32 bx, nt, 16, bx; st.shared.v2.b32 [bx], {x3, x2};
    st.shared.v2.b32 [bx+8], {x1, x0};
    bar.warp.sync 0xffffffff; mov.u32 bx, sm; xor.b32 nt, nt, 1; mad.lo.u32 bx, nt, 16, bx;
    ld.shared.v4.b32 {x0, x1, x2, x3}, [bx];
    shl.b32 x1, x1, 1; add.u32 o0, x0, x1; sub.u32 o0, o0, x3;"""
    g = run(sim, body, [("u32", x)], ["u32"], 32, extra=".shared .align 16 .b8 sm[512];")
    r = x.reshape(32, 4)[:, ::-1][np.arange(32) ^ 1].astype(np.int64)
    assert np.array_equal(g, (r[:, 0] + 2 * r[:, 1] - r[:, 3]).astype(np.uint64).astype(np.uint32))


def test_shuffles(sim):
    x = rng.integers(0, 1000, 32).astype(np.uint32)
    lanes = np.arange(32)
    for mode, b, c, src in (
        ("idx", 5, 31, lambda lane: 5),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 4, 31, lambda lane: lane + 4 if lane + 4 < 32 else lane),
        ("bfly", 9, 31, lambda lane: lane ^ 9),
        (
            "down",
            2,
            0x181F - 0x1800 + (24 << 8),
            lambda lane: lane + 2 if (lane % 8) + 2 < 8 else lane,
        ),
        ("idx", 3, (24 << 8) | 31, lambda lane: (lane & 24) | 3),
    ):
        g = run(
            sim, f"shfl.sync.{mode}.b32 o0|p, i0, {b}, {c}, 0xffffffff;", [("u32", x)], ["u32"], 32
        )
        assert np.array_equal(g, x[[src(int(lane)) for lane in lanes]]), (mode, b, c)
    g = run(
        sim,
        "setp.gt.u32 p, i0, 500; vote.sync.ballot.b32 x0, p, 0xffffffff; "
        "vote.sync.any.pred q, p, 0xffffffff; selp.u32 x1, 1, 0, q; "
        "redux.sync.max.u32 x2, i0, 0xffffffff; xor.b32 o0, x0, x1; add.u32 o0, o0, x2;",
        [("u32", x)],
        ["u32"],
        32,
    )
    bal = sum(1 << int(lane) for lane in lanes if x[lane] > 500)
    assert set(map(int, g)) == {((bal ^ int(bal != 0)) + int(x.max())) & 0xFFFFFFFF}
    g = run(
        sim,
        "elect.sync x0|p, 0xffffffff; selp.u32 o0, 100, 0, p; add.u32 o0, o0, x0; "
        "activemask.b32 x1; popc.b32 x1, x1; add.u32 o0, o0, x1;",
        [("u32", x)],
        ["u32"],
        32,
    )
    assert list(map(int, g)) == [132] + [32] * 31


def redux_f32(bits, op, qualifiers):
    """What the PTX ISA says of redux.sync on f32, on the bits of the participating lanes.

    .abs reduces absolute values. With .NaN the result is the canonical NaN if any input is NaN; without,
    "only non-NaN values are considered", and it is the canonical NaN if there are none. +0 > -0.
    """
    values = [int(b) & (0x7FFFFFFF if "abs" in qualifiers else 0xFFFFFFFF) for b in bits]
    numbers = [v for v in values if v & 0x7FFFFFFF <= 0x7F800000]
    if not numbers or ("NaN" in qualifiers and len(numbers) < len(values)):
        return 0x7FFFFFFF

    def order(v):
        magnitude = v & 0x7FFFFFFF
        return (-magnitude, 0) if v >> 31 else (magnitude, 1)

    return min(numbers, key=order) if op == "min" else max(numbers, key=order)


NANS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32)


def redux_inputs():
    """Bits of four warps: no NaN, some, all lanes but one, all lanes; then zeros, with and without NaN."""
    numbers = rng.standard_normal((6, 32)).astype(np.float32)
    numbers[:3, 5], numbers[:3, 9] = np.inf, -np.inf
    numbers[4:] = np.where(np.arange(32) % 3 == 1, np.float32(-0.0), np.float32(0))
    bits = numbers.view(np.uint32)
    nans = rng.choice(NANS, bits.shape)
    is_nan = np.zeros(bits.shape, bool)
    is_nan[1, [0, 7, 19]] = is_nan[2] = is_nan[3] = is_nan[5, ::2] = True
    is_nan[2, 13] = False
    return np.where(is_nan, nans, bits)


def redux_integer(bits, op, kind):
    def signed(v):
        return v - (v >> 31 << 32) if kind == "s32" else v

    operations = {
        "add": lambda x, y: x + y,
        "min": lambda x, y: min(x, y, key=signed),
        "max": lambda x, y: max(x, y, key=signed),
        "and": lambda x, y: x & y,
        "or": lambda x, y: x | y,
        "xor": lambda x, y: x ^ y,
    }
    return functools.reduce(operations[op], map(int, bits)) & 0xFFFFFFFF


@pytest.mark.parametrize("members", [32, 20, 1])
@pytest.mark.parametrize(
    "instruction",
    [
        *("add.u32", "add.s32", "min.u32", "min.s32", "max.u32", "max.s32"),
        *("and.b32", "or.b32", "xor.b32"),
        *(f"{op}{q}.f32" for op in ("min", "max") for q in ("", ".abs", ".NaN", ".abs.NaN")),
    ],
)
def test_redux(sim, instruction, members):
    """The first lanes of each warp take part, by the member mask; the others jump over it.

    On f32 it needs sm_100a. The simulator runs PTX text for every target, so it refuses none here.
    """
    is_float = instruction.endswith("f32")
    op, *qualifiers, kind = instruction.split(".")
    warps = redux_inputs() if is_float else U32.reshape(4, 32)
    body = f"""and.b32 x0, idx, 31; mov.b32 o0, i0; setp.ge.u32 p, x0, {members}; @p bra OTHERS;
    redux.sync.{instruction} o0, i0, {(1 << members) - 1:#x};
    OTHERS:"""
    target = "sm_100a" if is_float else "sm_90a"
    g = run(sim, body, [("u32", warps.ravel())], ["u32"], warps.size, target=target, block=64)
    want = warps.copy()
    for warp in want:
        taking_part = warp[:members]
        warp[:members] = (
            redux_f32(taking_part, op, qualifiers)
            if is_float
            else redux_integer(taking_part, op, kind)
        )
    assert np.array_equal(g, want.ravel())


def test_brx_and_call(sim):
    extra = """.func (.param .b32 rv) triple(.param .b32 a0) { .reg .b32 t; ld.param.b32 t, [a0];
    mul.lo.u32 t, t, 3; st.param.b32 [rv], t; ret; }"""
    body = """and.b32 x0, i0, 3;
    T: .branchtargets L0, L1, L2, L3;
    brx.idx x0, T;
    L0: mov.u32 o0, 10; bra E;
    L1: mov.u32 o0, 11; bra E;
    L2: { .param .b32 a; .param .b32 r1; st.param.b32 [a], i0; call (r1), triple, (a); ld.param.b32 o0, [r1]; } bra E;
    L3: mov.u32 o0, 13;
    E: add.u32 o0, o0, 1;"""
    g = run(sim, body, [("u32", U32)], ["u32"], N, extra=extra)
    assert [int(v) for v in g] == [
        ([10, 11, int(x) * 3, 13][int(x) & 3] + 1) & 0xFFFFFFFF for x in U32
    ]


def test_atomics(sim):
    x = rng.integers(0, 1000, N).astype(np.uint32)
    extra = ".global .align 8 .b64 cells[8];"
    body = """mov.u64 y0, cells; atom.global.add.u32 x0, [y0], i0; red.global.max.u32 [y0+8], i0;
    atom.global.min.s32 x1, [y0+16], 5; atom.global.inc.u32 x2, [y0+24], 6;
    atom.global.exch.b32 x3, [y0+32], i0; red.global.add.f32 [y0+40], 0f3F800000;
    atom.global.cas.b32 x3, [y0+48], 0, 77; mov.b32 x0, 0x3c003c00;
    red.global.add.noftz.f16x2 [y0+56], x0;
    bar.sync 0; ld.volatile.global.u32 x0, [y0]; ld.global.u32 x1, [y0+8]; add.u32 o0, x0, x1;
    ld.global.u32 x2, [y0+24]; mad.lo.u32 o0, x2, 1000000, o0;
    ld.global.f32 x3, [y0+40]; mov.b32 o1, x3; ld.global.u32 o2, [y0+48]; ld.global.u32 o3, [y0+56];"""
    g = run(sim, body, [("u32", x)], ["u32", "u32", "u32", "u32"], N, block=128, extra=extra)
    assert int(g[0][0]) == int(x.sum() + x.max()) + (N % 7) * 1000000
    assert g[1].view(np.float32)[0] == N and int(g[2][0]) == 77 and int(g[3][0]) == 0x58005800


@pytest.mark.parametrize(
    "instruction", ["frobnicate.u32 a, 1;", "redux.sync.add.f32 a, a, 0xffffffff;"]
)
def test_unknown_instruction(sim, instruction):
    mod, fn = C.c_void_p(), C.c_void_p()
    ptx = (
        ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{\n"
        f" .reg .b32 a;\n {instruction}\n ret;\n}}\n"
    )
    assert sim.rt.cuModuleLoadData(C.byref(mod), ptx.encode()) == 0
    assert sim.rt.cuModuleGetFunction(C.byref(fn), mod, b"k") == 0
    assert sim.rt.cuLaunchKernel(fn, 1, 1, 1, 1, 1, 1, 0, None, None, None) != 0
    for part in (instruction.split()[0], "line 7", "unsupported"):
        assert part in sim.message()
