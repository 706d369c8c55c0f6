"""The gates of kernels that process rows: all that a thread keeps in registers is read in 16-byte loads."""

from __future__ import annotations

from tools.gates.checks import loads
from tools.gates.gate import Gate

# The quantizers' kernels: row_kernel<type, (sqk::Producer)number, (sqk::QuantizePath)number, ...>.
ROW_KERNEL = r"\brow_kernel<(?:{}), \(sqk::Producer\)[{}], \(sqk::QuantizePath\)[{}][,>]"
HALVES = "__half|__nv_bfloat16"
ROW_TYPES = (("float", 32), (HALVES, 16))  # bits of an element
# Producers, with their number of inputs and of parameters other than the smoothing factors. From 3 on
# they are activation functions.
ROW_PRODUCERS = (("0", 1, 0), ("1", 2, 1), ("2", 2, 2), ("3-9", 2, 0))
# Paths, with the elements in a thread's registers by their bits (csrc/quantize/table.h), and an
# architecture. QuantizePath 4 is left out, because it reads one element at a time.
ROW_PATHS = (
    ("1", {16: 8, 32: 8}, ""),
    ("02", {16: 32, 32: 32}, ""),
    ("3", {16: 48, 32: 32}, ""),
    ("5", {16: 8, 32: 8}, "sm_90a"),
)


def row_gates() -> tuple[Gate, ...]:
    """All that a thread keeps in registers is read in 16-byte loads. Parameters are float32."""
    return tuple(
        Gate(
            "16-byte loads",
            loads(128, inputs * floats[bits] * bits // 128 + (1 + parameters) * floats[bits] // 4),
            "the name promises that rows are read 16 bytes at a time.",
            kernels=ROW_KERNEL.format(types, producers, paths),
            archs=archs,
        )
        for types, bits in ROW_TYPES
        for producers, inputs, parameters in ROW_PRODUCERS
        for paths, floats, archs in ROW_PATHS
    )


# The writer of an int8 cache: kv_append_kernel<type, reads 16 bytes at a time>.
APPEND = r"\bkv_append_kernel<(?:{}), (?:\(bool\)1|true)>"


def append_gates() -> tuple[Gate, ...]:
    """A lane's 8 channels and their partners of the rope, cos and sin in each of three types, and the factors."""
    tables, factors = 2 * (2 + 1 + 1), 2
    return tuple(
        Gate(
            "16-byte loads",
            loads(128, 2 * bits // 16 + tables + factors),
            "the second template argument promises that rows are read 16 bytes at a time.",
            kernels=APPEND.format(types),
        )
        for types, bits in ROW_TYPES
    )


# The sums of each token's results by experts: combine_experts_kernel<type, reads 16 bytes at a time>.
COMBINE = r"\bcombine_experts_kernel<(?:{}), (?:\(bool\)1|true)>"


def combine_gates() -> tuple[Gate, ...]:
    """What a thread reads of a result."""
    return tuple(
        Gate(
            "16-byte loads",
            loads(128),
            "the second template argument promises that rows are read 16 bytes at a time.",
            kernels=COMBINE.format(types),
        )
        for types, _ in ROW_TYPES
    )
