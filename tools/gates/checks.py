"""The checks of the gates: each returns what is wrong with a kernel, or None."""

from __future__ import annotations

from collections.abc import Callable

from tools.gates.occupancy import LIMITS, blocks_per_sm, code_for
from tools.gates.sass import Kernel, widths

Check = Callable[[Kernel], str | None]


def no_stack(kernel: Kernel) -> str | None:
    return f"{kernel.stack} bytes of stack frame" if kernel.stack else None


def no_local(kernel: Kernel) -> str | None:
    found = kernel.code.local
    return f"{found} loads and stores of local memory" if found else None


def loads(bits: int, least: int = 1) -> Check:
    """At least `least` loads of `bits` bits from global memory, into registers or shared memory."""

    def check(kernel: Kernel) -> str | None:
        code = kernel.code
        if code.loads.get(bits, 0) + code.copies.get(bits, 0) >= least:
            return None
        return f"{widths(code.loads)} loads (instructions x bits), not {least}x{bits} or more"

    return check


def no_loads(bits: int) -> Check:
    """No loads of `bits` bits from global memory."""

    def check(kernel: Kernel) -> str | None:
        found = kernel.code.loads.get(bits, 0)
        return f"{found} loads of {bits} bits" if found else None

    return check


def undivided_stores(kernel: Kernel) -> str | None:
    """A GEMM stores single float32 and single 16-bit results at as many places each, and the ticket of a tile at one.

    So further 4-byte stores are pieces of 16-byte stores that nvcc has split.
    """
    wide, narrow = kernel.code.stores.get(32, 0), kernel.code.stores.get(16, 0)
    return f"{wide} stores of 4 bytes, {narrow} of 2" if wide > narrow + 1 else None


def uses(instruction: str) -> Check:
    """At least one `instruction`, which is one of sass.COUNTED."""

    def check(kernel: Kernel) -> str | None:
        return None if kernel.code.counts.get(instruction) else f"no {instruction}"

    return check


def wgmma_in_flight(kernel: Kernel) -> str | None:
    total, waiting = kernel.code.counts.get("IGMMA", 0), kernel.code.waiting_igmma
    return f"each of {total} IGMMA is waited for" if total > 1 and waiting == total else None


def waits_first(*allowed: str) -> Check:
    """A kernel that may start before the preceding kernel ends waits before it reads or writes global memory.

    Args:
        allowed: instructions that may and must come before the wait, such as the copies of weights.
    """

    def check(kernel: Kernel) -> str | None:
        if not kernel.code.overlaps:
            return "no wait for the preceding kernel (ACQBULK)"
        early = {name: n for name, n in kernel.code.early.items() if name not in allowed}
        if early:
            listed = ", ".join(f"{number} {name}" for name, number in early.items())
            return f"{listed} can come before any wait"
        missing = [name for name in allowed if name not in kernel.code.early]
        return f"no {missing[0]} before the wait" if missing else None

    return check


def fresh_loads(kernel: Kernel) -> str | None:
    return (
        None if kernel.code.fresh_loads else "no load from L2 of what others write (LDG.STRONG.GPU)"
    )


def at_most(kib: int) -> Check:
    """At most this much code."""

    def check(kernel: Kernel) -> str | None:
        size = kernel.code.size
        return f"{size / 1024:.1f} KiB of code" if size > kib * 1024 else None

    return check


def unpacks(most: int) -> Check:
    """At most `most` instructions for four weights of 4 bits."""

    def check(kernel: Kernel) -> str | None:
        fours, instructions = kernel.code.unpacking
        if fours == 0:
            return "no mask of half a byte, with which weights of 4 bits are unpacked"
        if instructions <= most * fours:
            return None
        return f"{instructions} instructions unpack {fours} times 4 weights"

    return check


def launchable(kernel: Kernel) -> str | None:
    """A block of the largest size fits every GPU of the table that may run this code."""
    for device in LIMITS:
        if code_for(device, {kernel.arch}) and not blocks_per_sm(LIMITS[device], *kernel.used):
            assumed = "" if kernel.bounded else " (assumed: it has no launch bounds)"
            return (
                f"{kernel.registers} registers x {kernel.max_threads} threads{assumed} and "
                f"{kernel.shared} bytes of shared memory do not fit {device}"
            )
    return None
