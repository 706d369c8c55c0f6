"""Single PTX instructions against independent references: conversions and the short floating-point types."""

import math
from fractions import Fraction

import numpy as np
import pytest
from isa_values import FA, FB, FMT, U32, N, dec, rnd, same
from single_instruction import run

rng = np.random.default_rng(5)


@pytest.mark.parametrize("dst", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_int(sim, dst, mode):
    sat = ".sat" if dst[1:] in ("8", "16") else ""
    out = {"8": "u32", "16": "u16", "32": "u32", "64": "u64"}[dst[1:]]
    g = run(sim, f"cvt.{mode}{sat}.{dst}.f32 o0, i0;", [("f32", FA)], [out], N)
    bits = int(dst[1:])
    lo, hi = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dst[0] == "s" else (0, (1 << bits) - 1)
    fn = {
        "rni": lambda x: round(Fraction(x)),
        "rzi": math.trunc,
        "rmi": math.floor,
        "rpi": math.ceil,
    }[mode]
    for x, v in zip(FA, g, strict=True):
        x = float(x)
        r = (
            (1 << (bits - 1) if bits == 64 else 0)
            if math.isnan(x)
            else hi
            if x == math.inf
            else lo
            if x == -math.inf
            else max(lo, min(hi, fn(x)))
        )
        w = 32 if bits == 8 else bits
        assert int(v) == r & ((1 << w) - 1), (x, int(v), r)


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_float_to_half(sim, fmt, mode):
    if fmt == "bf16" and mode in ("rm", "rp"):
        pytest.skip("not a PTX form")
    g = run(sim, f"cvt.{mode}.{fmt}.f32 o0, i0;", [("f32", FA)], ["u16"], N)
    emin, m, emax = FMT[fmt]
    for x, v in zip(FA, g, strict=True):
        x, y = float(x), dec(int(v), fmt)
        if math.isnan(x):
            assert int(v) == 0x7FFF
        elif math.isinf(x):
            assert y == x
        else:
            assert y == rnd(Fraction(x), emin, m, emax, mode) and (
                y != 0 or math.copysign(1, y) == math.copysign(1, x)
            )
    if mode == "rn":
        g2 = run(sim, f"cvt.rn.{fmt}x2.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["u32"], N)
        h = run(sim, f"cvt.rn.{fmt}.f32 o0, i0;", [("f32", FB)], ["u16"], N)
        assert np.array_equal(g2 >> 16, g) and np.array_equal(g2 & 0xFFFF, h)
        back = run(sim, f"cvt.f32.{fmt} o0, i0;", [("u16", g)], ["f32"], N)
        assert same(back, np.array([dec(int(v), fmt) for v in g], np.float32))


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_half_arithmetic(sim, fmt):
    emin, m, emax = FMT[fmt]
    a, b, c = (rng.integers(0, 65536, N).astype(np.uint16) for _ in range(3))
    for op, f in {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "fma.rn": lambda x, y, z: x * y + z,
    }.items():
        g = run(
            sim,
            f"{op}.{fmt} o0, i0, i1{', i2' if op[0] == 'f' else ''};",
            [("u16", a), ("u16", b), ("u16", c)],
            ["u16"],
            N,
        )
        for p, q, r, v in zip(a, b, c, g, strict=True):
            x, y, z = dec(int(p), fmt), dec(int(q), fmt), dec(int(r), fmt)
            if all(map(math.isfinite, (x, y, z))):
                assert dec(int(v), fmt) == rnd(
                    f(Fraction(x), Fraction(y), Fraction(z)), emin, m, emax, "rn"
                ), (op, x, y, z)
    ab, cc = (
        a.astype(np.uint32) | (b.astype(np.uint32) << 16),
        c.astype(np.uint32) | (a.astype(np.uint32) << 16),
    )
    g = run(sim, f"fma.rn.{fmt}x2 o0, i0, i1, i0;", [("u32", ab), ("u32", cc)], ["u32"], N)
    lo = run(sim, f"fma.rn.{fmt} o0, i0, i1, i0;", [("u16", a), ("u16", c)], ["u16"], N)
    hi = run(sim, f"fma.rn.{fmt} o0, i0, i1, i0;", [("u16", b), ("u16", a)], ["u16"], N)
    assert np.array_equal(g & 0xFFFF, lo) and np.array_equal(g >> 16, hi)


def test_fp8(sim):
    for t, (emin, m, emax, mx) in {
        "e4m3": (-6, 3, 8, 448.0),
        "e5m2": (-14, 2, 15, 57344.0),
    }.items():
        g = run(
            sim,
            f"cvt.rn.satfinite.{t}x2.f32 h0, i0, i1; cvt.u32.u16 o0, h0;",
            [("f32", FA), ("f32", FB)],
            ["u32"],
            N,
        )

        def d8(b, m=m, emin=emin):
            s, e, f = b >> 7, (b & 0x7F) >> m, b & ((1 << m) - 1)
            v = math.ldexp(f, emin - m) if e == 0 else math.ldexp(f + (1 << m), e + emin - 1 - m)
            return -v if s else v

        for x, y, v in zip(FA, FB, g, strict=True):
            for f, by in ((float(x), int(v) >> 8), (float(y), int(v) & 0xFF)):
                if math.isnan(f):
                    assert by & 0x7F == 0x7F
                else:
                    r = (
                        math.copysign(mx, f)
                        if math.isinf(f)
                        else max(-mx, min(mx, rnd(Fraction(f), emin, m, emax + 1, "rn")))
                    )
                    assert d8(by) == r, (f, by, r)
        h = run(sim, f"cvt.u16.u32 h0, i0; cvt.rn.f16x2.{t}x2 o0, h0;", [("u32", g)], ["u32"], N)
        for v, w in zip(g, h, strict=True):
            if int(v) & 0x7F != 0x7F:
                assert dec(int(w) & 0xFFFF, "f16") == d8(int(v) & 0xFF)


def test_int_to_float(sim):
    a = U32.view(np.int32)
    assert np.array_equal(
        run(sim, "cvt.rn.f32.s32 o0, i0;", [("s32", a)], ["f32"], N), a.astype(np.float32)
    )
    assert np.array_equal(
        run(sim, "cvt.rn.f32.u32 o0, i0;", [("u32", U32)], ["f32"], N), U32.astype(np.float32)
    )
    for md in ("rz", "rm", "rp"):
        g = run(sim, f"cvt.{md}.f32.s32 o0, i0;", [("s32", a)], ["f32"], N)
        assert [float(v) for v in g] == [rnd(Fraction(int(x)), -126, 23, 127, md) for x in a]
    g = run(sim, "cvt.rn.f16.s32 o0, i0;", [("s32", (a % 70000).astype(np.int32))], ["u16"], N)
    assert [dec(int(v), "f16") for v in g] == [
        rnd(Fraction(int(x)), -14, 10, 15, "rn") for x in (a % 70000).astype(np.int32)
    ]
