"""The inputs of the static gates: cuobjdump's output, kernel names, and occupancies computed by hand."""

from __future__ import annotations

import pytest

from tools.build.plan import parse_archs
from tools.gates import occupancy, sass
from tools.gates.sass import Code, Kernel

# ------------------------------------------------------------------------- the output of cuobjdump

RESOURCES = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _Z6callerPf:
  REG:32 STACK:80 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_80
code version = [9,0]

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z6callerPf:
  REG:30 STACK:0 SHARED:1152 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = """
Fatbin elf code:
================
arch = sm_80

   19   2d00     80  0  1                       NOBITS        3    0        0 .nv.shared._Z6callerPf

.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT
\tFormat:\tEIFMT_SVAL
\tValue:\tfunction: _Z6callerPf(0x3)\tregister count: 32

.nv.info._Z6callerPf
\t<0x1>
\tAttribute:\tEIATTR_INDIRECT_BRANCH_TARGETS
\tFormat:\tEIFMT_SVAL
\tValue:\t
\t\tOffset of Indirect Branch: 0xb6b0\t Number of targets: 3
\t\tTargets: 0xb840 0xb780 0xb6c0

\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x40 0x2 0x1


.nv.callgraph
 <0,-1>

Fatbin elf code:
================
arch = sm_90a

   19   2d00      0  0  1                       NOBITS        3    0        0 .nv.shared.reserved.0

.nv.info._Z6callerPf
\t<0x1>
\tAttribute:\tEIATTR_CUDA_API_VERSION
\tFormat:\tEIFMT_SVAL
\tValue:\t0x82
"""

SASS = """
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t.target\tsm_80

\t\tFunction : _Z6callerPf
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
                                                                             /* 0x000fe400078e00ff */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R4.64] ;          /* 0x0000000604047981 */
        /*0020*/                   LDG.E.LTC128B R9, [R28.64+0x34] ;         /* 0x000034041c097981 */
        /*0030*/              @!PT LDG.E.64 R2, [RZ] ;                       /* 0x00000000ff02f984 */
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64], P0 ; /* 0x0 */
        /*0050*/                   STL.128 [R1+0x40], R4 ;                   /* 0x0000400401007387 */
        /*0060*/                   LDL.LU R0, [R0] ;                         /* 0x0000000000007983 */
        /*0070*/                   IDP.4A.S8.S8 R5, R2, 0x7, R5 ;            /* 0x0000000702057a26 */
        /*0080*/                   IMMA.16832.S8.S8 R4, R8.ROW, R6.COL, R4 ; /* 0x0000000608047237 */
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;             /* 0x0000000000007b1d */
        /*00a0*/                   STG.E.U8 [R6.64], R9 ;                    /* 0x0000000906007986 */
        /*00b0*/                   EXIT ;                                    /* 0x000000000000794d */
\t\t..........

Fatbin elf code:
================
arch = sm_90a

\tcode for sm_90a

\t\tFunction : _Z6callerPf
        /*0100*/                   WARPGROUP.ARRIVE ;                              /* 0x0 */
        /*0110*/                   IGMMA.64x8x32.S8.S8 R24, gdesc[UR4], RZ, !UPT ; /* 0x0 */
        /*0120*/                   IGMMA.64x8x32.S8.S8 R24, gdesc[UR4], R24, gsb0 ; /* 0x0 */
        /*0130*/              @UP0 STG.E.64 desc[UR6][R2.64], R8 ;                 /* 0x0 */
\t\t..........
"""


def test_the_output_of_cuobjdump_is_read() -> None:
    ampere, hopper = sass.kernels_in(RESOURCES, ELF, SASS, {"_Z6callerPf": "caller(float*)"})
    code = Code(
        loads={128: 1, 32: 1},
        copies={128: 1},
        stores={8: 1},
        local=2,
        counts={"IMMA": 1, "IGMMA": 0, "HMMA": 0, "IDP": 1, "BAR": 1},
        size=ampere.code.size,
    )
    assert ampere == Kernel("_Z6callerPf", "caller(float*)", "sm_80", 32, 80, 0, 128, True, code)
    assert (hopper.arch, hopper.registers, hopper.stack) == ("sm_90a", 30, 0)
    assert hopper.shared == 128, "Hopper's 1024 reserved bytes are not the kernel's"
    assert (hopper.max_threads, hopper.bounded) == (1024, False)
    assert (hopper.code.counts["IGMMA"], hopper.code.waiting_igmma) == (2, 1)
    assert hopper.code.stores == {64: 1}


def sass_of(text: str) -> list[sass.Instruction]:
    """Parses lines of "address instruction" in cuobjdump's format."""
    lines = [line.split(" ", 1) for line in text.splitlines() if line]
    body = "".join(f"        /*{address.strip()}*/ {rest} ;\n" for address, rest in lines)
    return sass.parse_sass(f"\t\tFunction : f\n{body}")["f"]


PRODUCER = """
0000 ISETP.GE.U32.AND P0, PT, R9, 0x20, PT
0010 @!P0 BRA 0x100
"""
CONSUMER = """
0020 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0+URZ], R7
0030 @!P0 BRA 0x90
0040 LDG.E.STRONG.GPU R3, desc[UR4][R2.64]
0050 EXIT
0090 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0+URZ], R7
00a0 @!P0 BRA 0x90
00b0 BRA 0x40
0100 ACQBULK
0110 UTMALDG.2D [UR8], [UR4]
0120 EXIT
"""


@pytest.mark.parametrize(
    ("code", "early"),
    [
        (PRODUCER + CONSUMER, 0),
        # a load before the wait, by all threads or by some
        (PRODUCER.replace("0010", "0008 LDG.E.STRONG.GPU R3, [R2.64]\n0010") + CONSUMER, 1),
        (PRODUCER + "0018 @P1 LDG.E.128.STRONG.GPU R4, [R2.64]" + CONSUMER, 1),
        # a path around the wait, by a branch or by a guard
        (PRODUCER + "0018 @P1 BRA 0x40" + CONSUMER, 1),
        (PRODUCER + "0018 BRA !UP0, 0x40" + CONSUMER, 1),
        (PRODUCER + CONSUMER.replace("0020 SYNCS", "0020 @P1 SYNCS"), 1),
        (PRODUCER + CONSUMER.replace("0100 ACQBULK", "0100 BRA 0x40"), 1),
        # diverged threads reconverge after the wait, or before it
        (PRODUCER + "0018 BSSY B0, 0x40\n001c @P1 BSYNC B0" + CONSUMER, 1),
        (PRODUCER + "0018 BSSY B0, 0x90\n001c BSYNC B0" + CONSUMER, 0),
        # it can jump anywhere
        (PRODUCER + "0018 BRX R4 -0x20" + CONSUMER, 2),
        # other accesses, unreachable loads, and loads that are never executed
        (PRODUCER + "0018 LDG.E.CONSTANT R3, [R2.64]" + CONSUMER, 1),
        (PRODUCER + "0018 STG.E [R2.64], R3" + CONSUMER, 1),
        (PRODUCER + "0018 LDS R3, [R2]" + CONSUMER, 0),
        (PRODUCER + CONSUMER.replace("0100 ACQBULK", "0100 UTMALDG.2D [UR8], [UR4]\n0108 ACQBULK"), 1),
        (PRODUCER + "0018 BRA 0x20\n001c LDG.E.STRONG.GPU R3, [R2.64]" + CONSUMER, 0),
        (PRODUCER + "0018 @!PT LDG.E.STRONG.GPU R3, [R2.64]" + CONSUMER, 0),
        ("", 0),
    ],
)  # fmt: skip
def test_accesses_that_can_come_before_a_wait(code: str, early: int) -> None:
    instructions = sass_of(code) if code else []
    assert sum(sass.early_accesses(instructions).values()) == early
    found = sass.count(instructions)
    overlaps = "ACQBULK" in code
    assert (sum(found.early.values()), found.overlaps) == (early if overlaps else 0, overlaps)
    assert found.size == 16 * len(instructions)
    assert found.fresh_loads == code.count("STRONG") - code.count("@!PT")


# A turn of a loop of the mma.sync kernel: R20 and R21 come from shared memory, R78 and R79 are a step and an offset.
UNPACK = """
0000 LOP3.LUT R49, R20.reuse, 0xf0f0f0f0, RZ, 0xc0, !PT
0010 LOP3.LUT R20, R20, 0xf0f0f0f, RZ, 0xc0, !PT
0020 IMAD.HI.U32 R15, R24, R49, R78
0030 LDSM.16.M88.4 R48, [R21]
0040 IMAD R14, R78, R20, R79.reuse
0050 LOP3.LUT R15, R15, 0x80808080, RZ, 0x3c, !PT
0060 LOP3.LUT R14, R14, 0x80808080, RZ, 0x3c, !PT
0070 IMMA.16832.S8.S8 R36, R32.ROW, R14.COL, R36
0080 LDS.128 R20, [R57+UR5+0x1000]
0090 LDS R74, [R60+UR5+0x2000]
00a0 PRMT R78, R74, 0x4440, RZ
00b0 PRMT R79, R74, 0x1111, RZ
00c0 IMAD.SHL.U32 R24, R78, 0x10000000, RZ
00d0 IADD3 R15, R14, R15, RZ
00e0 ISETP.GE.AND P0, PT, R36, 0x5, PT
00f0 @!P0 BRA 0x0
"""


@pytest.mark.parametrize(
    ("code", "fours", "instructions"),
    [
        # what follows the tensor cores, and what sets up a step and an offset, is no part of it
        (UNPACK.replace("00d0 IADD3 R15, R14, R15, RZ\n", ""), 2, 6),
        (UNPACK.replace("00d0 IADD3 R15, R14, R15, RZ", "00d0 IADD3 R9, R8, 0x1, RZ"), 2, 6),
        # a use of weights that are there already
        (UNPACK, 2, 7),
        # the upper half of the addend is added once more, as 0
        (UNPACK.replace("0050 LOP3", "0048 IADD3 R15, R15, UR5, RZ\n0050 LOP3"), 2, 8),
        # moves that make a pair of the addend; the same as IADD3; of another register, which is no addend
        (UNPACK.replace("0020 IMAD", "0018 IMAD.MOV.U32 R78, RZ, RZ, RZ\n001c MOV R79, R9\n0020 IMAD"), 2, 9),
        (UNPACK.replace("0020 IMAD", "0018 IADD3 R78, RZ, R8, RZ\n0020 IMAD"), 2, 8),
        (UNPACK.replace("0020 IMAD", "0018 IMAD.MOV.U32 R80, RZ, RZ, RZ\n0020 IMAD"), 2, 7),
        # a shift before a mask, instead of the multiplication for the upper word
        (UNPACK.replace("0000 LOP3.LUT R49, R20.reuse", "0000 SHF.R.U32.HI R9, RZ, 4, R20\n0008 LOP3 R49, R9"), 2, 8),
        # put into a place of memory in the end
        (UNPACK.replace("0070 IMMA.16832.S8.S8 R36, R32.ROW, R14.COL, R36", "0070 STS [R36], R14"), 2, 7),
        # no weights of 4 bits
        (UNPACK.replace("0xf0f0f0f", "0xff0ff0f"), 0, 0),
        (CONSUMER, 0, 0),
    ],
)  # fmt: skip
def test_the_price_of_unpacking(code: str, fours: int, instructions: int) -> None:
    assert sass.count(sass_of(code)).unpacking == (fours, instructions)


@pytest.mark.parametrize(
    ("opcode", "bits"),
    [("LDG.E", 32), ("LDG.E.128", 128), ("LDG.E.LTC128B.64", 64), ("STG.E.U16", 16),
     ("LDG.E.S8.CONSTANT", 8), ("LDG.E.ENL2.256", 256), ("STG.E.EF.128", 128),
     ("LDG.E.STRONG.GPU", 32)],
)  # fmt: skip
def test_the_width_of_an_access(opcode: str, bits: int) -> None:
    assert sass.access_bits(opcode) == bits


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void sqk::row_kernel<__half, (sqk::Producer)0, (sqk::QuantizePath)1>(sqk::RowParams)",
            "row_kernel<__half, (Producer)0, (QuantizePath)1>",
        ),
        ("sqk::(anonymous namespace)::f(sqk::P)", "f"),
        ("sqk::_GLOBAL__N__a98d_11_saturate_cu_67::f(sqk::P)", "f"),
        ("void sqk::<unnamed>::f<int>(int)", "f<int>"),
        ("void a::k<a::G<b::T<int, 2>, c::D>>(a::G<b::T<int, 2>, c::D>::Params)", "k<G<T<int, 2>, D>>"),
        ("void k<void (*)(int)>(void (*)(int), int)", "k<void (*)(int)>"),
        ("_Z1f", "_Z1f"),
    ],
)  # fmt: skip
def test_names_are_shortened(demangled: str, short: str) -> None:
    assert sass.short_name(demangled) == short


# --------------------------------------------------------------------------------------- occupancy


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        ("sm_80", 64, 1024, 0, 1),  # 64 x 1024 is the whole register file
        ("sm_80", 65, 1024, 0, 0),  # 72 after rounding
        ("sm_80", 32, 256, 0, 8),
        ("sm_80", 33, 256, 0, 6),  # 1280 a warp: 12 warps a quarter of the file
        ("sm_80", 16, 32, 0, 32),  # the limit of blocks
        ("sm_86", 16, 32, 0, 16),
        ("sm_89", 16, 32, 0, 24),
        ("sm_89", 32, 1024, 0, 1),  # 1536 threads
        ("sm_89", 32, 512, 0, 3),
        ("sm_90", 168, 384, 0, 1),  # 5376 a warp: 3 warps a quarter, 12 in all
        ("sm_90", 169, 384, 0, 0),
        ("sm_80", 32, 100, 0, 16),  # 4 warps
        ("sm_80", 32, 128, 163 * 1024, 1),
        ("sm_80", 32, 128, 163 * 1024 + 1, 0),
        ("sm_80", 32, 128, 40 * 1024, 4),  # 41 KB each of 164
        ("sm_86", 32, 128, 49 * 1024, 2),
        ("sm_86", 32, 128, 49 * 1024 + 1, 1),
        ("sm_90", 32, 128, 227 * 1024, 1),
        ("sm_90", 32, 2048, 0, 0),
    ],
)  # fmt: skip
def test_blocks_per_multiprocessor(
    arch: str, registers: int, threads: int, shared: int, blocks: int
) -> None:
    limits = occupancy.LIMITS[arch]
    assert occupancy.blocks_per_sm(limits, registers, threads, shared) == blocks
    warps = blocks * -(-threads // 32)
    assert occupancy.warps_per_sm(limits, registers, threads, shared) == warps


def test_a_gpu_runs_the_newest_code_that_fits() -> None:
    both = {"sm_80", "sm_89", "sm_90a"}
    runs = {"sm_80": "sm_80", "sm_86": "sm_80", "sm_89": "sm_89", "sm_90": "sm_90a"}
    assert {device: occupancy.code_for(device, both) for device in runs} == runs
    assert occupancy.code_for("sm_80", {"sm_86", "sm_90a"}) is None


def test_the_gates_know_the_limits_of_all_that_a_wheel_is_compiled_for() -> None:
    archs = parse_archs(None)
    assert archs and all(occupancy.limits_of(f"sm_{arch.code}") for arch in archs)
