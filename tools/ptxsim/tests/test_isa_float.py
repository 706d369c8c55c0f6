"""Single PTX instructions against independent references: float32 and comparisons."""

import math
from fractions import Fraction

import numpy as np
import pytest
from isa_values import FA, FB, FC, N, rnd, same
from single_instruction import run


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "div", "sqrt", "rcp"])
def test_f32_rounding(sim, op, mode):
    nsrc = {"fma": 3, "sqrt": 1, "rcp": 1}.get(op, 2)
    a = np.abs(FA) if op == "sqrt" else FA
    got = run(
        sim,
        f"{op}.{mode}.f32 o0, " + ", ".join(["i0", "i1", "i2"][:nsrc]) + ";",
        [("f32", a), ("f32", FB), ("f32", FC)],
        ["f32"],
        N,
    )
    for x, y, z, g in zip(a, FB, FC, got, strict=True):
        v = [float(x), float(y), float(z)][:nsrc]
        if (
            not all(map(math.isfinite, v))
            or (op == "div" and v[1] == 0)
            or (op == "rcp" and v[0] == 0)
        ):
            continue
        f = [Fraction(t) for t in v]
        if op == "sqrt":
            if f[0] == 0:
                continue
            sc = 1 << 200
            k = math.isqrt(f[0].numerator * sc * sc // f[0].denominator)
            e = Fraction(k, sc)
            if e * e != f[0]:
                e += Fraction(1, sc * 4)  # sticky
        else:
            e = {
                "add": lambda f: f[0] + f[1],
                "sub": lambda f: f[0] - f[1],
                "mul": lambda f: f[0] * f[1],
                "fma": lambda f: f[0] * f[1] + f[2],
                "div": lambda f: f[0] / f[1],
                "rcp": lambda f: 1 / f[0],
            }[op](f)
        ref = rnd(e, -126, 23, 127, mode)
        assert float(g) == ref, (op, mode, v, float(g), ref)


def test_f32_special(sim):
    with np.errstate(all="ignore"):
        assert same(
            run(sim, "add.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["f32"], N), FA + FB
        )
        assert same(
            run(sim, "mul.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["f32"], N), FA * FB
        )
        d = run(sim, "div.rn.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["f32"], N)
        assert same(d, FA / FB)
        # NaN results are canonical
        assert set(
            run(sim, "add.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["u32"], N)[
                np.isnan(FA + FB)
            ]
        ) == {0x7FFFFFFF}

        def z(x):
            return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)

        assert same(
            run(sim, "mul.ftz.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["f32"], N),
            z(z(FA) * z(FB)),
        )
        m = run(sim, "mul.sat.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["f32"], N)
        assert same(m, np.where(np.isnan(FA * FB), 0, np.clip(FA * FB, 0, 1)) + np.float32(0))


def test_minmax(sim):
    def mm(a, b, mx, nan=False):
        a, b = float(a), float(b)
        if math.isnan(a) or math.isnan(b):
            return (
                math.nan
                if nan or (math.isnan(a) and math.isnan(b))
                else (b if math.isnan(a) else a)
            )
        if a == b == 0:
            s = [math.copysign(1, a), math.copysign(1, b)]
            return math.copysign(0.0, max(s) if mx else min(s))
        return max(a, b) if mx else min(a, b)

    for op, mx in (("min", 0), ("max", 1)):
        for nan in ("", ".NaN"):
            g = run(sim, f"{op}{nan}.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["f32"], N)
            assert same(
                g,
                np.array(
                    [mm(a, b, mx, bool(nan)) for a, b in zip(FA, FB, strict=True)], np.float32
                ),
            )
    g = run(sim, "max.xorsign.abs.f32 o0, i0, i1;", [("f32", FA), ("f32", FB)], ["f32"], N)
    r = [
        mm(abs(a), abs(b), 1) * (-1 if np.signbit(a) != np.signbit(b) else 1)
        for a, b in zip(FA, FB, strict=True)
    ]
    ok = ~(np.isnan(FA) | np.isnan(FB))
    assert same(g[ok], np.array(r, np.float32)[ok])


def test_approx(sim):
    x = np.abs(FA[np.isfinite(FA) & (np.abs(FA) > 1e-30) & (np.abs(FA) < 1e30)])[:64]
    n = x.size
    for op, f in {
        "rcp.approx.f32": lambda v: 1 / v,
        "rsqrt.approx.f32": lambda v: 1 / np.sqrt(v),
        "sqrt.approx.f32": np.sqrt,
        "lg2.approx.f32": np.log2,
        "ex2.approx.ftz.f32": lambda v: np.exp2(v),
        "tanh.approx.f32": np.tanh,
        "sin.approx.f32": np.sin,
    }.items():
        v = np.minimum(x, 100).astype(np.float32)
        with np.errstate(over="ignore"):
            r = f(v.astype(np.float64)).astype(np.float32)
        assert same(run(sim, f"{op} o0, i0;", [("f32", v)], ["f32"], n), r), op


def test_setp_nan(sim):
    cmp = {
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b and a == a and b == b,
        "lt": lambda a, b: a < b,
        "ltu": lambda a, b: not a >= b,
        "geu": lambda a, b: not a < b,
        "equ": lambda a, b: a == b or a != a or b != b,
        "neu": lambda a, b: a != b,
        "num": lambda a, b: a == a and b == b,
        "nan": lambda a, b: a != a or b != b,
    }
    for k, f in cmp.items():
        g = run(
            sim,
            f"setp.{k}.f32 p, i0, i1; selp.u32 o0, 1, 0, p;",
            [("f32", FA), ("f32", FB)],
            ["u32"],
            N,
        )
        assert [int(v) for v in g] == [
            int(f(float(a), float(b))) for a, b in zip(FA, FB, strict=True)
        ], k
