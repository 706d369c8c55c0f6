#!/usr/bin/env bash
# An int8 checkpoint whose config says "quantization_status": "frozen" loads with its int8 codes as weights: noise, no error.
#
# transformers 5.24.0, compressed-tensors 0.20.1, torch 2.13.0 (CPU).
#
# Older checkpoints say "frozen" beside quantized tensors, newer ones "compressed": the documentation of transformers
# shows such a config (FP8, format "naive-quantized"), and scripts that convert DeepSeek-V3 to W8A8 write "frozen" with
# "int-quantized". In transformers the status alone decides. For "frozen", an int8 weight stays as it is, and the scales
# only round the codes once more: weights are a thousand times too large. The loading report names the absent zero points,
# of which a symmetric model has none, and nothing else.
#
# Output seen:
#   compressed: largest weight of up_proj 0.0769, logits correlate with float: 1.00
#   frozen: largest weight of up_proj 128, logits correlate with float: 0.30 (varies from run to run)
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 compressed-tensors==0.20.1 accelerate==1.15.0
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.set_grad_enabled(False)
torch.manual_seed(0)
sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
model.save_pretrained("model")
ids = torch.arange(5, 25)[None]
expected = model(ids).logits

tensors = load_file("model/model.safetensors")
for name in [n for n in tensors if "_proj.weight" in n]:
    scale = tensors[name].abs().amax(1, keepdim=True) / 127.5
    tensors[f"{name}_scale"] = scale
    tensors[name] = (tensors[name] / scale).round().clamp(-128, 127).to(torch.int8)
save_file(tensors, "model/model.safetensors", {"format": "pt"})
int8 = {"num_bits": 8, "type": "int", "symmetric": True}
group = {
    "targets": ["Linear"],
    "weights": {**int8, "strategy": "channel", "dynamic": False},
    "input_activations": {**int8, "strategy": "token", "dynamic": True},
}
config = json.load(open("model/config.json"))
for status in ("compressed", "frozen"):
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": status,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    json.dump(config, open("model/config.json", "w"))
    loaded = AutoModelForCausalLM.from_pretrained("model").eval()
    logits = loaded(ids).logits
    weight = loaded.model.layers[0].mlp.up_proj.weight
    alike = float(torch.corrcoef(torch.stack([logits.flatten(), expected.flatten()]))[0, 1])
    largest = float(weight.float().abs().max())
    print(f"{status}: largest weight of up_proj {largest:.3g}, logits correlate with float: {alike:.2f}")
    assert (largest > 100) == (status == "frozen") and (alike > 0.99) == (status == "compressed")
PYTHON
