#!/usr/bin/env bash
# torchao's default int4 makes a layer that int4 holds exactly a fifteenth smaller, and clips the largest positive weight of every group.
#
# torchao 0.18.0, torch 2.13.0 (CPU).
#
# Both configurations of weights with few bits, IntxWeightOnlyConfig and Int8DynamicActivationIntxWeightConfig, default to the mapping
# SYMMETRIC. It divides the largest magnitude of a group by 7.5, the middle of the range -8 to 7, and not by 7. So the
# largest positive weight of a group is 7 / 7.5 of its value. A layer whose weights are whole multiples of a step from -7 to 7, as those
# of a model trained for symmetric int4, comes back multiplied by 14/15, and so does a mean over the inputs: an error of 6.7 %
# of every output, all in one direction, where no error is needed. SYMMETRIC_NO_CLIPPING_ERR has none.
#
# Output seen:
#   SYMMETRIC: a mean of 64 ones is 0.9333; whole steps are multiplied by 0.9333 to 0.9333; largest positive weights by 0.9333
#   SYMMETRIC_NO_CLIPPING_ERR: a mean of 64 ones is 1.0000; whole steps are multiplied by 1.0000 to 1.0000; largest positive weights by 1.0000
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q torchao==0.18.0 numpy
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.quant_primitives import MappingType

torch.set_grad_enabled(False)
torch.manual_seed(0)
GROUP = 64
int4 = {"weight_dtype": torch.int4}
assert IntxWeightOnlyConfig(**int4).mapping_type is MappingType.SYMMETRIC
assert Int8DynamicActivationIntxWeightConfig(**int4).weight_mapping_type is MappingType.SYMMETRIC


def outputs(weight, mapping):
    """Of a quantized layer for the unit vectors, so its weight, transposed."""
    layer = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    layer[0].weight.data = weight.clone()
    quantize_(layer, IntxWeightOnlyConfig(granularity=PerGroup(GROUP), mapping_type=mapping, **int4))
    return layer(torch.eye(weight.shape[1])).t()


mean = torch.full((1, GROUP), 1 / GROUP)
steps = torch.randint(-6, 7, (128, 8 * GROUP)).float()
steps.view(-1, GROUP)[:, 0] = 7.0
normal = torch.randn(256, GROUP)
normal[:, 0] = normal.abs().amax(1) + 0.1  # the largest weight of a group is positive
found = {}
for mapping in (MappingType.SYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR):
    whole = float(outputs(mean, mapping).sum())
    ratio = (outputs(steps, mapping) / steps)[steps != 0]
    largest = float((outputs(normal, mapping) / normal)[:, 0].mean())
    found[mapping.name] = whole, float(ratio.min()), float(ratio.max()), largest
    print(
        f"{mapping.name}: a mean of 64 ones is {whole:.4f}; whole steps are multiplied by {ratio.min():.4f} to "
        f"{ratio.max():.4f}; largest positive weights by {largest:.4f}"
    )
assert all(abs(ratio - 14 / 15) < 1e-4 for ratio in found["SYMMETRIC"]), found
assert all(abs(ratio - 1) < 1e-4 for ratio in found["SYMMETRIC_NO_CLIPPING_ERR"]), found
PYTHON
