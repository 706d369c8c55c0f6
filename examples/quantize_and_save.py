"""Smooths a language model, quantizes it to W8A8 and saves it.

    python examples/quantize_and_save.py MODEL TEXT.txt OUTPUT

MODEL is a name on the Hugging Face hub or a local folder. TEXT.txt is text like the text to be served:
some 16,000 tokens of it set the smoothing factors.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothquant_kernels import SmoothQuantConfig, save_quantized, smooth_and_quantize


def main(name: str, text_file: str, output: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = Path(text_file).read_text(encoding="utf-8").split("\n\n")

    config = SmoothQuantConfig(activation_scheme="per_token")  # or "per_tensor", or "static"
    smooth_and_quantize(model, texts, config, tokenizer=tokenizer)
    save_quantized(model, output, tokenizer=tokenizer)

    how = Counter(layer["smoothing"] for layer in model.smoothquant_info["layers"])
    print(f"{how.total()} layers in int8: {how['folded']} folded, {how['runtime']} at run time")
    for layer in model.smoothquant_info["skipped"]:
        print(f"left in float: {layer['name']} ({layer['reason']})")


if __name__ == "__main__":
    main(*sys.argv[1:])
