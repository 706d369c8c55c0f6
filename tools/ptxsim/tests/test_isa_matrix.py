"""Single PTX instructions against independent references: mma and tensor maps."""

import ctypes as C

import numpy as np
import pytest
from isa_values import registers
from single_instruction import run

rng = np.random.default_rng(7)


@pytest.mark.parametrize("ta,tb", [("s8", "s8"), ("u8", "s8"), ("s8", "u8"), ("u8", "u8")])
@pytest.mark.parametrize("k", [16, 32])
def test_mma_int8(sim, ta, tb, k):
    dt = {"s8": np.int8, "u8": np.uint8}
    A, B = (
        rng.integers(0, 256, (16, k)).astype(np.uint8).view(dt[ta]),
        rng.integers(0, 256, (8, k)).astype(np.uint8).view(dt[tb]),
    )
    a = [
        np.array(
            [
                A.view(np.uint8)[lane // 4 + 8 * (r & 1), (r >> 1) * 16 + (lane % 4) * 4 :][
                    :4
                ].view(np.uint32)[0]
                for lane in range(32)
            ]
        )
        for r in range(k // 8)
    ]
    b = [
        np.array(
            [
                B.view(np.uint8)[lane // 4, r * 16 + (lane % 4) * 4 :][:4].view(np.uint32)[0]
                for lane in range(32)
            ]
        )
        for r in range(k // 16)
    ]
    na, nb = len(a), len(b)
    g = run(
        sim,
        f"mma.sync.aligned.m16n8k{k}.row.col.s32.{ta}.{tb}.s32 {{o0, o1, o2, o3}}, "
        f"{registers(0, na)}, {registers(na, nb)}, {{1, 1, 1, 1}};",
        [("u32", v) for v in a + b],
        ["s32"] * 4,
        32,
    )
    D = np.zeros((16, 8), np.int64)
    for lane in range(32):
        for r in range(4):
            D[lane // 4 + 8 * (r >> 1), (lane % 4) * 2 + (r & 1)] = g[r][lane]
    assert np.array_equal(D, A.astype(np.int64) @ B.astype(np.int64).T + 1)


def test_mma_s4(sim):
    A, B = rng.integers(-8, 8, (16, 64)), rng.integers(-8, 8, (8, 64))

    def pk(v):
        return np.uint32(sum((int(x) & 15) << (4 * i) for i, x in enumerate(v)))

    a = [
        np.array(
            [
                pk(A[lane // 4 + 8 * (r & 1), (r >> 1) * 32 + (lane % 4) * 8 :][:8])
                for lane in range(32)
            ]
        )
        for r in range(4)
    ]
    b = [
        np.array([pk(B[lane // 4, r * 32 + (lane % 4) * 8 :][:8]) for lane in range(32)])
        for r in range(2)
    ]
    g = run(
        sim,
        "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32 {o0, o1, o2, o3}, "
        "{i0, i1, i2, i3}, {i4, i5}, {0, 0, 0, 0};",
        [("u32", v) for v in a + b],
        ["s32"] * 4,
        32,
    )
    ref = A @ B.T
    assert all(
        g[r][lane] == ref[lane // 4 + 8 * (r >> 1), (lane % 4) * 2 + (r & 1)]
        for lane in range(32)
        for r in range(4)
    )


@pytest.mark.parametrize(
    "ty,k", [("f16", 8), ("f16", 16), ("bf16", 8), ("bf16", 16), ("tf32", 4), ("tf32", 8)]
)
def test_mma_float(sim, ty, k):
    A, B = (
        rng.integers(-16, 16, (16, k)).astype(np.float32),
        rng.integers(-16, 16, (8, k)).astype(np.float32),
    )
    es = 4 if ty == "tf32" else 2
    enc = (
        (lambda x: x.view(np.uint32))
        if es == 4
        else (lambda x: x.astype(np.float16).view(np.uint16))
        if ty == "f16"
        else (lambda x: (x.view(np.uint32) >> 16).astype(np.uint16))
    )
    Ae, Be, R = np.ascontiguousarray(enc(A)), np.ascontiguousarray(enc(B)), 4 // es
    a = [
        np.array(
            [
                Ae[lane // 4 + 8 * (r & 1), (r >> 1) * 4 * R + (lane % 4) * R :][:R]
                .copy()
                .view(np.uint32)[0]
                for lane in range(32)
            ]
        )
        for r in range(16 * k * es // 128)
    ]
    b = [
        np.array(
            [
                Be[lane // 4, r * 4 * R + (lane % 4) * R :][:R].copy().view(np.uint32)[0]
                for lane in range(32)
            ]
        )
        for r in range(8 * k * es // 128)
    ]
    na, nb = len(a), len(b)
    g = run(
        sim,
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{ty}.{ty}.f32 {{o0, o1, o2, o3}}, "
        f"{registers(0, na)}, {registers(na, nb)}, "
        "{0f3F800000, 0f3F800000, 0f3F800000, 0f3F800000};",
        [("u32", v) for v in a + b],
        ["f32"] * 4,
        32,
    )
    ref = A @ B.T + 1
    assert all(
        g[r][lane] == ref[lane // 4 + 8 * (r >> 1), (lane % 4) * 2 + (r & 1)]
        for lane in range(32)
        for r in range(4)
    )


def test_tensor_map_validation(sim, capfd):
    f = sim.rt.cuTensorMapEncodeTiled
    raw = C.create_string_buffer(256)
    tm = C.c_void_p((C.addressof(raw) + 63) & ~63)
    data = np.zeros(1 << 16, np.uint8)
    base = (data.ctypes.data + 127) & ~127

    def enc(addr=base, dims=(128, 64), strides=(128,), box=(128, 64), es=(1, 1), swz=3, dt=0, il=0):
        r = len(dims)
        return f(
            tm,
            dt,
            r,
            C.c_void_p(addr),
            (C.c_uint64 * r)(*dims),
            (C.c_uint64 * max(1, r - 1))(*strides),
            (C.c_uint32 * r)(*box),
            (C.c_uint32 * r)(*es),
            il,
            swz,
            0,
            0,
        )

    assert enc() == 0
    assert enc(addr=base + 8) == 1
    assert enc(strides=(120,)) == 1 and enc(strides=(136,)) == 1
    assert enc(box=(128, 257)) == 1 and enc(box=(0, 1)) == 1
    assert enc(box=(128, 64), swz=2) == 1  # 128 bytes exceed the 64-byte span
    assert enc(box=(64, 64), swz=2) == 0
    assert enc(box=(24, 4), swz=0) == 1  # not a multiple of 16 bytes
    assert enc(es=(9, 1)) == 1
    assert enc(dims=(0, 4)) == 1
    assert "swizzle span" in capfd.readouterr().err
