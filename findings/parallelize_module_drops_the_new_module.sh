#!/usr/bin/env bash
# torch's parallelize_module drops the module that a style returns, if the plan is a dictionary.
#
# torch 2.13.0 (CPU), gloo, one process.
#
# ParallelStyle._apply(module, mesh) returns a module, and so does parallelize_module. With one style they return the new
# module; with the usual plan of names the result for each submodule is not put into its parent. A style that replaces a layer (for
# a quantized one, for example) runs without a word and changes nothing: it must change the module in place.
#
# Output seen:
#   one style: Identity; plan of names: Linear
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q numpy
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W error::UserWarning - <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


class Replace(ParallelStyle):
    def _apply(self, module, device_mesh):
        return nn.Identity()


one = parallelize_module(nn.Linear(2, 2), mesh, Replace())
by_name = parallelize_module(nn.Sequential(nn.Linear(2, 2)), mesh, {"0": Replace()})[0]
print(f"one style: {type(one).__name__}; plan of names: {type(by_name).__name__}")
assert (type(one), type(by_name)) == (nn.Identity, nn.Linear)
dist.destroy_process_group()
PYTHON
