#!/usr/bin/env bash
# transformers loads a rotated compressed-tensors checkpoint without its rotation: noise, no error, no warning.
#
# transformers 5.24.0, compressed-tensors 0.20.1, torch 2.13.0 (CPU).
#
# The format has a field for rotations, `transform_config`, and the package compressed-tensors applies it: weights are rotated
# offline, and inputs while the model runs, so that the function of the model stays the same. Compressors write the field beside
# the rotated weights. transformers reads the rest of the configuration, decompresses the rotated weights, and rotates no input.
#
# Output seen:
#   compressed-tensors applies the rotation: logits correlate with float: 1.00
#   transformers loads the int8 checkpoint without rotation: 1.00
#   transformers loads the int8 checkpoint with rotation: 0.01
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 compressed-tensors==0.20.1 accelerate==1.15.0
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import copy
import json

import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.set_grad_enabled(False)
torch.manual_seed(0)
sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
for parameter in model.parameters():
    if parameter.dim() == 2:
        parameter.normal_(0, parameter.shape[1] ** -0.5)
ids = torch.arange(5, 25)[None]
expected = model(ids).logits


def likeness(logits):
    return float(torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1])


both = {"targets": ["Linear"], "ignore": ["lm_head"]}
rotation = {
    "config_groups": {
        "hadamard": {
            "type": "hadamard",
            "head_dim": 32,
            "apply": [
                {**both, "location": "input"},
                {**both, "location": "weight_input", "inverse": True},
            ],
        }
    }
}
rotated = copy.deepcopy(model)
apply_transform_config(rotated, TransformConfig.model_validate(rotation))
applied = likeness(rotated(ids).logits)
print(f"compressed-tensors applies the rotation: logits correlate with float: {applied:.2f}")
int8 = {"num_bits": 8, "type": "int", "symmetric": True}
group = {
    "targets": ["Linear"],
    "weights": {**int8, "strategy": "channel", "dynamic": False},
    "input_activations": {**int8, "strategy": "token", "dynamic": True},
}
found = []
for name, source in (("without", model), ("with", rotated)):
    model.save_pretrained(name)
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("_proj.weight"):
            weight = source.get_submodule(key.removesuffix(".weight")).weight
            scale = weight.abs().amax(1, keepdim=True) / 127.5
            tensors[f"{key}_scale"] = scale
            tensor = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[key] = tensor.contiguous()
    save_file(tensors, f"{name}/model.safetensors", {"format": "pt"})
    config = json.load(open(f"{name}/config.json"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "transform_config": rotation if name == "with" else {},
    }
    json.dump(config, open(f"{name}/config.json", "w"))
    loaded = AutoModelForCausalLM.from_pretrained(name).eval()
    found.append(likeness(loaded(ids).logits))
    print(f"transformers loads the int8 checkpoint {name} rotation: {found[-1]:.2f}")
assert applied > 0.999 and found[0] > 0.99, "the checkpoint is wrong"
assert found[1] < 0.5, "this has changed"
PYTHON
