"""The CPU kernels in C++ alone: with sanitizers, at every level of this processor, and with planted defects.

cpu_kernels.cpp runs the problems of cpu_problems.h and compares with its specification. Each build is made once; a
planted defect compiles again only the sources that it changes.
"""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mutants import with_replaced
from tools.build import cpu
from tools.build.plan import ROOT, BuildError, jobs
from tools.build.sources import cpu_sources

pytestmark = [pytest.mark.compiler, pytest.mark.slow, pytest.mark.xdist_group("cpu_kernels")]

PROGRAM = "tests/csrc/cpu_kernels.cpp"
#: Build -> its flags. Sanitized code is compiled with -O1, whose reports name the right lines.
BUILDS = {
    "plain": (),
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
#: A planted defect shows with one of them: tasks that meet in a row of a random problem are rare.
SEEDS = (5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Built:
    """The objects of a build in a folder, by their sources."""

    folder: Path
    flags: tuple[str, ...]
    objects: dict[str, Path]

    def program(self, name: str = "program", **replaced: Path) -> Path:
        """Links the program, with other objects for some sources (by their stems)."""
        objects = [replaced.get(Path(source).stem, path) for source, path in self.objects.items()]
        target = self.folder / name
        run([compiler().path, *self.flags, *map(str, objects), "-lpthread", "-o", str(target)])
        return target


@functools.cache
def compiler() -> cpu.Compiler:
    try:
        return cpu.find_compiler(os.environ)
    except BuildError as error:
        pytest.skip(str(error))


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@functools.cache
def levels() -> list[str]:
    """The levels that the compiler knows."""
    return [name for name, why in cpu.usable_levels(compiler()).items() if not why]


def compile_source(source: str, target: Path, flags: tuple[str, ...], root: Path = ROOT) -> None:
    level = cpu.level_of_source(source)
    macros = [f"-DSQK_CPU_HAS_{name.upper()}={int(name in levels())}" for name in cpu.LEVELS]
    own = cpu.LEVELS[level] if level else ()
    includes = [f"-I{root / 'csrc/include'}", f"-I{root / 'csrc'}"]
    run(
        [
            *(compiler().path, "-c", str(root / source), "-o", str(target)),
            *(*cpu.FLAGS, "-Wno-psabi", *own, *macros, *includes, *flags),
        ]
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Makes a build of `BUILDS` at its first use."""
    made: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            wanted = [
                source
                for source in cpu_sources()
                if (level := cpu.level_of_source(source)) is None or level in levels()
            ]
            objects = {source: folder / (Path(source).stem + ".o") for source in [*wanted, PROGRAM]}
            with ThreadPoolExecutor(jobs(os.environ)) as pool:
                list(
                    pool.map(
                        lambda item: compile_source(item[0], item[1], BUILDS[name]),
                        objects.items(),
                    )
                )
            made[name] = Built(folder, BUILDS[name], objects)
        return made[name]

    return get


def runs(program: Path, seed: int, problems: int, *level: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(seed), str(problems), *level],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},  # else a report for each element
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "seed", "problems"),
    [
        ("plain", 1, 300),
        *(pytest.param("address", seed, 20, marks=pytest.mark.in_turn) for seed in (2, 3, 4)),
        pytest.param("thread", 3, 30, marks=pytest.mark.in_turn),
    ],
)
def test_all_levels_equal_the_specification(
    build: Callable[[str], Built], name: str, seed: int, problems: int
) -> None:
    done = runs(build(name).program(), seed, problems)
    assert done.returncode == 0, done.stdout + done.stderr
    count = int(done.stdout.split()[0])
    assert count >= 2 * problems, done.stdout  # portable at least, with one thread and with three
    print(f"{name}: {done.stdout.strip()}")


@dataclass(frozen=True)
class Mutant:
    """A defect, planted in a copy.

    Attributes:
        file: the changed file in csrc/cpu.
        old: text that occurs in it exactly once.
        new: the text that replaces it.
        sources: the stems of the sources that are compiled with the change.
        symptom: what the program prints.
        level: the level that is run; None: all.
        build: the build that shows it.
    """

    file: str
    old: str
    new: str
    sources: tuple[str, ...]
    symptom: str
    level: str | None = None
    build: str = "plain"

    def planted(self, csrc: Path) -> tuple[Path, str]:
        """The changed file under `csrc`, and the text that it gets."""
        path = csrc / "cpu" / self.file
        return path, with_replaced(path, self.old, self.new)


RACE = "data race"
MUTANTS = {
    "the excess of shifted activations stays in the sums": Mutant(
        "output.h",
        "read<Words>(sums + i) - read<Words>(excess + i)",
        "read<Words>(sums + i)",
        ("level_avx512_vnni",),
        "gemm_s8 at level avx512_vnni",
        "avx512_vnni",
    ),
    "the same before a gated activation": Mutant(
        "gated.h",
        "read<Words>(sums + i) - read<Words>(excess + i)",
        "read<Words>(sums + i)",
        ("level_avx512_vnni",),
        "gemm_s8_gated at level avx512_vnni",
        "avx512_vnni",
    ),
    "a value that stays NaN leaves its row's scale": Mutant(
        "gated.h",
        "  if (any == 0) return;",
        "  return;",
        ("level_portable",),
        "y_scale at level portable",
        "portable",
    ),
    "gate and up are not rounded": Mutant(
        "gated.h",
        "write(product + i, rounded_to(dtype, v));",
        "write(product + i, v);",
        ("level_avx2",),
        "gemm_s8_gated at level avx2",
        "avx2",
    ),
    "the last channels of a gated row are written as a whole block": Mutant(
        "gated.h",
        "rounded, static_cast<size_t>(rows));",
        "rounded, sizeof rounded);",
        ("level_portable",),
        "AddressSanitizer",
        "portable",
        "address",
    ),
    "tasks mark a row at the same time": Mutant(
        "gated.h",
        "__atomic_store(y_scale, &nan, __ATOMIC_RELAXED);",
        "*y_scale = nan;",
        ("level_portable",),
        RACE,
        "portable",
        "thread",
    ),
    "the same with vectors of 256 bits": Mutant(
        "level_avx_vnni.cpp",
        "_mm256_set1_epi8(static_cast<char>(kX))",
        "_mm256_set1_epi8(static_cast<char>(kX - 1))",
        ("level_avx_vnni",),
        "gemm_s8 at level avx_vnni",
        "avx_vnni",
    ),
    "a single last channel is left out": Mutant(
        "panels.h",
        "if (at < c.depth) {",
        "if (at + 1 < c.depth) {",
        ("level_avx2",),
        "linear_s8 at level avx2",
        "avx2",
    ),
    "the first part of a long k is forgotten": Mutant(
        "panels.h",
        "const bool add = done > 0;",
        "const bool add = false;",
        ("level_portable",),
        "linear_s8 at level portable",
        "portable",
    ),
    "a tile of the weight ends with other channels": Mutant(
        "tiles.h",
        "w + row * stride + at, static_cast<size_t>(k - at)",
        "w + row * stride, static_cast<size_t>(k - at)",
        ("level_amx",),
        "gemm_s8 at level amx",
        "amx",
    ),
    "the last tiles of a block never reach y": Mutant(
        "tile_output.h",
        "    finish();\n    if (streams_) _mm_sfence();",
        "    if (streams_) _mm_sfence();",
        ("level_amx",),
        "level amx",
        "amx",
    ),
    "sums are overwritten before they are read": Mutant(
        "tiles.h",
        "  finisher.finish();\n\n",
        "",
        ("level_amx",),
        "level amx",
        "amx",
    ),
    "half of a group is subtracted the wrong way": Mutant(
        "rows.h",
        "r[i + h] = low - high;",
        "r[i + h] = high - low;",
        ("level_portable",),
        "x_q at level portable",
        "portable",
    ),
    "negative values round elsewhere": Mutant(
        "simd.h",
        "v + 12582912.0f",
        "v + 8388608.0f",
        ("level_avx2",),
        "x_q at level avx2",
        "avx2",
    ),
    "a static scale hides NaN": Mutant(
        "layer.h",
        "if (!is_finite_bits(absmax)) scale = float_of(kNanBits);",
        "",
        ("quantize", "gemm"),
        "x_scale at level portable",
    ),
    "two tasks take the same columns": Mutant(
        "layer.h",
        "return {at(part), at(part + 1)};",
        "return {at(part), at(part + 2 < parts ? part + 2 : parts)};",
        ("quantize", "gemm"),
        RACE,
        "portable",
        "thread",
    ),
    "the sums before a larger score keep their size": Mutant(
        "attend.h",
        "factors[r] = state[0] == most ? 1.0f : exp_of(state[0] - most);",
        "factors[r] = 1.0f;",
        ("level_portable",),
        "decode_attention_s8 at level portable",
        "portable",
    ),
    "a wrong coefficient of exp": Mutant(
        "attend.h",
        "1.0f / 6.0f",
        "1.0f / 7.0f",
        ("level_avx2",),
        "decode_attention_s8 at level avx2",
        "avx2",
    ),
    "the excess of shifted keys stays in the scores": Mutant(
        "scores512.h",
        "_mm512_set1_epi32(-q.excess[first + r])",
        "_mm512_setzero_si512()",
        ("level_avx512_vnni",),
        "decode_attention_s8 at level avx512_vnni",
        "avx512_vnni",
    ),
    "the last tokens of a run are read beyond it": Mutant(
        "scores.h",
        "(t + n < tokens ? t + n : tokens - 1) * width",
        "(t + n) * width",
        ("level_portable",),
        "AddressSanitizer",
        "portable",
        "address",
    ),
    "the parts of a sequence share their sums": Mutant(
        "attention.cpp",
        "states + (pair * division.parts + part) * stride",
        "states + (pair * division.parts + parts.first) * stride",
        ("attention",),
        "decode_attention_s8 at level portable",
        "portable",
    ),
    "the second half of a rotary embedding turns the other way": Mutant(
        "kv_cache.cpp",
        "high * cos.of[i + half] + low * sin.of[i + half]",
        "high * cos.of[i + half] - low * sin.of[i + half]",
        ("kv_cache",),
        "kv_append at level portable",
        "portable",
    ),
    "all tasks share one scratch": Mutant(
        "gemm.cpp",
        "const RowScratch own(scratch + task * division.scratch_bytes, p.k);",
        "const RowScratch own(scratch, p.k);",
        ("gemm",),
        RACE,
        "portable",
        "thread",
    ),
}


@pytest.mark.in_turn
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_defect_shows(build: Callable[[str], Built], name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    if mutant.level is not None and mutant.level not in levels():
        pytest.skip(f"{compiler().version} cannot compile {mutant.level}")
    base = build(mutant.build)
    program, level = base.program(), [mutant.level] if mutant.level else []
    if runs(program, SEEDS[0], 1, *level).stdout.startswith("0 runs"):
        pytest.skip(f"this processor lacks {mutant.level}")

    subprocess.run(["cp", "-r", str(ROOT / "csrc"), str(tmp_path / "csrc")], check=True)
    changed, text = mutant.planted(tmp_path / "csrc")
    changed.write_text(text)
    replaced = {}
    for stem in mutant.sources:
        replaced[stem] = tmp_path / f"{stem}.o"
        compile_source(f"csrc/cpu/{stem}.cpp", replaced[stem], base.flags, tmp_path)
    planted = base.program("mutant", **replaced)
    for seed in SEEDS:
        done = runs(planted, seed, 60, *level)
        if done.returncode != 0:
            break
    sound = runs(program, seed, 60, *level)
    assert sound.returncode == 0, sound.stdout + sound.stderr
    assert done.returncode != 0, f"nothing noticed: {done.stdout}"
    assert mutant.symptom in done.stdout + done.stderr, done.stdout + done.stderr
