"""Keeps a process off instructions that its processor has, and measures the clock that the processor runs at.

A library picks its kernels by cpuid and offers a switch, or none. AMX has one switch for all of them: a process
must ask Linux for the tiles (`arch_prctl`), and every library that is refused takes its next kernels. So a filter that
refuses the request shows how all of them run on a processor with AVX512-VNNI and without AMX. Caches, memory and clocks
remain those of the processor that is there.

    python -m benchmarks.lib.cpu_isa avx512_vnni python -m benchmarks.model --device cpu

runs any command so. Processes of other environments import this file: it needs the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

#: Level -> variables that the libraries with a switch read. oneDNN: PyTorch, vLLM and OpenVINO; MKL and ATen: PyTorch.
ISAS: dict[str, dict[str, str]] = {
    "native": {},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
#: What a user may have set: it belongs to the results.
RESTRICTING = (
    "SMOOTHQUANT_KERNELS_CPU", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MLAS_DISABLE_AMX", "OMP_NUM_THREADS", "KMP_AFFINITY",
)  # fmt: skip
FLAGS = (
    "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm",
)  # fmt: skip
#: Multiply-adds of int8 per clock and core: of a processor with `vpdpbusd` in two 512-bit units, and of AMX.
PEAK_PER_CLOCK = {"avx512_vnni": 2 * 64, "vnni": 2 * 64, "amx": 1024}

ROOT = Path(__file__).resolve().parents[2]
_LEVEL = "SQK_BENCHMARK_ISA"  # in the environment of a program that runs at a level
_X86 = platform.machine() in ("x86_64", "AMD64")
_ARCH_PRCTL, _GET_XCOMP_PERM, _REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1022, 0x1023, 18


def flags() -> list[str]:
    """Those of FLAGS that this processor has."""
    lines = _read("/proc/cpuinfo").splitlines()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return [flag for flag in FLAGS if flag in found.split()]


def l2_bytes() -> int:
    text = _read("/sys/devices/system/cpu/cpu0/cache/index2/size").strip()
    units = {"K": 2**10, "M": 2**20}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else 2 * 2**20


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


# --- restrictions -----------------------------------------------------------------------------------------------------


class _Instruction(ctypes.Structure):
    """Of a filter in the language of Linux's socket filters."""

    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # the second: the call returns EPERM
_FILTER = (
    (_LOAD, 0, 0, 0),  # the number of the system call
    (_EQUAL, 0, 3, _ARCH_PRCTL),
    (_LOAD, 0, 0, 16),  # its first argument, the lower half
    (_EQUAL, 0, 1, _REQ_XCOMP_PERM),
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _ALLOW),
)


def amx_allowed() -> bool:
    """Asks for the tiles, which a process then has for its life."""
    libc = ctypes.CDLL(None, use_errno=True)
    return _X86 and libc.syscall(_ARCH_PRCTL, _REQ_XCOMP_PERM, _XTILEDATA) == 0


def _amx_granted() -> bool:
    """Whether this process has asked already; it cannot give the tiles back."""
    found = ctypes.c_uint64()
    libc = ctypes.CDLL(None, use_errno=True)
    asked = libc.syscall(_ARCH_PRCTL, _GET_XCOMP_PERM, ctypes.byref(found))
    return asked == 0 and bool(found.value >> _XTILEDATA & 1)


def refuse_amx() -> None:
    """Makes Linux refuse the AMX tiles to this process and its children; it cannot be undone.

    Raises:
        OSError: this system allows no such filter, or the process has the tiles already.
    """
    if "amx_tile" not in flags():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    program = (_Instruction * len(_FILTER))(*(_Instruction(*fields) for fields in _FILTER))
    filters = _Program(len(_FILTER), program)
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(
        seccomp, filter_mode, ctypes.byref(filters), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "Linux accepts no filter of system calls here")
    if amx_allowed() or _amx_granted():
        raise OSError("AMX is still allowed")


def environment(isa: str, native_kernels: bool) -> dict[str, str]:
    """The variables of a process at a level; this package's compiled kernels have a switch of their own."""
    own = {"SMOOTHQUANT_KERNELS_CPU": isa} if native_kernels and isa != "native" else {}
    return ISAS[isa] | own


def facts() -> dict[str, Any]:
    """What results need beside them: instructions, and what keeps libraries from them."""
    found: dict[str, Any] = {"flags": flags(), "l2_kib": l2_bytes() // 1024}
    found["environment"] = {name: os.environ[name] for name in RESTRICTING if name in os.environ}
    if "amx_tile" in found["flags"]:
        found["amx_allowed"] = amx_allowed()
    return found


# --- the clock --------------------------------------------------------------------------------------------------------

#: Each multiplication waits for the one before it. A 64-bit `imul` takes 3 clocks on every x86 processor with AVX2.
CHAIN = """
#include <stdint.h>
void chain(int64_t steps) {
  uint64_t x = 3, by = 5;
  for (int64_t i = 0; i < steps; ++i) __asm__ volatile("imul %1, %0" : "+r"(x) : "r"(by));
}
"""
CLOCKS_PER_STEP = 3
STEPS = 300_000  # some 0.3 ms


def build_chain() -> Path | None:
    """The chain as a library in a folder of its own; None without a C compiler or on another architecture."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), "")
    if not (compiler and _X86):
        return None
    folder = Path(mkdtemp(prefix="clock-"))
    source, library = folder / "chain.c", folder / "chain.so"
    source.write_text(CHAIN)
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    return None if subprocess.run(command, capture_output=True).returncode else library


class Clock:
    """GHz of the core that calls it, now: the time stamp counter counts at one rate whatever the clock."""

    def __init__(self, library: Path) -> None:
        self._chain = ctypes.CDLL(str(library)).chain
        self._chain.argtypes = (ctypes.c_int64,)

    def __call__(self) -> float:
        start = time.perf_counter_ns()
        self._chain(STEPS)
        return STEPS * CLOCKS_PER_STEP / (time.perf_counter_ns() - start)


def keep_to(isa: str) -> None:
    """Starts this program anew at a level, unless it runs at that level already: libraries ask when they are loaded."""
    if isa not in ("native", os.environ.get(_LEVEL)):
        main([isa, sys.executable, *sys.orig_argv[1:]])


def main(arguments: list[str]) -> None:
    """Runs a command at a level: a level, then the command."""
    if len(arguments) < 2 or arguments[0] not in ISAS:
        sys.exit(f"usage: python -m benchmarks.lib.cpu_isa {{{','.join(ISAS)}}} COMMAND ...")
    isa, *command = arguments
    if isa != "native":
        refuse_amx()
    native_kernels = (ROOT / "smoothquant_kernels" / "backends" / "cpu_native.py").exists()
    level = {**environment(isa, native_kernels), _LEVEL: isa}
    os.execvpe(command[0], command, {**os.environ, **level})


if __name__ == "__main__":
    main(sys.argv[1:])
