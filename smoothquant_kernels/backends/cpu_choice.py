"""`SMOOTHQUANT_KERNELS_CPU`: which kernels serve a CPU. All of them give the same bits."""

from __future__ import annotations

import os

from smoothquant_kernels.errors import SmoothQuantError

VARIABLE = "SMOOTHQUANT_KERNELS_CPU"
#: The instruction sets of the compiled library, from the slowest to the fastest, as in csrc/cpu/levels.h.
LEVELS = ("portable", "avx2", "avx_vnni", "avx512_vnni", "amx")
#: The ways of calling oneDNN, from the fastest to the slowest. `ONEDNN` chooses the fastest exact one.
ONEDNN = "onednn"
ONEDNN_MODES = ("onednn_vnni", "onednn_amx", "onednn_split", "onednn_float")


def wanted() -> str:
    """The variable's value: a member of `LEVELS` or `ONEDNN_MODES`, `ONEDNN`, or "auto"."""
    value = os.environ.get(VARIABLE) or "auto"
    allowed = ("auto", *reversed(LEVELS), ONEDNN, *ONEDNN_MODES)
    if value not in allowed:
        raise SmoothQuantError(f"{VARIABLE} must be one of {', '.join(allowed)}; got {value!r}.")
    return value
