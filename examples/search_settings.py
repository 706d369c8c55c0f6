"""Searches the best alpha and scheme of each layer, then quantizes with them.

    python examples/search_settings.py MODEL TEXT.txt OUTPUT

The search writes every finding to OUTPUT.search.json. If it is interrupted, the same call resumes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothquant_kernels import (
    SmoothQuantConfig,
    save_quantized,
    search_config,
    smooth_and_quantize,
)


def main(name: str, text_file: str, output: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = Path(text_file).read_text(encoding="utf-8").split("\n\n")

    # A static scale is the fastest scheme and gains most by a search.
    static = SmoothQuantConfig(activation_scheme="static")
    result = search_config(model, texts, static, tokenizer=tokenizer, path=f"{output}.search.json")
    print(f"expected KL divergence: {result.fixed_cost:.4f} nats with one alpha for all layers,")
    print(f"{result.searched_cost:.4f} with searched settings; kept: {result.kept}")

    smooth_and_quantize(model, texts, result.config, tokenizer=tokenizer)
    save_quantized(model, output, tokenizer=tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
