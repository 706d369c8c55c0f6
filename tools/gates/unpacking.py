"""What a kernel spends on unpacking weights of 4 bits, by following values through its instructions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    guard: str  # "!P0"; "" for none
    opcode: str  # with its modifiers
    operands: str


#: The halves of four bytes. An instruction with one of them begins with four weights.
_MASK = re.compile(r"\b0xf0f0f0f0?\b")
#: What consumes weights: tensor cores, stores.
_SINKS = ("IMMA", "IGMMA", "HMMA", "STS", "STG", "STL", "LDGSTS")
_LOADS = ("LDS", "LDSM", "LDG", "LDL", "LDC", "IMMA", "IGMMA", "HMMA")
_NO_RESULT = (*_SINKS[3:], "BRA", "EXIT", "BAR", "RED", "DEPBAR", "NOP")
_PREDICATE = re.compile(r"\s*!?U?P[T\d]")
#: Multiply-adds whose addend is two registers.
_WIDE = ("IMAD.HI", "IMAD.WIDE")


class Unpacking(NamedTuple):
    """How many times four weights are unpacked, and all the instructions that it takes."""

    fours: int
    instructions: int


def _registers(operand: str, count: int = 1) -> list[int]:
    found = re.search(r"\bR(\d+)\b", operand)
    return [int(found[1]) + i for i in range(count)] if found else []


def _is_move(one: Instruction) -> bool:
    """A copy of a register or a zero, in the forms that ptxas writes it."""
    if one.opcode.startswith(("MOV", "IMAD.MOV")):
        return True
    return (
        one.opcode.startswith(("IADD3", "IMAD.IADD"))
        and len(re.findall(r"\bRZ\b", one.operands)) >= 2
    )


def _width(opcode: str) -> int:
    """How many registers an instruction writes."""
    name = opcode.split(".")[0]
    if name == "LDSM":
        return 4 if opcode.endswith(".4") else 2 if opcode.endswith(".2") else 1
    if name in ("IMMA", "HMMA") or ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode else 1


class _Scan:
    """Which registers hold weights that are being unpacked, and which instructions have computed the other ones."""

    def __init__(self) -> None:
        self.holds: set[int] = set()  # weights, between the mask and a sink
        self.made: dict[int, Instruction] = {}  # by a register's number; not of loads
        self.used: set[int] = set()  # addresses
        self.masks: set[int] = set()

    def step(self, one: Instruction) -> None:
        name = one.opcode.split(".")[0]
        operands = [part for part in one.operands.split(",") if not _PREDICATE.match(part)]
        result = []
        if name not in _NO_RESULT and operands:
            result = _registers(operands.pop(0), _width(one.opcode))
        read = {register for part in operands for register in _registers(part)}
        begins = name == "LOP3" and bool(_MASK.search(one.operands))
        weights = begins or (bool(read & self.holds) and name not in _SINKS)
        if weights:
            self.used.add(one.address)
        if begins:
            self.masks.add(one.address)
            # What comes between the load and the mask, such as a shift.
            self.used |= {self.made[register].address for register in read if register in self.made}
        elif weights and one.opcode.startswith(_WIDE):
            # A move that only puts an addend next to another register is a part of the price.
            addend = [self.made.get(register) for register in _registers(operands[-1], 2)]
            self.used |= {move.address for move in addend if move and _is_move(move)}
        for register in result:
            self.made.pop(register, None)
            self.holds.discard(register)
        if weights:
            self.holds.update(result)
        elif name not in _LOADS:
            self.made.update(dict.fromkeys(result, one))


def unpacking(code: Sequence[Instruction]) -> Unpacking:
    """Counts what lies between the loads of weights and the tensor cores, once per instruction.

    The instructions are followed in their order, twice: at the start of a loop some registers hold what its end has
    put there.
    """
    scan = _Scan()
    if any(_MASK.search(one.operands) for one in code):
        for one in (*code, *code):
            scan.step(one)
    return Unpacking(len(scan.masks), len(scan.used))
