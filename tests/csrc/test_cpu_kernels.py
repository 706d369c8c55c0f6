"""The CPU kernels in C++ alone: with sanitizers, at every level, and with planted defects.

cpu_kernels.cpp runs the problems of cpu_problems.h and compares with its specification. Each build is made once; a
planted defect compiles again only the sources that it changes. Levels that this processor lacks run in plain C++, for
which emulated.h replaces their intrinsics, and `emulate` their assembly, in a copy.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.csrc.cpu_mutants import MUTANTS, Mutant
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
    "emulated": ("-O1", "-Wno-psabi"),
}
EMULATED = ("avx_vnni", "avx512_vnni", "amx")
#: An instruction in assembly that adds to its first operand: (name, sum, factor, factor).
ASSEMBLY = re.compile(
    r'__asm__\(\s*"(?:%\{vex%\} )?(vpdp\w+) %2, %1, %0"\s*:\s*"\+[vx]"\((\w+)\)'
    r'\s*:\s*"[vx]"\(([^;]*?)\),\s*"[vx]"\(([^;]*?)\)\);'
)
FOUR_CHANNELS = re.compile(r'__asm__\("vpdpbusd %2%\{1to16%\}[^;]*;')
#: A planted defect shows with one of them: some need a rare shape, or tasks that meet in a row of a random problem.
SEEDS = range(5, 30)


@dataclass(frozen=True)
class Built:
    """The objects of a build in a folder, by their sources."""

    name: str
    folder: Path
    objects: dict[str, Path]

    @property
    def flags(self) -> tuple[str, ...]:
        return BUILDS[self.name]

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


def emulate(csrc: Path) -> None:
    """Replaces the assembly of a copy, and makes it run the emulated levels."""
    found = 0
    for file in sorted((csrc / "cpu").iterdir()):
        text, count = ASSEMBLY.subn(r"emulated::\1(\2, \3, \4);", file.read_text())
        text, more = FOUR_CHANNELS.subn(
            "emulated::vpdpbusd(sum, keys, _mm512_set1_epi32(read<int32_t>(q)));", text
        )
        found += count + more
        file.write_text(text)
    assert found == 6, f"{found} instructions in assembly are emulated; adapt ASSEMBLY"
    levels_file, first = csrc / "cpu/levels.cpp", "bool runs(Level level) {\n  constexpr"
    run_all = "bool runs(Level level) {\n  if (level > Level::kAvx2) return true;\n  constexpr"
    levels_file.write_text(with_replaced(levels_file, first, run_all))


def compile_source(source: str, target: Path, build: str, root: Path) -> None:
    """Compiles a source of `root`, or the program."""
    level, emulated = cpu.level_of_source(source), build == "emulated"
    macros = [
        f"-DSQK_CPU_HAS_{name.upper()}={int(emulated or name in levels())}" for name in cpu.LEVELS
    ]
    own: tuple[str, ...] = cpu.LEVELS[level] if level else ()
    if emulated and level in EMULATED:
        own = (*cpu.LEVELS["avx2"], "-include", str(ROOT / "tests/csrc/emulated.h"))
        own += ("-DEMULATED_512",) if level != "avx_vnni" else ()
    includes = [f"-I{root / 'csrc/include'}", f"-I{root / 'csrc'}"]
    path = (ROOT if source == PROGRAM else root) / source
    run(
        [
            *(compiler().path, "-c", str(path), "-o", str(target)),
            *(*cpu.FLAGS, "-Wno-psabi", *own, *macros, *includes, *BUILDS[build]),
        ]
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Makes a build of `BUILDS` at its first use."""
    made: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            root, known = ROOT, levels()
            if name == "emulated":
                root, known = folder, list(cpu.LEVELS)
                shutil.copytree(ROOT / "csrc", root / "csrc")
                emulate(root / "csrc")
            wanted = [
                source
                for source in cpu_sources()
                if (level := cpu.level_of_source(source)) is None or level in known
            ]
            objects = {source: folder / (Path(source).stem + ".o") for source in [*wanted, PROGRAM]}
            with ThreadPoolExecutor(jobs(os.environ)) as pool:
                list(
                    pool.map(
                        lambda item: compile_source(item[0], item[1], name, root),
                        objects.items(),
                    )
                )
            made[name] = Built(name, folder, objects)
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


@pytest.mark.parametrize("level", EMULATED)
def test_emulated_levels_equal_the_specification(build: Callable[[str], Built], level: str) -> None:
    """Their code but not their instructions, also where the processor has those."""
    require_emulation()
    done = runs(build("emulated").program(), 1, 100, level)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("200 runs"), done.stdout  # with one thread and with three


def require_emulation() -> None:
    if platform.machine() not in ("x86_64", "AMD64") or "avx2" not in levels():
        pytest.skip("emulation needs AVX2")
    if "clang" in compiler().version:
        pytest.skip("emulated.h is written for g++")


@pytest.mark.in_turn
@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_defect_shows(build: Callable[[str], Built], name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    kind, level = mutant.build, [mutant.level] if mutant.level else []
    if mutant.level is not None and not runs_here(build, mutant):
        require_emulation()
        kind = "emulated"
    base = build(kind)
    program = base.program()

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    changed, text = mutant.planted(tmp_path / "csrc")
    changed.write_text(text)
    if kind == "emulated":
        emulate(tmp_path / "csrc")
    replaced = {}
    for stem in mutant.sources:
        replaced[stem] = tmp_path / f"{stem}.o"
        compile_source(f"csrc/cpu/{stem}.cpp", replaced[stem], kind, tmp_path)
    planted = base.program("mutant", **replaced)
    for seed in SEEDS:
        done = runs(planted, seed, 60, *level)
        if done.returncode != 0 and mutant.symptom in done.stdout + done.stderr:
            break
    else:
        pytest.fail(f"no seed shows {mutant.symptom}; the last: {done.stdout}{done.stderr}")
    sound = runs(program, seed, 60, *level)
    assert sound.returncode == 0, sound.stdout + sound.stderr


def runs_here(build: Callable[[str], Built], mutant: Mutant) -> bool:
    """Whether the compiler and the processor have the level of a defect."""
    if mutant.level not in levels():
        return False
    return not runs(build(mutant.build).program(), 0, 1, mutant.level).stdout.startswith("0 runs")
