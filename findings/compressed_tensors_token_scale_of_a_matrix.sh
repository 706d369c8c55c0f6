#!/usr/bin/env bash
# compressed-tensors' scale "per token" is one scale for all tokens where a layer reads a matrix: later tokens change earlier ones.
#
# compressed-tensors 0.20.1, transformers 5.24.0, torch 2.13.0 (CPU).
#
# The strategy "token" of W8A8 and of FP8_DYNAMIC finds the scale by a reduction over all dimensions but the first two, those
# of [batch, tokens, channels]. For a matrix [tokens, channels] no dimension is left, and the code takes "none" for "all":
# the whole matrix gets one scale. A token beside one that is a thousand times larger is rounded to 0. transformers hands
# matrices to the shared experts of Qwen2-MoE, Qwen3-Next, Qwen3.5-MoE and others, so there the last token of a causal
# model changes the logits of those before it, and what a text gets depends on what else is in the batch.
#
# Output seen:
#   up_proj, tokens of size 1 beside one of 1000: [1, 4, 64] keeps them: True; [4, 64] gives 0: True
#   LlamaForCausalLM: another last token moves earlier logits by 0 (float), 0 (int8 activations)
#   Qwen2MoeForCausalLM: another last token moves earlier logits by 0 (float), 0.0031 (int8 activations)
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0 compressed-tensors==0.20.1 accelerate==1.15.0
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

torch.set_grad_enabled(False)
torch.manual_seed(0)
int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
groups = {"group_0": {"targets": ["Linear"], "input_activations": int8}}
config = {"config_groups": groups, "ignore": ["lm_head"], "quantization_status": "frozen"}
sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
moe = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128))
qwen = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **moe, num_key_value_heads=2, num_experts_per_tok=2))


def change(model):
    """How much another last token moves the logits of the tokens before it, at most."""
    first = torch.arange(5, 17)[None]
    before = model(first).logits[0, :-1]
    largest = 0.0
    for token in range(100):
        ids = first.clone()
        ids[0, -1] = token
        largest = max(largest, float((model(ids).logits[0, :-1] - before).abs().max()))
    return largest


found = []
for model in (llama, qwen):
    model.eval()
    in_float = change(model)
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    found.append((type(model).__name__, in_float, change(model)))

x = torch.randn(4, 64) * torch.tensor([1.0, 1.0, 1.0, 1000.0])[:, None]
layer = llama.model.layers[0].mlp.up_proj
kept = bool((layer(x[None])[0, :3] != 0).all())
lost = not bool(layer(x)[:3].any())
print(f"up_proj, tokens of size 1 beside one of 1000: [1, 4, 64] keeps them: {kept}; [4, 64] gives 0: {lost}")
for name, in_float, in_int8 in found:
    print(f"{name}: another last token moves earlier logits by {in_float:.2g} (float), {in_int8:.2g} (int8 activations)")
assert kept and lost
assert found[0][1] < 1e-6 and found[0][2] < 1e-6, found
assert found[1][1] < 1e-6 and found[1][2] > 1e-5, found
PYTHON
