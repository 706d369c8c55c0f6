#!/usr/bin/env bash
# On a processor with AMX, oneDNN's int8 linear with a zero point is not exact: it rounds before it subtracts.
#
# torch 2.13.0 (CPU); an Intel Xeon with AMX, one thread. Needs a processor with AMX, else it says so and stops.
#
# `onednn.qlinear_pointwise` multiplies uint8 activations by int8 weights. With a zero point of 128 it returns the sums of
# (x - 128) * w. The AMX kernel, used from about three rows on, converts the sum of x * w to float32 and then subtracts
# 128 times the sum of the weights. Where the first sum is beyond 2^24 it is rounded, so the result is off by some units,
# although it is a small integer that float32 holds exactly. That takes weights of mostly one sign and K from about 1,000
# on. The same call with int8 activations and zero point 0 is exact, and so is the first one with oneDNN limited to VNNI
# (ONEDNN_MAX_CPU_ISA), which subtracts in int32. So code that was proved exact on a processor with VNNI is not with AMX.
#
# Output seen:
#   uint8, zero point 128, AMX: 16 of 576 sums differ, by up to 4
#   int8, zero point 0, AMX: 0 of 576 sums differ, by up to 0
#   uint8, zero point 128, VNNI only: 0 of 576 sums differ, by up to 0
set -euo pipefail
if ! grep -qw amx_int8 /proc/cpuinfo; then
  echo "this processor has no AMX: nothing to see here"
  exit 0
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import os
import sys

import torch

torch.manual_seed(0)
m, n, k = 9, 64, 4608
x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
w[0] = 127
w[1] = -127
exact = x.long() @ w.long().T
assert int(exact.abs().max()) < 2**24
packed = torch.ops.onednn.qlinear_prepack.default(w, None)


def differing(activations, zero_point):
    y = torch.ops.onednn.qlinear_pointwise.default(
        activations, 1.0, zero_point, packed, torch.ones(n), torch.zeros(n, dtype=torch.int32), None,
        1.0, 0, torch.float32, "none", [], "",
    )
    error = (y.double() - exact.double()).abs()
    return int((error > 0).sum()), int(error.max())


only = "VNNI only" if "ONEDNN_MAX_CPU_ISA" in os.environ else "AMX"
shifted = (x.int() + 128).to(torch.uint8)
cases = {"uint8, zero point 128": (shifted, 128)}
if only == "AMX":
    cases["int8, zero point 0"] = (x, 0)
for name, arguments in cases.items():
    count, most = differing(*arguments)
    print(f"{name}, {only}: {count} of {m * n} sums differ, by up to {most}")
    assert (count > 0) == (name.startswith("uint8") and only == "AMX")
PYTHON
cd "$folder"
export OMP_NUM_THREADS=1
venv/bin/python -W ignore run.py
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI venv/bin/python -W ignore run.py
