#!/usr/bin/env bash
# On a processor with AMX, oneDNN's int8 linear falls to its reference loop for one row and a small weight.
#
# torch 2.13.0 (CPU); an Intel Xeon with AMX, one thread. Needs a processor with AMX, else it says so and stops.
#
# `onednn.qlinear_pointwise` takes int8 activations and a weight that `qlinear_prepack` has packed. On AMX a tile kernel
# serves it: for one row and a weight [320, 576], for example. For one row and [256, 576] or [192, 576] oneDNN names its
# reference implementation (ONEDNN_VERBOSE=1), which takes some 5 ms, 20 times as long as the tile kernel for the larger
# weight. The result is right. With uint8 activations a fast kernel serves the small weight. So code that calls int8
# activations fast on AMX, because it has tried one shape, is wrong about others: the key and value projections of a small
# model are such shapes.
#
# Output seen:
#   weight [192, 576], one row of int8: ref_int8:any
#   weight [256, 576], one row of int8: ref_int8:any
#   weight [320, 576], one row of int8: brg_matmul:avx10_1_512_amx
#   weight [192, 576], one row of uint8: brg_matmul:avx10_1_512
set -euo pipefail
if ! grep -qw amx_int8 /proc/cpuinfo; then
  echo "this processor has no AMX: nothing to see here"
  exit 0
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
cat > run.py <<'PYTHON'
import sys
import torch

n, kind = int(sys.argv[1]), sys.argv[2]
x = torch.randint(0, 100, (1, 576), dtype=torch.int8 if kind == "int8" else torch.uint8)
w = torch.randint(-100, 100, (n, 576), dtype=torch.int8)
packed = torch.ops.onednn.qlinear_prepack(w, None)
scale, zero = torch.ones(n), torch.zeros(n, dtype=torch.int32)
y = torch.ops.onednn.qlinear_pointwise(
    x, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
)
assert torch.equal(y, (x.double() @ w.double().T).float()), "the product is wrong"
PYTHON
kernel() { # N, type: the implementation of the product that oneDNN names
  ONEDNN_VERBOSE=1 venv/bin/python -W ignore run.py "$1" "$2" |
    grep 'exec,cpu,matmul' | cut -d, -f7 | tail -n 1
}
export OMP_NUM_THREADS=1
for case in "192 int8 ref" "256 int8 ref" "320 int8 fast" "192 uint8 fast"; do
  read -r n type wanted <<<"$case"
  found="$(kernel "$n" "$type")"
  echo "weight [$n, 576], one row of $type: $found"
  case "$wanted $found" in
    "ref ref"* | "fast brg"*) ;;
    *) echo "this has changed" && exit 1 ;;
  esac
done
