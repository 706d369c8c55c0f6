#!/usr/bin/env bash
# transformers' quantized cache does not repeat its sequences: the call returns, nothing happened, the next step fails.
#
# transformers 5.24.0, torch 2.13.0 (CPU).
#
# `Cache.batch_repeat_interleave(n)` is how a prompt that was read once serves n continuations. QuantizedCache takes the call
# without a word, but it repeats only the tensors that the base class knows, which are empty there: the quantized keys and
# values keep one sequence. With the default cache the next step continues n sequences. With the quantized one it ends in an
# error about sizes of tensors, which names neither the cache nor the call. The backend "fp8" needs no further package; the others
# inherit the same method.
#
# Output seen:
#   DynamicCache repeated 3 times: the next step gives logits of 3 sequences
#   QuantizedCache repeated 3 times: no error, 1 sequence in it
#   the next step: RuntimeError, Sizes of tensors must match except in dimension 2. Expected size 1 but got size 3
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.24.0
cd "$folder"
venv/bin/python -W ignore - 2>errors <<'PYTHON' || { cat errors >&2; exit 1; }
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import QuantizedCache

torch.set_grad_enabled(False)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
config = LlamaConfig(**sizes, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
prompt, following = torch.arange(1, 9)[None], torch.ones(3, 1, dtype=torch.long)

cache = DynamicCache(config=config)
model(prompt, cache=cache)
cache.batch_repeat_interleave(3)
count = len(model(following, cache=cache).logits)
print(f"DynamicCache repeated 3 times: the next step gives logits of {count} sequences")

cache = QuantizedCache("fp8", config)
model(prompt, cache=cache)
cache.batch_repeat_interleave(3)
layer = cache.layers[0]
held = len(layer._dequantize(layer._quantized_keys))
print(f"QuantizedCache repeated 3 times: no error, {held} sequence in it")
try:
    model(following, cache=cache)
    message = ""
except RuntimeError as error:
    message = str(error)
print(f"the next step: RuntimeError, {message.partition(' for tensor')[0]}")
assert count == 3, "the default cache has changed"
assert held == 1 and "Sizes of tensors must match" in message, "this has changed"
PYTHON
