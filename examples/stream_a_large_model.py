"""Quantizes a model that does not fit into memory, one decoder block at a time.

    python examples/stream_a_large_model.py FOLDER TEXT.txt OUTPUT

FOLDER is a local folder with config.json and safetensors files (`huggingface-cli download` makes one). The result
equals that of `quantize_and_save.py`, bit for bit. Repeat an interrupted call to resume after the last finished block.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from smoothquant_kernels import SmoothQuantConfig, quantize_streamed


def main(folder: str, text_file: str, output: str) -> None:
    texts = Path(text_file).read_text(encoding="utf-8").split("\n\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = SmoothQuantConfig(activation_scheme="per_token")
    written = quantize_streamed(folder, output, texts, config, tokenizer=tokenizer)

    before, after = (size_of_weights(path) for path in (Path(folder), written))
    print(f"{before / 1e6:,.0f} MB of weights became {after / 1e6:,.0f} MB in {written}")


def size_of_weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
