"""The tests that need the CUDA library, side by side, on the machine's GPU (run_on_gpu.sh's stage `tests`).

    python -m benchmarks.on_gpu.tests [--seconds 140] [--workers 12] [--backend cuda] [TEST ...]

pytest-xdist hands out test after test; pytest_plugin.py orders them, and ends a process whose CUDA context a kernel has
broken, so that another takes its place. The exit status is 1 if a test failed or the time was spent.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu import processes, pytest_plugin
from tools.build.plan import ROOT

#: A process that ends itself is replaced so often.
MOST_RESTARTS = 200


def test_files(root: Path = ROOT) -> list[str]:
    """Of the project: the kernels' tests, then those with a mark of pytest_plugin.py."""
    marked = re.compile(rf"pytest\.mark\.(?:{'|'.join(pytest_plugin.MARKS)})\b")
    kernels = sorted((root / "tests" / "kernels").glob("test_*.py"))
    others = sorted(set((root / "tests").rglob("test_*.py")) - set(kernels))
    chosen = kernels + [path for path in others if marked.search(path.read_text())]
    return [str(path.relative_to(root)) for path in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: all that need a GPU")
    parser.add_argument("--seconds", type=float, default=140.0, help="for all of them")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--backend", choices=["cuda", "simulator", "cpu", "none"], default="cuda")
    parser.add_argument("--only", metavar="EXPRESSION", help="pytest's -k")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, processes.stop_with_children)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.on_gpu.pytest_plugin", "-n", str(args.workers), "--dist", "load"]
    command += ["--maxschedchunk", "1", "--max-worker-restart", str(MOST_RESTARTS)]
    command += [] if args.backend == "none" else [f"--backend={args.backend}"]
    command += ["-k", args.only] if args.only else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # As many processes as cores: each with one thread.
    variables = {"PYTHONPATH": path, "SQK_REQUIRE_LIBRARY": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [*command, *(args.tests or test_files())], env={**os.environ, **variables}, start_new_session=True
    )  # fmt: skip
    processes.watch(child.pid)
    try:
        return int(child.wait(args.seconds) != 0)
    except subprocess.TimeoutExpired:
        print(f"stopped after {args.seconds:.0f} s: not every test has run", flush=True)
        return 1
    finally:
        processes.kill_group(child.pid)


if __name__ == "__main__":
    sys.exit(main())
