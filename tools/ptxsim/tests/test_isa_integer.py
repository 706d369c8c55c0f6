"""Single PTX instructions against independent references: integers and bits."""

import math
import struct

import numpy as np
import pytest
from isa_values import SH, U32, V32, W32, N, s32, wrap
from single_instruction import run

rng = np.random.default_rng(3)


INT3 = {
    "add.s32 o0, i0, i1;": lambda a, b, c: a + b,
    "sub.u32 o0, i0, i1;": lambda a, b, c: a - b,
    "mul.lo.u32 o0, i0, i1;": lambda a, b, c: a * b,
    "mul.hi.u32 o0, i0, i1;": lambda a, b, c: (a * b) >> 32,
    "mad.lo.s32 o0, i0, i1, i2;": lambda a, b, c: a * b + c,
    "mad.hi.u32 o0, i0, i1, i2;": lambda a, b, c: ((a * b) >> 32) + c,
    "and.b32 o0, i0, i1;": lambda a, b, c: a & b,
    "xor.b32 o0, i0, i1;": lambda a, b, c: a ^ b,
    "not.b32 o0, i0;": lambda a, b, c: ~a,
    "cnot.b32 o0, i0;": lambda a, b, c: int(a == 0),
    "lop3.b32 o0, i0, i1, i2, 0xE8;": lambda a, b, c: (a & b) | (a & c) | (b & c),
    "lop3.b32 o0, i0, i1, i2, 0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 o0, i0, i1, i2, 0xCA;": lambda a, b, c: (a & b) | (~a & c),
    "popc.b32 o0, i0;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 o0, i0;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 o0, i0;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 o0, i0;": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.u32 o0, i0;": lambda a, b, c: 32 - a.bit_length() if a else -1,
    "min.u32 o0, i0, i1;": lambda a, b, c: min(a, b),
    "sad.u32 o0, i0, i1, i2;": lambda a, b, c: abs(a - b) + c,
    "div.u32 o0, i0, i1;": lambda a, b, c: a // b if b else -1,
    "rem.u32 o0, i0, i1;": lambda a, b, c: a % b if b else a,
    "mul24.lo.u32 o0, i0, i1;": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "shf.l.wrap.b32 o0, i0, i1, i2;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32 o0, i0, i1, i2;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32 o0, i0, i1, i2;": lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32,
    "shf.r.clamp.b32 o0, i0, i1, i2;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "add.cc.u32 x0, i0, i1; addc.u32 o0, i2, 0;": lambda a, b, c: c + ((a + b) >> 32),
    "sub.cc.u32 x0, i0, i1; subc.u32 o0, i2, 0;": lambda a, b, c: c - (a < b),
    "mov.b32 {h0, h1}, i0; mov.b32 o0, {h1, h0};": lambda a, b, c: (a >> 16) | (a << 16),
    "{ .reg .b32 t; mov.u32 t, i0; add.u32 o0, t, i1; }": lambda a, b, c: a + b,
    "setp.lt.u32 p, i0, i1; selp.b32 o0, i0, i1, p;": lambda a, b, c: min(a, b),
    "setp.gt.and.u32 p|q, i0, i1, !r; setp.eq.u32 r, 0, 1; selp.u32 o0, 1, 0, r;": lambda a, b, c: (
        0
    ),
    (
        "setp.ne.u32 r, i2, 0; setp.lt.or.u32 p|q, i0, i1, r; selp.u32 x0, 1, 0, p; "
        "selp.u32 x1, 2, 0, q; add.u32 o0, x0, x1;"
    ): lambda a, b, c: int(a < b or c != 0) + 2 * int((not a < b) or c != 0),
    "setp.ne.u32 r, i2, 0; setp.lt.xor.u32 p, i0, i1, r; selp.u32 o0, 1, 0, p;": lambda a, b, c: (
        int((a < b) != (c != 0))
    ),
    "set.lt.u32.u32 o0, i0, i1;": lambda a, b, c: 0xFFFFFFFF if a < b else 0,
    "slct.u32.s32 o0, i0, i1, i2;": lambda a, b, c: a if c < 0x80000000 else b,
    "bmsk.clamp.b32 o0, i0, i1;": lambda a, b, c: 0 if a > 31 else ((1 << min(b, 32)) - 1) << a,
    "lop3.or.b32 x0|p, i0, i1, i2, 0x80, 0; selp.u32 o0, 1, 0, p;": lambda a, b, c: int(
        a & b & c != 0
    ),
}


@pytest.mark.parametrize("op", list(INT3))
def test_int(sim, op):
    c = SH if "shf" in op or "bmsk" in op else W32
    a, b = (SH % 40, np.roll(SH, 3) % 50) if "bmsk" in op else (U32, V32)
    if "setp.gt.and.u32 p|q" in op:
        op = "setp.eq.u32 r, 0, 1; " + op
    got = run(sim, op, [("u32", a), ("u32", b), ("u32", c)], ["u32"], N)
    key = op if op in INT3 else op[len("setp.eq.u32 r, 0, 1; ") :]
    ref = wrap([INT3[key](int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)])
    assert np.array_equal(got, ref.astype(np.uint32))


SINT = {
    "mul.hi.s32 o0, i0, i1;": lambda a, b, c: (a * b) >> 32,
    "div.s32 o0, i0, i1;": lambda a, b, c: (
        int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1
    ),
    "rem.s32 o0, i0, i1;": lambda a, b, c: int(math.copysign(abs(a) % abs(b), a)) if b else a,
    "shr.s32 o0, i0, 5;": lambda a, b, c: a >> 5,
    "abs.s32 o0, i0;": lambda a, b, c: abs(a),
    "neg.s32 o0, i0;": lambda a, b, c: -a,
    "max.s32 o0, i0, i1;": lambda a, b, c: max(a, b),
    "add.sat.s32 o0, i0, i1;": lambda a, b, c: max(-(2**31), min(2**31 - 1, a + b)),
    "sub.sat.s32 o0, i0, i1;": lambda a, b, c: max(-(2**31), min(2**31 - 1, a - b)),
    "cvt.sat.s8.s32 o0, i0;": lambda a, b, c: max(-128, min(127, a)),
    "cvt.sat.u8.s32 o0, i0;": lambda a, b, c: max(0, min(255, a)),
    "cvt.sat.u16.s32 h0, i0; cvt.u32.u16 o0, h0;": lambda a, b, c: max(0, min(65535, a)),
    "cvt.s8.s32 o0, i0;": lambda a, b, c: ((a & 0xFF) ^ 0x80) - 0x80,
    "cvt.s32.s16 o0, h0;": None,
    "cvt.pack.sat.s8.s32.b32 o0, i0, i1, i2;": lambda a, b, c: (
        ((max(-128, min(127, a)) & 0xFF) << 8) | (max(-128, min(127, b)) & 0xFF) | (c << 16)
    ),
    "cvt.pack.sat.u8.s32.b32 o0, i0, i1, i2;": lambda a, b, c: (
        (max(0, min(255, a)) << 8) | max(0, min(255, b)) | (c << 16)
    ),
    "cvt.pack.sat.s16.s32 o0, i0, i1;": lambda a, b, c: (
        ((max(-32768, min(32767, a)) & 0xFFFF) << 16) | (max(-32768, min(32767, b)) & 0xFFFF)
    ),
}


@pytest.mark.parametrize("op", [k for k in SINT if SINT[k]])
def test_signed(sim, op):
    small = "cvt" in op
    a, b, c = (
        (
            np.where(np.arange(N) % 2, s32(U32) % 400 - 200, s32(U32))
            .astype(np.int64)
            .astype(np.int32),
            np.roll(s32(U32), 5).astype(np.int32),
            s32(W32).astype(np.int32),
        )
        if small
        else (U32.view(np.int32), V32.view(np.int32), W32.view(np.int32))
    )
    got = run(sim, op, [("s32", a), ("s32", b), ("s32", c)], ["u32"], N)
    assert np.array_equal(
        got,
        wrap([SINT[op](int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]).astype(
            np.uint32
        ),
    )


def test_wide_and_64bit(sim):
    a, b = U32.view(np.int32), V32.view(np.int32)
    got = run(
        sim,
        "mul.wide.s32 y0, i0, i1; mad.wide.s32 o0, i0, i1, y0;",
        [("s32", a), ("s32", b)],
        ["s64"],
        N,
    )
    assert list(map(int, got)) == [
        2 * int(x) * int(y)
        if abs(2 * int(x) * int(y)) < 2**63
        else ((2 * int(x) * int(y) + 2**63) % 2**64) - 2**63
        for x, y in zip(a, b, strict=True)
    ]
    x, y = rng.integers(0, 2**64, N, dtype=np.uint64), rng.integers(0, 2**64, N, dtype=np.uint64)
    x[:2] = [0, 2**64 - 1]
    got = run(
        sim,
        "mul.hi.u64 y0, i0, i1; shr.u64 y1, i0, 13; xor.b64 y0, y0, y1; popc.b64 x0, y0; "
        "cvt.u64.u32 y1, x0; add.u64 o0, y0, y1;",
        [("u64", x), ("u64", y)],
        ["u64"],
        N,
    )
    ref = []
    for p, q in zip(x, y, strict=True):
        v = ((int(p) * int(q)) >> 64) ^ (int(p) >> 13)
        ref.append((v + bin(v).count("1")) % 2**64)
    assert [int(v) for v in got] == ref


@pytest.mark.parametrize("ty", ["u32", "s32", "u64", "s64"])
def test_bfe_bfi(sim, ty):
    bits = int(ty[1:])
    a, b = (
        rng.integers(0, 2**bits, N, dtype=np.uint64),
        rng.integers(0, 2**bits, N, dtype=np.uint64),
    )
    pos, ln = (
        rng.integers(0, bits + 8, N).astype(np.uint32),
        rng.integers(0, bits + 8, N).astype(np.uint32),
    )
    t = f"u{bits}"
    got = run(sim, f"bfe.{ty} o0, i0, i1, i2;", [(t, a), ("u32", pos), ("u32", ln)], [t], N)

    def bfe(v, p, length):
        v, p, length, msb = int(v), int(p), int(length), bits - 1
        sb = 0 if ty[0] == "u" or length == 0 else (v >> min(p + length - 1, msb)) & 1
        d = 0
        for i in range(bits):
            d |= ((v >> (p + i)) & 1 if i < length and p + i <= msb else sb) << i
        return d

    assert [int(v) for v in got] == [bfe(*z) for z in zip(a, pos, ln, strict=True)]
    if ty[0] == "u":
        got = run(
            sim,
            f"bfi.b{bits} o0, i0, i1, i2, i3;",
            [(t, a), (t, b), ("u32", pos), ("u32", ln)],
            [t],
            N,
        )

        def bfi(v, f, p, lane):
            d = int(f)
            for i in range(int(lane)):
                if p + i < bits:
                    d = (d & ~(1 << int(p + i))) | (((int(v) >> i) & 1) << int(p + i))
            return d

        assert [int(v) for v in got] == [bfi(*z) for z in zip(a, b, pos, ln, strict=True)]


def test_prmt(sim):
    sel = rng.integers(0, 65536, N).astype(np.uint32)
    got = run(
        sim, "prmt.b32 o0, i0, i1, i2;", [("u32", U32), ("u32", V32), ("u32", sel)], ["u32"], N
    )

    def ref(a, b, s):
        by = struct.pack("<II", int(a), int(b))
        out = 0
        for k in range(4):
            q = (int(s) >> (4 * k)) & 15
            v = by[q & 7]
            if q & 8:  # the sign of the byte, replicated
                v = 0xFF if v & 0x80 else 0
            out |= v << (8 * k)
        return out

    assert [int(v) for v in got] == [ref(*z) for z in zip(U32, V32, sel, strict=True)]


@pytest.mark.parametrize("ta,tb", [("s32", "s32"), ("u32", "s32"), ("s32", "u32"), ("u32", "u32")])
def test_dp4a(sim, ta, tb):
    got = run(
        sim,
        f"dp4a.{ta}.{tb} o0, i0, i1, i2;",
        [("u32", U32), ("u32", V32), ("u32", W32)],
        ["u32"],
        N,
    )
    f = {"s32": np.int8, "u32": np.uint8}
    a, b = (
        U32.view(f[ta]).reshape(N, 4).astype(np.int64),
        V32.view(f[tb]).reshape(N, 4).astype(np.int64),
    )
    assert np.array_equal(
        got, ((a * b).sum(1) + W32.astype(np.int64)).astype(np.uint64).astype(np.uint32)
    )
