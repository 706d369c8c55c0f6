"""Each tile has a name and a file in csrc/gemm/instances; a forgotten file, row or type does not compile or link."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.csrc.test_gemm_plan import GPUS, LAYERS, compiled, forced, params, w4
from tests.support import c_gemm
from tests.support.c_interface import SUCCESS
from tools.build.plan import ROOT, BuildError, find_nvcc, find_torch

pytestmark = pytest.mark.compiler

Tile = dict[str, Any]
INSTANCES = ROOT / "csrc" / "gemm" / "instances"
ROW = re.compile(r"    (?:stream|mma|wgmma)\(.*\),")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("gemm_tiles"), "-DSQK_TUNING=1")


# --- one file a tile --------------------------------------------------------------------------------------------------


def file_of(tile: dict[str, Any]) -> str:
    """The name of a tile's file. Tables share the mma.sync tiles, so their names hold all arguments."""
    name = re.sub(r"[- ]", "_", tile["name"]).lower()
    if tile["kernel"] == "stream":
        return f"stream_{tile['m']}x{tile['n']}.cu"
    if tile["kernel"] == "wgmma":
        kind = "tuning" if tile["candidate"] else "wgmma"
        return f"{kind}_{name.removeprefix('w4_')}_sm90.cu"
    shape = "x".join(str(tile[side]) for side in "mnk")
    warps = f"{tile['warps_m']}x{tile['warps_n']}"
    kind = "tuning_mma" if tile["candidate"] else "mma"
    return f"{kind}_{shape}_warps_{warps}_stages_{tile['stages']}_sm80.cu"


def test_every_tile_has_a_file_of_its_own(library: ctypes.CDLL) -> None:
    """One tile per file, so that a build uses every core; its name holds its arguments.

    A tile that says .gated() has another one for gated GEMMs; .w4() and .w4_only() mean one for weights of 4 bits.
    """
    expected = {}
    for table in c_gemm.tables(library).values():
        for tile in table["tiles"]:
            sizes = [tile["m"], tile["n"], *[tile["k"]] * (tile["kernel"] != "stream")]
            argument = f"{tile['kernel']}({', '.join(map(str, sizes))})"
            if not tile["w4_only"]:
                expected[file_of(tile)] = argument
            if tile["w4"]:
                expected[f"w4_{file_of(tile)}"] = argument
            if tile["gated"]:
                expected[f"gated_{file_of(tile)}"] = argument
    found = {}
    for source in set(INSTANCES.glob("*.cu")).difference(INSTANCES.glob("grouped_*")):
        text = source.read_text()
        assert len(text.splitlines()) <= 12
        (found[source.name],) = re.findall(r"_entry<(\w+\([\d, ]+\)).*>\(\);", text)
        for kind in ("gated_", "w4_"):
            assert (kind in text) == source.name.startswith(kind)
    assert found == expected


# --- the order of rows ------------------------------------------------------------------------------------------------


def copy_of_csrc(folder: Path) -> Path:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder


def shuffled(text: str, order: random.Random) -> str:
    """A table's text with its rows and the comments above them in another order."""

    def shuffle(match: re.Match[str]) -> str:
        rows = re.findall(r"(?:    //.*\n)*    \w+\(.*\),\n", match[2])
        assert "".join(rows) == match[2] and len(rows) > 2
        order.shuffle(rows)
        return match[1] + "".join(rows) + match[3]

    text, count = re.subn(r"(TileBuilder \w+\[\] = \{\n)(.*?)(\};\n)", shuffle, text, flags=re.S)
    assert count == 2
    return text


def plans(library: ctypes.CDLL) -> dict[tuple[object, ...], tuple[object, ...]]:
    """Plans with the names of their tiles: by the rules, with each tile forced, and with each tile excluded."""
    found: dict[tuple[object, ...], tuple[object, ...]] = {}
    tables = c_gemm.tables(library)

    def ask(problem: tuple[int, int, int], gpu: str, what: str, tile: Tile | None = None) -> None:
        device, table = GPUS[gpu]
        p = params(*problem) if tile is None else forced(tile, *problem)
        if what == "w4":
            p = w4(*problem)
        status, plan = c_gemm.plan(library, p, device)
        name = tables[table]["tiles"][plan.tile]["name"] if status == SUCCESS else ""
        facts = (plan.splits, plan.blocks, plan.workspace_bytes, plan.expected_clocks)
        found[problem, gpu, what] = (status, name, *facts)

    tokens = (*range(1, 130, 4), 200, 300, 512, 513, 1000, 2048, 5000)
    for gpu, (_, table) in GPUS.items():
        for n, k in LAYERS[::3]:
            for m in tokens:
                ask((m, n, k), gpu, "")
                ask((m, n, k), gpu, "w4")
            for tile in tables[table]["tiles"]:
                ask((8, n, k), gpu, tile["name"], tile)
    for gpu in ("A100", "L40S", "H100"):
        for tile in tables[GPUS[gpu][1]]["tiles"]:
            assert library.sqk_gemm_without_tiles(tile["id"].encode()) == SUCCESS
            for m in (1, 12, 20, 50, 100, 300, 3000):
                ask((m, 4096, 4096), gpu, f"without {tile['id']}")
    assert library.sqk_gemm_without_tiles(b"") == SUCCESS
    return found


def test_the_order_of_rows_does_not_matter(library: ctypes.CDLL, tmp_path: Path) -> None:
    right = plans(library)
    assert len(right) > 3000
    root = copy_of_csrc(tmp_path)
    for table in c_gemm.TABLES:
        file = root / "csrc" / "gemm" / "tiles" / f"{table}.h"
        file.write_text(shuffled(file.read_text(), random.Random(table)))
    other = compiled(tmp_path, "-DSQK_TUNING=1", root=root)
    names = [[tile["name"] for tile in c_gemm.tables(lib)["sm90"]["tiles"]] for lib in (library, other)]  # fmt: skip
    assert names[0] != names[1] and sorted(names[0]) == sorted(names[1])
    assert plans(other) == right


# --- forgotten rows and files -----------------------------------------------------------------------------------------

STAND_INS = {
    "csrc/gemm/mma/kernel.cuh": """#pragma once
#include "gemm/kernels.h"
namespace sqk {
template <int, int, int, int, int, int, bool>
Status launch_mma(const GemmParams&, const Device&, const GemmPlan&, cudaStream_t) { return {}; }
}
""",
    "csrc/gemm/w4/mma.cuh": """#pragma once
#include "gemm/kernels.h"
namespace sqk {
template <int, int, int, int, int>
Status launch_w4_mma(const GemmParams&, const Device&, const GemmPlan&, cudaStream_t) { return {}; }
}
""",
    "csrc/gemm/w4/wgmma.cuh": """#pragma once
#include "gemm/wgmma/kernel.cuh"
namespace sqk { template <TileKey kTile> using W4WgmmaGemm = WgmmaGemm<kTile>; }
""",
    "csrc/gemm/wgmma/kernel.cuh": """#pragma once
#include "gemm/kernels.h"
namespace sqk {
template <TileKey, bool = false>
struct WgmmaGemm {
  static Status launch(const GemmParams&, const Device&, const GemmPlan&, cudaStream_t) { return {}; }
  static int64_t workspace_bytes(const GemmParams&, const Device&) { return 0; }
};
}
""",
    "csrc/gemm/stream/kernel.cuh": """#pragma once
#include "gemm/kernels.h"
namespace sqk {
constexpr int kStreamChannels = 16, kGroupTokens = 8;
struct StreamParams {};
template <typename, int>
void stream_gemm_kernel(StreamParams) {}
template <typename, int>
void w4_stream_gemm_kernel(StreamParams) {}
}
""",
    "csrc/common/dtype.cuh": """#pragma once
#include "sqk/dtype.h"
namespace sqk {
template <typename Constant>
using Element = Constant;
}
""",
    "csrc/common/launch.h": """#pragma once
#include <cstddef>
#include "sqk/device.h"
#include "sqk/status.h"
namespace sqk {
inline int cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return 0; }
inline Status status_from_call(int) { return {}; }
bool may_overlap(const Device&);
}
""",
    "csrc/cuda_runtime.h": "",
    # The functions that launch.cu calls besides kernels and plans.
    "rest.cpp": """#include "gemm/kernels.h"
#include "sqk/linear.h"
namespace sqk {
Status current_device(Device*) { return {}; }
Status plan(const QuantizeParams&, QuantizePlan*) { return {}; }
Status quantize(const QuantizeParams&, const QuantizePlan&, cudaStream_t) { return {}; }
Status launch_stream(const GemmParams&, const QuantizeParams*, const Device&, const GemmPlan&, StreamKernels,
                     cudaStream_t) { return {}; }
bool may_overlap(const Device&) { return false; }
bool stream_quantizes(const QuantizeParams&, const GemmParams&) { return false; }
}
""",
}


class Sources:
    """A copy of the library's host code, which g++ compiles."""

    def __init__(self, folder: Path) -> None:
        self.folder = copy_of_csrc(folder)
        for name, text in STAND_INS.items():
            (self.folder / name).write_text(text)

    def change(self, name: str, old: str, new: str) -> None:
        file = self.folder / "csrc" / name
        text = file.read_text()
        assert text.count(old) == 1, f"{name} does not contain this exactly once: {old}"
        file.write_text(text.replace(old, new))

    def compile(self, sources: Iterable[str], *flags: str) -> subprocess.CompletedProcess[str]:
        includes = [f"-I{self.folder / 'csrc'}", f"-I{self.folder / 'csrc' / 'include'}"]
        macros = ["-DSQK_WITH_SM80=1", "-DSQK_WITH_SM90=1"]
        command = ["g++", "-std=c++17", "-x", "c++", *includes, *macros, *flags, *sources]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)

    def instances(self, flags: Iterable[str] = ()) -> subprocess.CompletedProcess[str]:
        """Compiles all files of shipped tiles as one source."""
        folder = self.folder / "csrc" / "gemm" / "instances"
        names = [p.name for p in folder.glob("*.cu") if p.name[:7] not in ("tuning_", "grouped")]
        lines = [f'#include "gemm/instances/{name}"\n' for name in sorted(names)]
        (self.folder / "all.cpp").write_text("".join(lines))
        return self.compile(["all.cpp"], *(flags or ("-fsyntax-only",)))

    def link(self) -> str:
        """The linker's messages; empty if the library is complete."""
        objects = ["launch.o", "all.o"]
        done = self.compile(["csrc/gemm/launch.cu"], "-fPIC", "-c", "-o", "launch.o")
        assert done.returncode == 0, done.stderr
        done = self.instances(("-fPIC", "-c", "-o", "all.o"))
        assert done.returncode == 0, done.stderr
        rest = ["rest.cpp", *map(str, (self.folder / "csrc" / "gemm").glob("*.cpp"))]
        flags = ["-fPIC", "-shared", "-Wl,--no-undefined", "-o", "library.so"]
        done = self.compile([*rest, "-x", "none", *objects], *flags)
        assert (done.returncode == 0) == (done.stderr == "")
        return done.stderr


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return Sources(tmp_path)


def test_the_complete_library_links(sources: Sources) -> None:
    assert sources.link() == ""


#: Rows without a file. The second row's file belongs to a candidate, which a usual build leaves out.
FORGOTTEN = (
    ("sm80", "mma(64, 64, 64).warps(2, 2).stages(4).rate(50)"),
    ("sm89", "mma(128, 64, 64).warps(2, 2).stages(4).rate(50)"),
    ("sm90", "wgmma(128, 192, 128).cooperative().stages(4).rate(50)"),
    ("sm90", "stream(8, 32).warps(4).rate(50)"),
    ("sm89", "mma(64, 64, 128).warps(2, 2).stages(4).rate(50).w4_only()"),
    ("sm90", "wgmma(32, 256, 128).swap_ab().cooperative().stages(4).rate(50).w4_only()"),
)


def test_a_row_without_a_file_does_not_link(sources: Sources) -> None:
    for table, row in FORGOTTEN:
        begin = f"constexpr TileBuilder k{table.capitalize()}Shipped[] = {{\n"
        sources.change(f"gemm/tiles/{table}.h", begin, f"{begin}    {row},\n")
    missing = re.findall(r"undefined reference to `.*\b(\w+)_entry<", sources.link())
    assert sorted(missing) == ["mma", "mma", "stream", "w4_mma", "w4_wgmma", "wgmma"]


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("mma_64x128x64_warps_2x2_stages_4_sm80.cu", ".stages(4)", ".stages(5)", "no table has a row with this tile"),
        ("wgmma_128x256x128_sm90.cu", ".cluster(2, 1)", "", "tiles/sm90.h has no row with this tile"),
        # a candidate, in the file of a shipped tile
        ("wgmma_256x128x128_sm90.cu", "cooperative", "stream_k", "tiles/sm90.h has no row with this tile"),
        ("w4_mma_16x64x128_warps_1x4_stages_8_sm80.cu", "(8)", "(9)", "no table has a row with this tile"),
        ("w4_wgmma_16x128x128_swap_sm90.cu", "(22)", "(21)", "tiles/sm90.h has no row with this tile"),
        ("stream_8x16.cu", "stream(8, 16)", "stream(8, 32)", "no table has a row with this tile"),
        ("stream_8x16.cu", "stream(8, 16)", "mma(8, 16, 128)", "no table has a row with this tile"),
    ],
)  # fmt: skip
def test_a_file_without_a_row_does_not_compile(
    sources: Sources, file: str, old: str, new: str, said: str
) -> None:
    sources.change(f"gemm/instances/{file}", old, new)
    done = sources.instances()
    assert done.returncode != 0 and said in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('{8, {"stream 8x16"}', '{8, {"stream 8x32"}', "a rule names a tile that its table does not ship"),
        ('{8, {"stream 8x16"}', '{8, {"64x256x128"}', "a rule names a tile that its table does not ship"),
        ('{8, {"stream 8x16"}', '{9, {"stream 8x16"}', "a row of the table breaks a rule of tile.h"),
        (".rate(88),", ".rate(88).cluster_in_name(),", "a rule names a tile that its table does not ship"),
        ("pingpong().stages(11)", "stages(11)", "a row of the table breaks a rule of tile.h"),
        (".stages(11)", ".stages(11).splits(2)", "a row of the table breaks a rule of tile.h"),
        ("warps(16)", "warps(16).cluster(2, 1)", "a row of the table breaks a rule of tile.h"),
        ("wgmma(16, 64, 256)", "wgmma(32, 64, 256)", "a rule names a tile that its table does not ship"),
        (".stages(11)", ".stages(11).w4_only()", "a rule names a tile that its table does not ship"),
        ("wgmma(64, 256, 128)", "wgmma(1024, 256, 128)", "a row of the table breaks a rule of tile.h"),
    ],
)  # fmt: skip
def test_a_wrong_table_does_not_compile(sources: Sources, old: str, new: str, said: str) -> None:
    file = sources.folder / "csrc" / "gemm" / "tiles" / "sm90.h"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    done = sources.compile(["csrc/gemm/plan.cpp"], "-fsyntax-only", "-DSQK_TUNING=1")
    assert done.returncode != 0 and said in done.stderr


@pytest.mark.parametrize(
    "row",
    [
        "mma(64, 64, 64).warps(2, 2).stages(4).rate(50).w4_only()",  # half a group
        "mma(64, 64, 64).warps(2, 2).stages(4).rate(50).w4().stages_in_name()",
        "mma(64, 64, 128).warps(2, 2).stages(2).rate(50).gated().w4_only()",
        "mma(64, 64, 128).warps(2, 2).stages(13).rate(50).w4_only()",  # 161 KiB, where 99 are there
    ],
)
def test_a_wrong_row_for_4_bits_does_not_compile(sources: Sources, row: str) -> None:
    begin = "constexpr TileBuilder kSm89Shipped[] = {\n"
    sources.change("gemm/tiles/sm89.h", begin, f"{begin}    {row},\n")
    done = sources.compile(["csrc/gemm/plan.cpp"], "-fsyntax-only")
    assert done.returncode != 0 and "a row of the table breaks a rule of tile.h" in done.stderr


def test_two_rows_with_one_name_do_not_compile(sources: Sources) -> None:
    row = "wgmma(128, 256, 128).cooperative().cluster(2, 2).stages(4).rate(90)"
    sources.change("gemm/tiles/sm90.h", f"{row}.cluster_in_name(),", f"{row},")
    done = sources.compile(["csrc/gemm/plan.cpp"], "-fsyntax-only", "-DSQK_TUNING=1")
    assert done.returncode != 0 and "a row of the table breaks a rule" in done.stderr


# --- a type without a case --------------------------------------------------------------------------------------------

LAST_TYPE = 'X(kInt8, 1, false, "int8")'


def with_nvcc(root: Path, source: str) -> list[str]:
    """Runs only the front end, which already refuses what must not compile."""
    nvcc = find_nvcc({}).path
    flags = ["-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80", "-ptx", "-o", "/dev/null"]
    return [nvcc, "-x", "cu", *flags, f"-I{root}/csrc", f"-I{root}/csrc/include", source]


def with_torch(root: Path, source: str) -> list[str]:
    flags = ["-std=c++17", "-fsyntax-only", f"-I{root}/csrc", f"-I{root}/csrc/include"]
    return ["g++", *flags, "-DSQK_SIMULATOR", "-isystem", str(find_torch().include), source]


@pytest.mark.parametrize(
    ("source", "command", "size", "said"),
    [
        ("quantize/instances/relu.cu", with_nvcc, 1, "no C++ type for this DType"),
        ("gemm/instances/stream_8x16.cu", with_nvcc, 1, "no C++ type for this DType"),
        ("gemm/instances/mma_16x64x128_warps_1x4_stages_6_sm80.cu", with_nvcc, 1, "how are two values of this type"),
        ("gemm/instances/mma_16x64x128_warps_1x4_stages_6_sm80.cu", with_nvcc, 2, "a plain y is float16 or bfloat16"),
        ("torch/quantize.cpp", with_torch, 1, "what does torch call this type"),
    ],
)  # fmt: skip
def test_an_unhandled_type_does_not_compile(
    tmp_path: Path, source: str, command: Callable[[Path, str], list[str]], size: int, said: str
) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc" / "include" / "sqk" / "dtype.h"
    text = file.read_text()
    assert text.count(LAST_TYPE) == 1
    file.write_text(text.replace(LAST_TYPE, f'{LAST_TYPE} X(kNew, {size}, true, "new")'))
    try:
        words = command(tmp_path, f"csrc/{source}")
    except BuildError as error:
        pytest.skip(f"cannot be compiled here: {error}")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and said in done.stdout + done.stderr
