"""Quantizes a sentence encoder and compares its embeddings with those of the float model.

    python examples/quantize_sentence_encoder.py MODEL SENTENCES.txt OUTPUT

MODEL is a BERT-like encoder such as sentence-transformers/all-MiniLM-L6-v2. SENTENCES.txt has one sentence a line: the
first three quarters calibrate, the rest is compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoTokenizer

from smoothquant_kernels import save_quantized, smooth_and_quantize


def embed(model: torch.nn.Module, tokenizer: object, sentences: list[str]) -> Tensor:
    """[sentences, hidden]: the mean of each sentence's hidden states."""
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def main(name: str, sentences_file: str, output: str) -> None:
    model = AutoModel.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    sentences = Path(sentences_file).read_text(encoding="utf-8").splitlines()
    cut = len(sentences) * 3 // 4
    calibration = [tokenizer(s, truncation=True, return_tensors="pt") for s in sentences[:cut]]
    before = embed(model, tokenizer, sentences[cut:])

    smooth_and_quantize(model, calibration)
    save_quantized(model, output, tokenizer=tokenizer)

    cosines = cosine_similarity(embed(model, tokenizer, sentences[cut:]), before)
    print(f"cosine with the float model: mean {cosines.mean():.5f}, least {cosines.min():.5f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
