"""Builds the CPU kernels in this checkout, for an editable install that has none: `python -m tools.build`.

SMOOTHQUANT_KERNELS_BUILD=cpu makes an error of a reason not to build; =none removes the library. Otherwise a line says
why there is none. It compiles only what has changed, so the Makefile calls it before every test run.
"""

from __future__ import annotations

import os
import sys

from tools.build.cpu import BUILD_INFO_NAME, LIBRARY_NAME, build_cpu_library, make_cpu_plan
from tools.build.install import place
from tools.build.plan import MODE_VARIABLE, PACKAGE, ROOT, BuildError

TARGET = ROOT / PACKAGE


def main() -> int:
    try:
        plan, message = make_cpu_plan(os.environ)
        if plan is not None:
            built = build_cpu_library(plan, os.environ)
            place({LIBRARY_NAME: built.library}, built.facts, BUILD_INFO_NAME, TARGET)
            return 0
    except BuildError as error:
        message = f"no compiled CPU kernels: {error}"
        if os.environ.get(MODE_VARIABLE) == "cpu":
            print(message, file=sys.stderr)
            return 1
    # A library of other sources must not serve.
    for name in (LIBRARY_NAME, BUILD_INFO_NAME):
        (TARGET / name).unlink(missing_ok=True)
    print(message or f"no compiled CPU kernels: {MODE_VARIABLE}=none.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
