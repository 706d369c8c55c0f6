"""Generates text with keys and values in int8: about half the memory of a float16 cache.

    python examples/generate_with_int8_cache.py MODEL "Once upon a time"

MODEL is a name on the hub or a folder: a float model, or a folder that `save_quantized` wrote.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothquant_kernels import Int8KVCache, register_transformers


def main(name: str, prompt: str) -> None:
    register_transformers()  # from_pretrained also reads quantized folders, and knows this attention
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="int8_kv")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if torch.cuda.is_available():
        model.to("cuda")

    cache = Int8KVCache(model)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, cache=cache, max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(f"cache: {cache.get_seq_length()} tokens, {cache.bytes_per_token:,} bytes each")


if __name__ == "__main__":
    main(*sys.argv[1:])
