#!/usr/bin/env bash
# torch.distributed.all_reduce(MAX) over gloo loses a NaN, unless rank 0 has it.
#
# torch 2.13.0 (CPU), gloo, two processes.
#
# torch.maximum and amax return NaN if any operand is NaN. The reduction MAX of gloo compares and keeps the value of the
# lower rank unless the other one is greater, which no NaN is. So an overflow on one rank is seen or not, by the number of the rank: a
# scale that ranks agree on by MAX (the largest magnitude of a row of which each holds a part) looks valid although the
# row is not. As int32 the bits of magnitudes sort like the magnitudes, with NaN above infinity: MAX of that view keeps it.
#
# Output seen:
#   NaN on rank 0: float32 [nan], as int32 [nan]
#   NaN on rank 1: float32 [1.0], as int32 [nan]
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy
cd "$folder"
cat >ranks.py <<'PYTHON'
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
found = {}
for nan_rank in (0, 1):
    x = torch.tensor([torch.nan if rank == nan_rank else 1.0])
    plain, bits = x.clone(), x.abs().view(torch.int32)
    dist.all_reduce(plain, dist.ReduceOp.MAX)
    dist.all_reduce(bits, dist.ReduceOp.MAX)
    found[nan_rank] = (bool(plain.isnan()), bool(bits.view(torch.float32).isnan()))
    if rank == 0:
        print(f"NaN on rank {nan_rank}: float32 {plain.tolist()}, as int32 {bits.view(torch.float32).tolist()}")
assert found == {0: (True, True), 1: (False, True)}, found
dist.destroy_process_group()
PYTHON
OMP_NUM_THREADS=1 venv/bin/python -W ignore -m torch.distributed.run --nproc-per-node 2 ranks.py
