"""Compiled kernels as tables: for a terminal, for a log, and as markdown for the documentation."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence

from tools.gates.occupancy import LIMITS, blocks_per_sm, code_for, limits_of, warps_per_sm
from tools.gates.sass import Kernel, base_name, widths

COLUMNS = (
    "kernel", "arch", "registers", "threads", "shared", "stack", "local", "loads", "to shared",
    "stores", "IMMA", "IGMMA", "HMMA", "IDP", "BAR", "blocks/SM", "warps/SM",
)  # fmt: skip
OPTIONAL = ("to shared", "IMMA", "IGMMA", "HMMA", "IDP", "BAR")


def table_row(kernel: Kernel) -> tuple[str, ...]:
    code, limits = kernel.code, limits_of(kernel.arch)
    accesses = (code.loads, code.copies, code.stores)
    cells: list[object] = [
        kernel.registers,
        f"{kernel.max_threads}{'' if kernel.bounded else '?'}",
        kernel.shared,
        kernel.stack,
        code.local,
        *(widths(counted) if counted else "-" for counted in accesses),
        *code.counts.values(),
        blocks_per_sm(limits, *kernel.used) if limits else "-",
        warps_per_sm(limits, *kernel.used) if limits else "-",
    ]
    return (kernel.short, kernel.arch, *map(str, cells))


def without_empty(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Leaves out the columns of OPTIONAL that are empty for all kernels; rows[0] is the heading."""
    kept = [
        place
        for place, name in enumerate(rows[0])
        if name not in OPTIONAL or any(row[place] not in ("0", "-") for row in rows[1:])
    ]
    return [[row[place] for place in kept] for row in rows]


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    lengths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(f"{cell:<{size}}" for cell, size in zip(row, lengths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def print_table(kernels: Sequence[Kernel]) -> None:
    rows = without_empty([COLUMNS, *(table_row(kernel) for kernel in kernels)])
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for heading in rows[0]:
            table.add_column(heading, overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        Console().print(table)
    else:
        print(plain_table(rows))
    print(
        "\nloads, stores: instructions x bits. blocks and warps: upper bounds, for the largest "
        "block\nand without dynamic shared memory. ?: no launch bounds."
    )


def markdown(kernels: Sequence[Kernel]) -> str:
    """A table for each kernel's name, a row for each instantiation, a column for each GPU."""
    groups: dict[str, dict[tuple[str, str], dict[str, Kernel]]] = defaultdict(dict)
    for kernel in kernels:
        row = groups[base_name(kernel.name)].setdefault((kernel.short, kernel.mangled), {})
        row[kernel.arch] = kernel
    lines = [
        "<!-- written by: python -m tools.gates --write-table -->",
        "",
        "Registers per thread / warps per multiprocessor, for the largest block and without dynamic "
        "shared memory.",
    ]
    for base in sorted(groups):
        rows = groups[base]
        compiled = {arch for row in rows.values() for arch in row}
        columns = [device for device in LIMITS if code_for(device, compiled)]
        heads = [f"{device} ({LIMITS[device].device})" for device in columns]
        lines += ["", f"### {base}", "", f"| kernel | {' | '.join(heads)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for (short, _), row in sorted(rows.items()):
            cells = [f"`{short}`", *(_markdown_cell(device, row) for device in columns)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown_cell(device: str, row: dict[str, Kernel]) -> str:
    arch = code_for(device, set(row))
    if arch is None:
        return ""
    kernel = row[arch]
    return f"{kernel.registers} / {warps_per_sm(LIMITS[device], *kernel.used)}"
