"""Loads a quantized model and answers a question.

    python examples/load_and_generate.py CHECKPOINT "What is gravity?"

CHECKPOINT is a folder that `save_quantized` wrote with `tokenizer=`.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer

from smoothquant_kernels import load_quantized
from smoothquant_kernels.backends.cuda import extension_status


def main(folder: str, question: str) -> None:
    on_gpu = torch.cuda.is_available() and extension_status().available
    model = load_quantized(folder, device="cuda" if on_gpu else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
