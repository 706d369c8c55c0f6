"""What a kernel spends on unpacking weights of 4 bits, by following values through its instructions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from tools.gates.sass import Instruction

#: The halves of four bytes. An instruction with one of them begins with four weights.
_MASK = re.compile(r"\b0xf0f0f0f0?\b")
#: What consumes weights: tensor cores, stores.
_SINKS = ("IMMA", "IGMMA", "HMMA", "STS", "STG", "STL", "LDGSTS")
_NO_RESULT = (*_SINKS[3:], "BRA", "EXIT", "BAR", "RED", "DEPBAR", "NOP")
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
    return one.opcode.startswith(("IADD3", "IMAD.IADD")) and len(re.findall(r"\bRZ\b", one.operands)) >= 2


def _width(opcode: str) -> int:
    """How many registers an instruction writes."""
    name = opcode.split(".")[0]
    if name == "LDSM":
        return 4 if opcode.endswith(".4") else 2 if opcode.endswith(".2") else 1
    if name in ("IMMA", "HMMA") or ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode else 1


class _Scan:
    """Which registers hold weights that are being unpacked, and which instruction moved another one to its place."""

    def __init__(self) -> None:
        self.holds: set[int] = set()  # weights, between the mask and a sink
        self.moved: dict[int, int] = {}  # register -> the move's address
        self.used: set[int] = set()  # addresses
        self.masks: set[int] = set()

    def step(self, one: Instruction) -> None:
        name = one.opcode.split(".")[0]
        operands = [part for part in one.operands.split(",") if not re.match(r"\s*!?U?P[T\d]", part)]
        result = [] if name in _NO_RESULT else _registers(operands[0], _width(one.opcode)) if operands else []
        sources = operands if name in _NO_RESULT else operands[1:]
        read = {register for part in sources for register in _registers(part)}
        begins = name == "LOP3" and bool(_MASK.search(one.operands))
        weights = begins or (bool(read & self.holds) and name not in _SINKS)
        if weights:
            self.used.add(one.address)
            if begins:
                self.masks.add(one.address)
            # A move that only puts an addend next to another register is a part of the price.
            if one.opcode.startswith(_WIDE):
                for register in _registers(sources[-1], 2):
                    if register in self.moved:
                        self.used.add(self.moved[register])
        for register in result:
            self.moved.pop(register, None)
            self.holds.discard(register)
        if weights:
            self.holds.update(result)
        elif _is_move(one):
            self.moved.update(dict.fromkeys(result, one.address))


def unpacking(code: Sequence[Instruction]) -> Unpacking:
    """Counts what lies between the masks and the tensor cores, once per instruction.

    The instructions are followed in their order, twice: at the start of a loop some registers hold what its end has
    put there.
    """
    if not any(_MASK.search(one.operands) for one in code):
        return Unpacking(0, 0)
    scan = _Scan()
    for _ in range(2):
        for one in code:
            scan.step(one)
    return Unpacking(len(scan.masks), len(scan.used))
