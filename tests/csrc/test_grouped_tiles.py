"""Each row of the table of tiles for experts has a file in csrc/gemm/instances, named after it."""

from __future__ import annotations

import re

from tools.build.plan import ROOT


def file_of(row: str) -> str:
    kernel, *numbers = re.findall(r"^\w+|\d+", row.partition(".rate")[0])
    sizes = numbers[: 2 if kernel == "stream" else 3]
    name = f"grouped_{kernel}_{'x'.join(sizes)}"
    if kernel == "stream":
        return f"{name}.cu"
    if kernel == "wgmma":
        return f"{name}{'_swap' * ('swap_ab' in row)}_sm90.cu"
    warps_m, warps_n, stages = numbers[3:]
    return f"{name}_warps_{warps_m}x{warps_n}_stages_{stages}.cu"


def test_every_tile_has_a_file_of_its_own() -> None:
    table = (ROOT / "csrc/gemm/grouped/tiles.h").read_text()
    rows = re.findall(r"^    ((?:wgmma|mma|stream)\(.*)\.rate\(\d+\).*,$", table, re.M)
    # The key of a streaming kernel leaves out the most warps of a block, which are chosen when it is launched.
    rows = [row.partition(".warps")[0] if row.startswith("stream") else row for row in rows]
    found = {}
    for source in (ROOT / "csrc/gemm/instances").glob("grouped_*.cu"):
        text = " ".join(source.read_text().split())
        (found[source.name],) = re.findall(r"_entry< ?(.*?) ?>\(\);", text)
    assert len(rows) >= 10
    assert found == {file_of(row): row for row in rows}
