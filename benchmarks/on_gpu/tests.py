"""The tests that need the CUDA library, side by side, on the machine's GPU (run_on_gpu.sh's stage `tests`).

    python benchmarks/gpu_tests.py [--seconds 140] [--workers 12] [--backend cuda] [TEST ...]

With pytest-xdist by test, without it by file; pytest_gpu.py says in which order, and replaces a process whose CUDA
context a kernel has broken. The exit status is 1 where a test failed or the time was spent.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import children
import pytest_gpu

ROOT = Path(__file__).resolve().parent.parent
#: A process that ends itself is replaced so often.
MOST_RESTARTS = 200
PASSED, NOTHING = 0, 5


def test_files(root: Path = ROOT) -> list[str]:
    """Of the project: the kernels' tests, then those with a mark of pytest_gpu.py."""
    marked = re.compile(rf"pytest\.mark\.(?:{'|'.join(pytest_gpu.MARKS)})\b")
    kernels = sorted((root / "tests" / "kernels").glob("test_*.py"))
    others = sorted(set((root / "tests").rglob("test_*.py")) - set(kernels))
    chosen = kernels + [path for path in others if marked.search(path.read_text())]
    return [str(path.relative_to(root)) for path in chosen]


def environment() -> dict[str, str]:
    folder = str(Path(__file__).resolve().parent)
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "SQK_REQUIRE_LIBRARY": "1",
        # As many processes as cores: each with one thread.
        "OMP_NUM_THREADS": "1",
    }


def pytest_command(args: argparse.Namespace, options: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_gpu"]
    command.append("--tb=short")
    command += [] if args.backend == "none" else [f"--backend={args.backend}"]
    command += ["-k", args.only] if args.only else []
    return [*command, *options]


def by_test(tests: Sequence[str], args: argparse.Namespace, seconds: float) -> int:
    """One run of pytest-xdist, which hands out test after test in their order."""
    options = ["-n", str(args.workers), "--dist", "load", "--maxschedchunk", "1"]
    options += ["--max-worker-restart", str(MOST_RESTARTS), *tests]
    command = pytest_command(args, options)
    child = subprocess.Popen(command, env={**os.environ, **environment()}, start_new_session=True)
    children.watch(child.pid)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: not every test has run", flush=True)
        return 1
    finally:
        children.kill_group(child.pid)
    return int(code != PASSED)


def by_file(tests: Sequence[str], args: argparse.Namespace, seconds: float) -> int:
    """A process for each file, again where one ended early: the tests that it has begun are not repeated."""
    begin, bad, todo = time.monotonic(), False, list(tests)
    with tempfile.TemporaryDirectory() as folder:
        journals = {name: Path(folder) / f"{place}.txt" for place, name in enumerate(tests)}
        for _ in range(MOST_RESTARTS):
            left = begin + seconds - time.monotonic()
            ends: dict[int, children.Ended] = {}
            missing = children.run_all(
                [_file_start(name, journals[name], args) for name in todo],
                left,
                at_a_time=args.workers,
                seconds=left,
                on_end=functools.partial(_file_ended, todo, journals, ends),
            )
            if missing:
                print(f"not started: {', '.join(todo[place] for place in missing)}")
            bad = (
                bad or bool(missing) or any(e.code not in (PASSED, NOTHING) for e in ends.values())
            )
            # The time was spent, or it did not even begin a test: so it would be the next time.
            early = [todo[place] for place, end in ends.items() if end.code is not None]
            todo = [name for name in early if not journal_of(journals[name])[1]]
            todo = [name for name in todo if journals[name].exists()]
            if not todo:
                break
    return int(bad)


def _file_start(name: str, journal: Path, args: argparse.Namespace) -> children.Start:
    command = pytest_command(args, ["--gpu-journal", str(journal), name])
    return children.spawned(command, environment())


def _file_ended(
    names: Sequence[str],
    journals: Mapping[str, Path],
    ends: dict[int, children.Ended],
    place: int,
    end: children.Ended,
) -> None:
    """Prints what a file's process has said, and which test it ended in."""
    ends[place] = end
    name = names[place]
    print(end.out, end="" if end.out.endswith("\n") else "\n", flush=True)
    begun, finished = journal_of(journals[name])
    if finished or end.code == pytest_gpu.DEAD:
        return
    if end.code is None:
        what = "was stopped at the end of the time"
    else:
        what = f"ended: {children.last_words(end.code, end.err)}"
    print(f"FAILED {begun or name}: its process {what}", flush=True)


def journal_of(path: Path) -> tuple[str, bool]:
    """The test that was begun last, and whether the process came to its end."""
    lines = path.read_text().splitlines() if path.exists() else []
    finished = pytest_gpu.FINISHED in lines
    begun = [line for line in lines if line != pytest_gpu.FINISHED]
    return (begun[-1] if begun else ""), finished


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: all that need a GPU")
    parser.add_argument("--seconds", type=float, default=140.0, help="for all of them")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--backend", choices=["cuda", "simulator", "cpu", "none"], default="cuda")
    parser.add_argument("--only", metavar="EXPRESSION", help="pytest's -k")
    parser.add_argument("--by-file", action="store_true", help="without pytest-xdist")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, children.stop_with_children)
    tests = args.tests or test_files()
    with_xdist = importlib.util.find_spec("xdist") is not None and not args.by_file
    return (by_test if with_xdist else by_file)(tests, args, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
