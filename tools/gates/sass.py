"""Reads the output of cuobjdump, which shows what compiled kernels consist of.

No function here runs a tool; each takes text that a tool printed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tools.gates.occupancy import MAX_THREADS, SHARED_RESERVED
from tools.gates.unpacking import Instruction, Unpacking, unpacking

WIDTHS = (256, 128, 64, 32, 16, 8)  # bits of one thread's access
#: Tensor cores of Ampere, of Hopper and for float16, dp4a, barriers.
COUNTED = ("IMMA", "IGMMA", "HMMA", "IDP", "BAR")
#: What lets a thread see another kernel's results: griddepcontrol.wait, or an mbarrier at which such a thread arrived.
WAITS = re.compile(r"ACQBULK\b|SYNCS\.PHASECHK\b")
FRESH_LOAD = re.compile(r"LDG\b.*\.STRONG\.GPU\b")  # ld.global.cg, and an acquire
#: What reads or writes global memory: loads, copies to shared memory, stores, atomics, TMA.
GLOBAL = (
    "LDG",
    "LDGSTS",
    "STG",
    "ATOM",
    "ATOMG",
    "RED",
    "REDG",
    "UTMALDG",
    "UTMASTG",
    "UTMAREDG",
    "UBLKCP",
)


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, counted. Widths are bits of one thread's access."""

    loads: dict[int, int] = field(default_factory=dict)  # LDG, by width
    copies: dict[int, int] = field(default_factory=dict)  # LDGSTS (global to shared), by width
    stores: dict[int, int] = field(default_factory=dict)  # STG, by width
    local: int = 0  # LDL and STL: spills, and arrays in local memory
    counts: dict[str, int] = field(default_factory=dict)  # of COUNTED
    waiting_igmma: int = 0  # IGMMA that end their group; all of them when ptxas made wgmma serial
    overlaps: bool = False  # it waits for the kernel before it in the stream (griddepcontrol.wait)
    fresh_loads: int = 0  # of data that other blocks or kernels write at the same time
    early: dict[str, int] = field(
        default_factory=dict
    )  # if it overlaps: of GLOBAL, what needs none of WAITS
    size: int = 0  # bytes of instructions
    unpacking: Unpacking = field(default_factory=lambda: Unpacking(0, 0))  # of weights of 4 bits


@dataclass(frozen=True)
class Kernel:
    """One kernel compiled for one architecture."""

    mangled: str
    name: str  # demangled, or the mangled one where there is no demangler
    arch: str  # "sm_90a"
    registers: int
    stack: int  # bytes of stack frame per thread
    shared: int  # bytes of static shared memory per block
    max_threads: int  # per block
    bounded: bool  # False: no launch bounds, and max_threads is the most that CUDA allows
    code: Code

    @property
    def short(self) -> str:
        return short_name(self.name)

    @property
    def used(self) -> tuple[int, int, int]:
        """What occupancy depends on: registers, threads, shared memory."""
        return self.registers, self.max_threads, self.shared


# ------------------------------------------------------------------------------------------- names


def _cut_parameters(text: str) -> str:
    """``f<(E)1>(A, B(*)(C))`` -> ``f<(E)1>``."""
    if not text.endswith(")"):
        return text
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(text[position], 0)
        if depth == 0:
            return text[:position]
    return text


def _cut_return_type(text: str) -> str:
    """``void f<a b>`` -> ``f<a b>``: what follows the last space outside all brackets."""
    depth, start = 0, 0
    for position, letter in enumerate(text):
        depth += {"<": 1, "(": 1, ">": -1, ")": -1}.get(letter, 0)
        if letter == " " and depth == 0:
            start = position + 1
    return text[start:]


def plain_name(demangled: str) -> str:
    """One spelling for the unnamed namespace, because nvcc puts a hash of the file into its name."""
    return re.sub(r"\b_GLOBAL__N__\w+|<unnamed>", "(anonymous namespace)", demangled)


def short_name(demangled: str) -> str:
    """Without return type, parameters and namespaces; template arguments stay."""
    text = plain_name(demangled).replace("(anonymous namespace)::", "").strip()
    text = _cut_return_type(_cut_parameters(text))
    return re.sub(r"\b(?:\w+::)+", "", text)


def base_name(demangled: str) -> str:
    """The kernel's name without template arguments."""
    return short_name(demangled).split("<")[0]


# --------------------------------------------------------------------------------------- cuobjdump


def elf_chunks(text: str) -> list[str]:
    """The part of each compiled image, in order; a lone cubin is one part without a heading."""
    parts = re.split(r"^(Fatbin \w+ code:)$", text, flags=re.M)
    if len(parts) == 1:
        return [text] if text.strip() else []
    heads, bodies = parts[1::2], parts[2::2]
    return [body for head, body in zip(heads, bodies, strict=True) if head == "Fatbin elf code:"]


def parse_resources(chunk: str) -> dict[str, dict[str, int]]:
    """``cuobjdump --dump-resource-usage``: kernel -> {"REG": 14, "STACK": 0, "SHARED": 128, ...}"""
    found = re.findall(r"^ Function (\S+):\s*\n\s+(REG:.*)$", chunk, re.M)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", line)}
        for name, line in found
    }


def parse_max_threads(chunk: str) -> dict[str, int]:
    """``cuobjdump --dump-elf``: kernel -> threads per block, for kernels with launch bounds.

    EIATTR_MAX_THREADS is __launch_bounds__, EIATTR_REQNTID a block size that is fixed.
    """
    bounds = {}
    for section in re.split(r"^\.(?=\S)", chunk, flags=re.M):
        name = re.match(r"nv\.info\.(\S+)\n", section)
        value = re.search(
            r"EIATTR_(?:MAX_THREADS|REQNTID)\n\s*Format:.*\n\s*Value:\s*(0x\w+) (0x\w+) (0x\w+)",
            section,
        )
        if name and value:
            x, y, z = (int(part, 16) for part in value.groups())
            bounds[name[1]] = x * y * z
    return bounds


def reserves_shared(chunk: str) -> bool:
    """``cuobjdump --dump-elf``: whether the image's SHARED counts the system's bytes (Hopper)."""
    return re.search(r" \.nv\.shared\.reserved\.\d+$", chunk, re.M) is not None


def parse_arch(chunk: str) -> str:
    """``cuobjdump --dump-sass``"""
    found = re.search(r"^arch = (\w+)$", chunk, re.M) or re.search(r"code for (\w+)", chunk)
    return found[1] if found else "sm_?"


_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*);",
    re.M,
)


def parse_sass(chunk: str) -> dict[str, list[Instruction]]:
    """``cuobjdump --dump-sass``: kernel -> its instructions, in order"""
    parts = re.split(r"^\s*Function : (\S+)$", chunk, flags=re.M)
    return {
        name: [
            Instruction(
                int(found["address"], 16),
                found["guard"] or "",
                found["opcode"],
                found["rest"].strip(),
            )
            for found in _INSTRUCTION.finditer(body)
            if found["guard"] not in ("!PT", "!UPT")  # never executed: padding
        ]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


#: Where threads that diverged at a branch reconverge: a barrier's register, and an address.
_Meetings = frozenset[tuple[str, int]]


def _following(
    code: list[Instruction], place: Mapping[int, int], i: int, meetings: _Meetings
) -> tuple[list[int], _Meetings]:
    """The places of the instructions that can follow an instruction. Listing too many is safe."""
    one = code[i]
    name = one.opcode.split(".")[0]
    targets = [int(found, 16) for found in re.findall(r"\b0x[0-9a-f]+", one.operands)]
    goes_on = True
    if name in ("BRA", "JMP", "CALL"):
        targets = targets[-1:]
        goes_on = bool(one.guard) or name == "CALL" or not re.match(r"`?\(?0x|\.", one.operands)
    elif name == "BSSY":
        barrier = one.operands.split(",")[0].strip()
        meetings = frozenset({m for m in meetings if m[0] != barrier} | {(barrier, targets[-1])})
        targets = []
    elif name == "BSYNC":
        barrier = one.operands.split(",")[0].strip()
        targets = [address for register, address in meetings if register == barrier]
        goes_on = bool(one.guard) or not targets
    elif name in ("EXIT", "RET", "KILL"):
        targets, goes_on = [], bool(one.guard) or "," in one.operands
    elif name in ("BRX", "JMX"):  # any of them
        targets = list(place)
    else:
        targets = []
    places = [place[address] for address in targets if address in place]
    places += [i + 1] if goes_on and i + 1 < len(code) else []
    return places, meetings


def early_accesses(code: list[Instruction]) -> dict[str, int]:
    """Counts what reads or writes global memory and can be reached on some path without any wait, by instruction.

    Thread 0 may wait for its whole block: for the other threads, an mbarrier at which it arrives is
    the wait. A wait with a guard does not count, because the thread may skip it.
    """
    place = {one.address: i for i, one in enumerate(code)}
    # What every path that reaches an instruction has set, together: to list each path would take too long.
    reached: dict[int, _Meetings] = {0: frozenset()} if code else {}
    todo = list(reached)
    while todo:
        i = todo.pop()
        if WAITS.match(code[i].opcode) and not code[i].guard:
            continue
        places, meetings = _following(code, place, i, reached[i])
        for following in places:
            known = reached.get(following)
            together = meetings if known is None else known | meetings
            if together != known:
                reached[following] = together
                todo.append(following)
    found = Counter(code[i].opcode.split(".")[0] for i in reached)
    return {name: found[name] for name in GLOBAL if found[name]}


def access_bits(opcode: str) -> int:
    """``LDG.E.LTC128B.64`` -> 64, ``STG.E.U8`` -> 8, ``LDG.E`` -> 32."""
    for part in opcode.split(".")[1:]:
        width = re.fullmatch(r"(256|128|64)|[US](16|8)", part)
        if width:
            return int(width[1] or width[2])
    return 32


def widths(counted: Mapping[int, int]) -> str:
    """``{128: 2, 32: 1}`` -> "2x128 1x32" """
    widest_first = sorted(counted.items(), reverse=True)
    return " ".join(f"{number}x{bits}" for bits, number in widest_first) or "no"


def kernels_in(resources: str, elf: str, sass: str, names: dict[str, str]) -> list[Kernel]:
    """All kernels of one file, from the three texts that cuobjdump prints about it.

    Args:
        resources: of --dump-resource-usage.
        elf: of --dump-elf.
        sass: of --dump-sass.
        names: mangled -> demangled; a name that is missing stays as it is.
    """
    kernels = []
    chunks = (elf_chunks(text) for text in (resources, elf, sass))
    for resource_part, elf_part, sass_part in zip(*chunks, strict=True):
        code = parse_sass(sass_part)
        bounds = parse_max_threads(elf_part)
        for mangled, used in parse_resources(resource_part).items():
            shared = used.get("SHARED", 0)
            if shared >= SHARED_RESERVED and reserves_shared(elf_part):
                shared -= SHARED_RESERVED
            kernels.append(
                Kernel(
                    mangled=mangled,
                    name=plain_name(names.get(mangled, mangled)),
                    arch=parse_arch(sass_part),
                    registers=used["REG"],
                    stack=used.get("STACK", 0) + used.get("LOCAL", 0),
                    shared=shared,
                    max_threads=bounds.get(mangled, MAX_THREADS),
                    bounded=mangled in bounds,
                    code=count(code[mangled]),
                )
            )
    return kernels


def count(instructions: list[Instruction]) -> Code:
    """Counts the instructions that parse_sass found in one kernel."""
    opcodes = [one.opcode for one in instructions]
    plain = Counter(opcode.split(".")[0] for opcode in opcodes)

    def by_width(wanted: str) -> dict[int, int]:
        found = Counter(access_bits(op) for op in opcodes if op.split(".")[0] == wanted)
        return {bits: found[bits] for bits in WIDTHS if found[bits]}

    return Code(
        loads=by_width("LDG"),
        copies=by_width("LDGSTS"),
        stores=by_width("STG"),
        local=plain["LDL"] + plain["STL"],
        counts={name: plain[name] for name in COUNTED},
        waiting_igmma=sum(
            one.opcode.startswith("IGMMA") and "gsb0" in one.operands for one in instructions
        ),
        overlaps=plain["ACQBULK"] > 0,
        fresh_loads=sum(bool(FRESH_LOAD.match(op)) for op in opcodes),
        early=early_accesses(instructions) if plain["ACQBULK"] else {},
        size=16 * len(instructions),
        unpacking=unpacking(instructions),
    )
