"""A row of the table of gates."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tools.gates.checks import Check
from tools.gates.sass import Kernel


@dataclass(frozen=True)
class Gate:
    name: str
    check: Check
    allowed: str  # what is allowed, and what to do about a failure
    kernels: str = ""  # a regex searched for in the demangled name, "void sqk::f<(sqk::E)1>(A)"
    but: str = r"(?!)"  # another regex: the kernels that the gate leaves out
    archs: str = ""  # a regex searched for in the architecture
    optional: bool = False  # True: there may be no such kernel

    def guards(self, kernel: Kernel) -> bool:
        return bool(
            re.search(self.kernels, kernel.name)
            and not re.search(self.but, kernel.name)
            and re.search(self.archs, kernel.arch)
        )
