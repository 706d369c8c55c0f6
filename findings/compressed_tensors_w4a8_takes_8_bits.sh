#!/usr/bin/env bash
# compressed-tensors stores the weights of a W4A8 model in a byte each: its checkpoint is larger than that of W8A8.
#
# compressed-tensors 0.19.0, torch 2.13.0 (CPU).
#
# The format of a checkpoint follows from the scheme. With 4-bit weights and float activations it is pack-quantized, with 8 weights in
# an int32. With the same 4-bit weights and int8 activations it is int-quantized, the format of W8A8: every 4-bit value is an int8. With the scales
# of the groups, 8.25 bits a weight then stand for 16 values each, and the model has the size on disk, on the network and while it is
# loaded of an 8-bit one, until a server packs it.
#
# Output seen:
#   W4A16: pack-quantized, 4.25 bits a weight
#   W4A8: int-quantized, 8.25 bits a weight, values -8 to 7
#   W8A8: int-quantized, 8.03 bits a weight, values -127 to 127
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q compressed-tensors==0.19.0 numpy
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from torch import nn

N, K, GROUP = 512, 1024, 128
torch.manual_seed(0)
weight = torch.randn(N, K)
groups = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
channels = {"num_bits": 8, "strategy": "channel"}
inputs = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True, symmetric=True)
found = {}
for name, weights, activations in (("W4A16", groups, None), ("W4A8", groups, inputs), ("W8A8", channels, inputs)):
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    model[0].weight.data = weight.clone()
    arguments = QuantizationArgs(type="int", symmetric=True, **weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=activations)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}))
    scale = model[0].weight_scale
    maxima = weight.view(N, scale.shape[1], -1).abs().amax(2)
    scale.data = maxima / (2 ** (weights["num_bits"] - 1) - 1 + 0.5 * (weights["num_bits"] == 4))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors = model.state_dict()
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / (N * K)
    found[name] = compressor.quantization_config.format.value, round(bits, 2)
    stored = tensors.get("0.weight")
    values = "" if stored is None else f", values {stored.min()} to {stored.max()}"
    print(f"{name}: {found[name][0]}, {found[name][1]:.2f} bits a weight{values}")
assert found == {
    "W4A16": ("pack-quantized", 4.25),
    "W4A8": ("int-quantized", 8.25),
    "W8A8": ("int-quantized", 8.03),
}, found
PYTHON
