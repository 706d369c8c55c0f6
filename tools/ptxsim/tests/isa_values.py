"""Inputs and reference arithmetic that the tests of instructions share."""

import math
from fractions import Fraction

import numpy as np

rng = np.random.default_rng(3)
#: Elements of each test.
N = 128
U32 = np.concatenate(
    [
        np.array(
            [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFF, 0x8080, 0x12345678],
            np.uint32,
        ),
        rng.integers(0, 1 << 32, 116, dtype=np.uint64).astype(np.uint32),
    ]
)
V32 = np.roll(U32, 7)
W32 = np.roll(U32, 31)
SH = np.concatenate([np.arange(0, 70), rng.integers(0, 256, 58)]).astype(np.uint32)


def s32(x):
    return x.astype(np.uint32).view(np.int32).astype(object)


def wrap(x, bits=32):
    return np.array([int(v) & ((1 << bits) - 1) for v in x], dtype=np.uint64)


SPECIAL = np.array(
    [
        0x00000000,
        0x80000000,
        0x3F800000,
        0xBF800000,
        0x7F800000,
        0xFF800000,
        0x7FC00000,
        0x00000001,
        0x80000001,
        0x007FFFFF,
        0x00800000,
        0x7F7FFFFF,
        0x477FE000,
        0x477FEFFF,
        0x477FF000,
        0x33800000,
        0x33000000,
        0x33000001,
        0x387FC000,
        0x3F000000,
        0x3FC00000,
        0x40200000,
        0xC0200000,
        0x42FE0000,
        0x42FEFFFF,
        0x42FF0000,
        0xC3000000,
        0xC3008000,
        0x43800000,
        0x4EFFFFFF,
        0x4F000000,
        0xCF000000,
        0x4F800000,
    ],
    np.uint32,
).view(np.float32)
FA = np.concatenate(
    [
        SPECIAL,
        (rng.standard_normal(60) * 10.0 ** rng.integers(-6, 6, 60)).astype(np.float32),
        rng.integers(0, 1 << 32, N - 60 - SPECIAL.size, dtype=np.uint64)
        .astype(np.uint32)
        .view(np.float32),
    ]
)
FB = np.roll(FA, 11)
FC = np.roll(FA, 29)


def same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.all((a == b) & (np.signbit(a) == np.signbit(b)) | (np.isnan(a) & np.isnan(b)))


def rnd(x, emin, mant, emax, mode):
    """Rounds a finite Fraction to a binary float with `mant` fraction bits; returns a float (inf on overflow)."""
    if x == 0:
        return 0.0
    s, a = (-1 if x < 0 else 1), abs(x)
    e = max(a.numerator.bit_length() - a.denominator.bit_length(), emin - 2)
    while Fraction(2) ** (e + 1) <= a:
        e += 1
    while e > emin and Fraction(2) ** e > a:
        e -= 1
    e = max(e, emin)
    ulp = Fraction(2) ** (e - mant)
    q = a / ulp
    f, r = q.numerator // q.denominator, q - q.numerator // q.denominator
    up = {
        "rn": r > Fraction(1, 2) or (r == Fraction(1, 2) and f & 1),
        "rz": False,
        "rm": s < 0 and r > 0,
        "rp": s > 0 and r > 0,
        "rna": r >= Fraction(1, 2),
    }[mode]
    v = (f + int(up)) * ulp
    if v >= Fraction(2) ** (emax + 1):
        to_inf = {"rn": True, "rna": True, "rz": False, "rm": s < 0, "rp": s > 0}[mode]
        return s * (
            math.inf
            if to_inf
            else float((Fraction(2) - Fraction(2) ** -mant) * Fraction(2) ** emax)
        )
    return s * float(v)


FMT = {"f16": (-14, 10, 15), "bf16": (-126, 7, 127)}


def dec(bits, fmt):
    emin, m, emax = FMT[fmt]
    eb = 15 - m
    s, e, f = bits >> 15, (bits >> m) & ((1 << eb) - 1), bits & ((1 << m) - 1)
    if e == (1 << eb) - 1:
        v = math.nan if f else math.inf
    elif e == 0:
        v = math.ldexp(f, emin - m)
    else:
        v = math.ldexp(f + (1 << m), e - emax - m)
    return -v if s else v


def registers(first, count):
    """An operand of several input registers, {i0, i1, ...}."""
    return "{" + ", ".join(f"i{first + k}" for k in range(count)) + "}"
